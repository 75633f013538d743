"""Pages that the site offers as notebooks."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from pages import DOCS, blocks
from paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="the site needs the extra docs")
for needed in ("jupytext", "mkdocs"):
    pytest.importorskip(needed, reason="the site needs the extra docs")

LISTED = re.findall(
    r"^    - (\S+\.md)$",
    (ROOT / "mkdocs.yml").read_text().split("notebooks:")[1].split("\n\n")[0],
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "_plugins/notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_listed() -> None:
    assert {"start.md", "tutorials/two_models.md", "tutorials/reuse.md"} <= set(LISTED)


@pytest.mark.parametrize("page", LISTED)
def test_a_notebook_has_the_code_of_its_page_in_order(plugin: ModuleType, page: str) -> None:
    notebook = nbformat.reads(plugin.as_notebook((DOCS / page).read_text()), as_version=4)
    nbformat.validate(notebook)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert cells == [block.code.rstrip("\n") for block in blocks(DOCS / page) if block.kind == "python"]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose.startswith("# ")
    assert not re.search(r"\]\([^)]*\.md", prose)


def test_links_out_of_the_site_stay(plugin: ModuleType) -> None:
    page = "# A\n\n[paper](https://arxiv.org) and [page](b.md#c)\n\n```python\na = [1](2)\n```\n"
    notebook = nbformat.reads(plugin.as_notebook(page), as_version=4)
    assert [cell.source for cell in notebook.cells] == [
        "# A\n\n[paper](https://arxiv.org) and page",
        "a = [1](2)",
    ]
