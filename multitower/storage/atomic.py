"""Atomic replacement of a folder."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

NEW, OLD = "new", "old"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder; on exit it atomically replaces the target.

    >>> with tempfile.TemporaryDirectory() as place:
    ...     target = Path(place, "poem")
    ...     for line in ("Roses are red", "Violets are blue"):
    ...         with replacing(target) as fresh:
    ...             _ = (fresh / "line").write_text(line)
    ...     (target / "line").read_text(), os.listdir(place)
    ('Violets are blue', ['poem'])

    The folder is ``.<name>.saving-<random>/new`` beside the target, hence on the same file system. After it
    is flushed to disk, the target is renamed to ``old`` beside it, ``new`` is renamed to the target, and
    ``old`` is removed. If the process is killed between the two renames, both folders remain and the target
    is missing: ``current`` then returns ``new``, which is complete, and the next save moves it into place.
    Only one process may save to a target at a time: a save removes the temporary folders of others.
    """
    target = target.resolve()
    if (halfway := current(target)) != target:
        halfway.rename(target)
    for left in _scratches(target):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
    new, old = scratch / NEW, scratch / OLD
    try:
        new.mkdir()
        yield new
        _flush(scratch)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        _sync(target.parent)
    finally:
        if target.exists() or not old.exists():
            shutil.rmtree(scratch, ignore_errors=True)


def copy_others(old: Path, new: Path, replaced: Callable[[str], bool]) -> None:
    """Copy the entries of a folder, if it exists, whose names are not ``replaced``, such as a README."""
    for entry in old.iterdir() if old.exists() else ():
        if replaced(entry.name):
            continue
        if entry.is_dir():
            shutil.copytree(entry, new / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, new / entry.name, follow_symlinks=False)


def check_free(target: Path, index: str) -> None:
    """Raise unless a folder may be replaced.

    It must not exist, be empty, or contain the file ``index``; and it must not be the working directory or
    one above it, which would then be gone.
    """
    if target.exists() and target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise CheckpointError(f"{target} is the working directory, or above it; save to a folder inside it")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder to save to")
    if target.exists() and any(target.iterdir()) and not (target / index).exists():
        raise CheckpointError(f"{target} is not empty and contains no {index}; save to a folder of its own")


def current(target: Path) -> Path:
    """Return the folder with the data that ``replacing`` wrote to a path, even if it was killed halfway."""
    if target.exists():
        return target
    halfway = (left / NEW for left in _scratches(target.resolve()) if (left / OLD).exists())
    return next((new for new in halfway if new.exists()), target)


def _scratches(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.saving-*"))


def _flush(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for place, _, files in os.walk(folder):
        for path in (*(os.path.join(place, file) for file in files), place):
            if not os.path.islink(path):
                _sync(path)


def _sync(path: str | os.PathLike[str]) -> None:
    if os.name == "nt":
        return  # Windows cannot flush folders or files opened read-only
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
