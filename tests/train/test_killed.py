"""Distributed runs in which one process is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import environment

killed = pytest.importorskip("killed_training", reason="the Trainer needs transformers", exc_type=ImportError)

LIMIT = 600


def launch(part: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, killed.__file__, part, str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.slow
def test_a_killed_run_ends_at_once_and_is_resumed_as_if_nothing_had_been(tmp_path: Path) -> None:
    for part in ("trainer", "loop"):
        run = launch(part, tmp_path)
        assert time.time() - float((tmp_path / "died").read_text()) < 60
        assert run.returncode != 0
        assert "exitcode: -9" in run.stderr.replace("exitcode  :", "exitcode:"), run.stderr
        assert "local_rank: 1" in run.stderr
        (tmp_path / "died").unlink()
    run = launch("resumed", tmp_path)
    assert run.returncode == 0, run.stderr
