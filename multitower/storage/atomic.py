"""A folder that is replaced as a whole, or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

NEW, OLD = "new", "old"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Return an empty folder to fill; it takes the place of another when all that is in it has been written.

    >>> with tempfile.TemporaryDirectory() as place:
    ...     target = Path(place, "poem")
    ...     for line in ("Roses are red", "Violets are blue"):
    ...         with replacing(target) as fresh:
    ...             _ = (fresh / "line").write_text(line)
    ...     (target / "line").read_text(), os.listdir(place)
    ('Violets are blue', ['poem'])

    The folder is ``.<name>.saving-<random>/new`` beside the target, so on the same disk. When it is filled
    and flushed to the disk, the old one is moved to ``old`` beside it, ``new`` to the target, and ``old``
    removed. A process that is killed between the two leaves both, and nothing at the target: ``current`` then
    finds ``new``, which is whole, and the next save moves it in. One process saves to a target at a time: a
    save removes what others have left, so that one that is still at work fails.
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


def check_free(target: Path, index: str) -> None:
    """Check that a folder can be replaced: it is new, empty, or holds the file that says what it is."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder to save to")
    if target.exists() and any(target.iterdir()) and not (target / index).exists():
        raise CheckpointError(f"{target} is not empty and holds no {index}; save to a folder of its own")


def current(target: Path) -> Path:
    """Return the folder that holds what ``replacing`` put at a path, also where that was killed halfway."""
    if target.exists():
        return target
    halfway = (left / NEW for left in _scratches(target.resolve()) if (left / OLD).exists())
    return next((new for new in halfway if new.exists()), target)


def _scratches(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.saving-*"))


def _flush(folder: Path) -> None:
    """Wait until a folder and all that is in it are on the disk."""
    for place, _, files in os.walk(folder):
        for path in (*(os.path.join(place, file) for file in files), place):
            if not os.path.islink(path):
                _sync(path)


def _sync(path: str | os.PathLike[str]) -> None:
    if os.name == "nt":
        return  # there a folder cannot be flushed, nor a file that is open to be read only
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
