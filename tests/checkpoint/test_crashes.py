"""Saves that are killed, run out of disk space, or run at the same time."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

import multitower as mt
import savers
from multitower.storage import atomic
from multitower.testing import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a checkpoint to a folder with nothing next to it."""
    (tmp_path / "place").mkdir()
    tiny_model(0).save_pretrained(tmp_path / "place/fused")
    (tmp_path / "place/fused/README.md").write_text("mine")
    return tmp_path / "place/fused"


def kill_at_random(folder: Path, kills: int, seed: int, **options: bool) -> list[int]:
    """Kill savers at random times; return which model was found after each."""
    chance, found = random.Random(seed), []
    started = time.perf_counter()
    tiny_model(0).save_pretrained(folder)
    several = 4 * (time.perf_counter() - started)  # the time of four saves under the present load
    for _ in range(kills):
        child, pipe = savers.start(folder, **options)
        assert pipe.recv() == "begins"
        time.sleep(chance.uniform(0, several))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found.append(savers.which(folder))
        assert (atomic.current(folder) / "README.md").read_text() == "mine"
    return found


def kill_at_each_step(folder: Path, every: int = 1, limit: int = 10_000) -> list[int]:
    """Kill savers before their first, second, ... file operation; return which model was found."""
    found = []
    for step in range(0, limit, every):
        child, _ = savers.start(folder, kill_at=step, saves=1)
        child.join()
        found.append(savers.which(folder))
        if child.exitcode == 0:
            break
        if found[-1] == 1:  # so that each saver replaces the other model
            shutil.rmtree(folder, ignore_errors=True)
            for left in folder.parent.iterdir():
                shutil.rmtree(left)
            tiny_model(0).save_pretrained(folder)
    return found


def test_killed_at_random_moments_a_whole_checkpoint_is_there(folder: Path) -> None:
    kill_at_random(folder, 5, seed=1)
    tiny_model(1).save_pretrained(folder)
    assert savers.which(folder) == 1
    assert os.listdir(folder.parent) == ["fused"]


@pytest.mark.slow
@pytest.mark.parametrize("flush", [True, False])
def test_killed_at_200_random_moments(folder: Path, flush: bool) -> None:
    found = kill_at_random(folder, 200, seed=2, flush=flush)
    print(f"found the one model {found.count(0)} times, the other {found.count(1)} times")
    assert min(found.count(0), found.count(1)) > 20


@pytest.mark.slow
def test_killed_at_each_step_a_whole_checkpoint_is_there(folder: Path) -> None:
    found = kill_at_each_step(folder)
    print(f"{len(found)} steps, of which the last {found.count(1)} leave the new one")
    assert found == sorted(found)
    assert found[-1] == 1


@pytest.mark.parametrize("limit", ["file", "disk"])
def test_a_full_disk_leaves_the_old_checkpoint(folder: Path, limit: str) -> None:
    reports = savers.save_where_it_cannot(folder, limit)
    if reports is None:
        pytest.skip("no permission to mount a disk")
    assert len(reports) > 5
    for report, found, left in reports[:-1]:
        assert report.startswith(f"cannot save to {folder}, which is as it was: ")
        assert found == 0
        assert left == ["fused"]
    assert reports[-1] == ("saved", 1, ["fused"])


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as place:  # other users cannot access tmp_path
        folder = Path(place, "fused")
        tiny_model(0).save_pretrained(folder)
        for path in (*folder.rglob("*.safetensors"), Path(place)):
            path.chmod(0o555)
        reports = savers.save_where_it_cannot(folder, "read-only")
        assert reports is not None
        ((report, found, left),) = reports
        assert "Permission denied" in report
        assert report.startswith(f"cannot save to {folder}")
        assert (found, left) == (0, ["fused"])


def test_a_file_system_that_is_read_only_is_named(folder: Path) -> None:
    def read_only(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", read_only)
        with pytest.raises(mt.errors.CheckpointError, match=r"cannot save to .*Read-only file system"):
            tiny_model(1).save_pretrained(folder)
    assert savers.which(folder) == 0


def test_a_saver_that_has_company_fails_or_wins_whole(folder: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.replacing(folder):
        tiny_model(1).save_pretrained(folder)
    assert savers.which(folder) == 1
    assert os.listdir(folder.parent) == ["fused"]


def test_an_interrupt_between_the_two_renames_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, to: Path) -> None:
        os.rename(path, to)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny_model(1).save_pretrained(folder)
    assert not folder.exists()
    assert savers.which(folder) == 1
    tiny_model(0).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert os.listdir(folder.parent) == ["fused"]


def test_a_rename_that_fails_is_undone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def stubborn(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "the disk is broken")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(mt.errors.CheckpointError, match=r"which is as it was: .*the disk is broken"):
        tiny_model(1).save_pretrained(folder)
    assert savers.which(folder) == 0
    assert os.listdir(folder.parent) == ["fused"]


def test_all_is_flushed_before_it_is_renamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, rename = os.fsync, Path.rename

    def seen(handle: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        flush(handle)

    def renamed(path: Path, to: Path) -> Path:
        if path == folder:
            new = to.with_name("new")
            written = {str(each) for each in (new.parent, new, *new.rglob("*"))}
            assert written <= set(events)
            assert str(new / "towers/speech/model.safetensors") in written
        events.append(path.name)
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(Path, "rename", renamed)
    tiny_model(1).save_pretrained(folder)
    assert events[events.index("fused") :] == ["fused", "new", str(folder.parent)]


def test_a_link_to_a_checkpoint_stays_a_link(folder: Path) -> None:
    latest = folder.parent / "latest"
    latest.symlink_to("fused")
    tiny_model(1).save_pretrained(latest)
    assert latest.is_symlink()
    assert savers.which(folder) == 1
