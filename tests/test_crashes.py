"""Saves that are killed, run into a full disk, or have company."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import savers
from multitower import atomic
from multitower.testing import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint beside which nothing else stands."""
    (tmp_path / "place").mkdir()
    tiny_model(0).save_pretrained(tmp_path / "place/fused")
    (tmp_path / "place/fused/README.md").write_text("mine")
    return tmp_path / "place/fused"


def kill_at_random(folder: Path, kills: int, seed: int, **options: bool) -> list[int]:
    """Kill savers, each at a moment of its own; say which model was found each time."""
    chance, found = random.Random(seed), []
    for _ in range(kills):
        child, pipe = savers.start(folder, **options)
        assert pipe.recv() == "begins"
        time.sleep(chance.uniform(0, 0.15))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found.append(savers.which(folder))
        assert (atomic.current(folder) / "README.md").read_text() == "mine"
    return found


def kill_at_each_step(folder: Path, exchange: bool, every: int = 1, limit: int = 10_000) -> list[int]:
    """Kill savers before the first, second, ... thing that each does to the file system."""
    found = []
    for step in range(0, limit, every):
        child, _ = savers.start(folder, exchange=exchange, kill_at=step, saves=1)
        child.join()
        found.append(savers.which(folder))
        if child.exitcode == 0:
            break
        if found[-1] == 1:  # so that each begins with the other model
            shutil.rmtree(folder, ignore_errors=True)
            for left in folder.parent.iterdir():
                shutil.rmtree(left)
            tiny_model(0).save_pretrained(folder)
    return found


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_random_moments_a_whole_checkpoint_is_there(folder: Path, exchange: bool) -> None:
    kill_at_random(folder, 5, seed=1, exchange=exchange)
    tiny_model(1).save_pretrained(folder)
    assert savers.which(folder) == 1
    assert os.listdir(folder.parent) == ["fused"]


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("flush", [True, False])
def test_killed_at_200_random_moments(folder: Path, exchange: bool, flush: bool) -> None:
    found = kill_at_random(folder, 200, seed=2, exchange=exchange, flush=flush)
    print(f"found the one model {found.count(0)} times, the other {found.count(1)} times")
    assert min(found.count(0), found.count(1)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_each_step_a_whole_checkpoint_is_there(folder: Path, exchange: bool) -> None:
    found = kill_at_each_step(folder, exchange)
    print(f"{len(found)} steps, of which the last {found.count(1)} leave the new one")
    assert found == sorted(found)
    assert found[-1] == 1
