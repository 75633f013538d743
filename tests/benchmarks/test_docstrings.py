"""Run the examples in the docstrings of scripts, which are not in pytest's paths."""

from __future__ import annotations

import os
import subprocess
import sys

from paths import ROOT

FOLDERS = ("benchmarks", "benchmarks/learning", "benchmarks/evidence")


def test_examples_in_docstrings_run() -> None:
    scripts = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    files = [str(script) for script in sorted(scripts) if "    >>> " in script.read_text()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)}
    # Scripts without their extras are skipped: "no:python" keeps pytest from importing them as tests.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:python", "--doctest-ignore-import-errors"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout
