"""Run the benchmark of live transcription on a small checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

for needed in ("soundfile", "librosa", "tqdm"):
    pytest.importorskip(needed, reason="the benchmark needs the speech extra")


@pytest.mark.slow
def test_every_policy_has_its_row(parts: Path, fused: Path) -> None:
    clips = [str(parts / "clips" / f"{number}.wav") for number in range(2)]
    command = [sys.executable, str(ROOT / "benchmarks/live.py"), str(fused), *clips, "--pieces", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.strip().splitlines()[2:]
    assert [row.split(" | ")[1].partition("(")[0] for row in rows] == ["Agreement"] * 3 + ["AtEnd"]
    assert rows[-1].split(" | ")[2] == "2 of 2"
