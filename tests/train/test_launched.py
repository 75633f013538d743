"""Training with accelerate's launcher: on two machines, and with a process that is killed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import multitower as mt
from processes import environment

launched = pytest.importorskip(
    "launched_training", reason="needs accelerate and datasets", exc_type=ImportError
)
killed = pytest.importorskip("killed_training", reason="the Trainer needs transformers", exc_type=ImportError)

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LIMIT = 600


def start(options: list[str], script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a launcher; only an environment variable makes its processes use the CPU."""
    return subprocess.Popen(
        [*LAUNCH, *options, script, *map(str, arguments)],
        env=environment(ACCELERATE_USE_CPU="true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(script: str, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start the launchers of two simulated machines with one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return [start([*where, "--machine_rank", str(rank)], script, *arguments) for rank in range(2)]


def finish(runs: list[subprocess.Popen[str]]) -> list[str]:
    """Wait until all have ended; return their output."""
    try:
        return [run.communicate(timeout=LIMIT)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()


def losses(folder: Path, accumulate: int) -> Any:
    return json.loads((folder / f"losses{accumulate}.json").read_text())


@pytest.mark.slow
def test_two_machines_have_the_losses_and_weights_of_one_process(tmp_path: Path) -> None:
    launched.prepare(tmp_path)
    command = [sys.executable, launched.__file__, str(tmp_path), "5", "4"]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    expected = mt.FusedModel.from_pretrained(tmp_path / "out").state_dict()
    runs = start_two(launched.__file__, tmp_path, 10, 2)
    printed = finish(runs)
    assert [run.returncode for run in runs] == [0, 0], printed
    assert losses(tmp_path, 2) == pytest.approx(losses(tmp_path, 4), rel=1e-4)
    found = mt.FusedModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(tensor.allclose(expected[name], rtol=1e-3, atol=3e-4) for name, tensor in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_a_killed_run_ends_at_once_and_says_which_process_it_was(machines: int, tmp_path: Path) -> None:
    arguments = (killed.__file__, "trainer", tmp_path)
    port = ["--main_process_port", "0"]
    runs = start_two(*arguments) if machines == 2 else [start(port, *arguments)]
    printed = finish(runs)
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    assert all(run.returncode for run in runs)
    last = printed[-1].replace("exitcode  :", "exitcode:").replace("rank      :", "rank:")
    assert "exitcode: -9" in last, printed
    assert "rank: 1" in last, printed
