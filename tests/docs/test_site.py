"""The site builds, with nothing to complain about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(needed, reason="the site needs the extra docs")


def test_the_site_builds(tmp_path: Path) -> None:
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    assert 'id="multitower.FusedModel.generate"' in api
    assert "&gt;&gt;&gt;" in api
    assert "<math" in (tmp_path / "site/concepts/index.html").read_text(encoding="utf-8")
