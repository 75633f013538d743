"""Check that the links and pictures of the README and the documentation exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pages import DOCS, PAGES, name
from paths import ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    plain = (re.sub(r"[^\w\s-]", "", each).strip().lower() for each in HEADING.findall(text))
    return {re.sub(r"[-\s]+", "-", each) for each in plain}


def broken(page: Path) -> list[str]:
    """Return the links of a page to files or headings that do not exist."""
    found = []
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            found.append(target)
        elif DOCS in page.parents and DOCS not in file.parents:
            found.append(f"{target} (the site has nothing outside of docs)")
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


def test_every_picture_is_shown() -> None:
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [path.name for path in (DOCS / "images").iterdir() if path.name not in shown]


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](#one-two) [b](#three) ![c](no.png) [d](page.md#one-two) `[e](no)`\n")
    assert broken(page) == ["#three", "no.png"]


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page for page in PAGES[1:] if f": {page.relative_to(DOCS).as_posix()}\n" not in listed]
