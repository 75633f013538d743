"""The site builds without warnings."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import multitower
from paths import ROOT

for needed in ("jupytext", "mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(needed, reason="the site needs the extra docs")


def public() -> list[tuple[str, set[str]]]:
    """Return the public names of the library, each with the anchors that may document it."""
    modules = [each for each in dir(multitower) if each not in (*multitower.__all__, "__version__")]
    found = [(f"multitower.{name}", {f"multitower.{name}"}) for name in multitower.__all__]
    for module in (*modules, "testing"):
        offered = importlib.import_module(f"multitower.{module}")
        own = (name for name, each in vars(offered).items() if _is_from(each, offered) and name[0] != "_")
        for name in getattr(offered, "__all__", own):
            paths = {f"multitower.{name}", f"{offered.__name__}.{name}"}
            source = getattr(getattr(offered, name), "__module__", offered.__name__)
            found.append((f"multitower.{module}.{name}", paths | {f"{source}.{name}"}))
    return found


def _is_from(value: object, module: ModuleType) -> bool:
    return getattr(value, "__module__", "") == module.__name__


def test_the_site_builds(tmp_path: Path) -> None:
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    pages = "".join(each.read_text(encoding="utf-8") for each in (tmp_path / "site/api").rglob("*.html"))
    lacking = [name for name, paths in public() if not any(f'id="{path}"' in pages for path in paths)]
    assert not lacking
    assert "A data set holds examples, lists of segments" in pages  # descriptions, not only arguments
    assert '<span class="gp">&gt;&gt;&gt; </span>' in pages
    notebook = tmp_path / "site/tutorials/two_models.ipynb"
    assert notebook.is_file()
    assert f'href="../{notebook.name}"' in (notebook.with_suffix("") / "index.html").read_text(
        encoding="utf-8"
    )
    assert "<math" in (tmp_path / "site/concepts/index.html").read_text(encoding="utf-8")
