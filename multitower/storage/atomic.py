"""A folder that is replaced as a whole, or not at all."""

from __future__ import annotations

import ctypes
import errno
import functools
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, NEW, OLD = "lock", "new", "old"
AT_FDCWD, RENAME_EXCHANGE = -100, 2
ROUNDS = 1000


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

    The folder is ``.<name>.saving-<random>/new`` beside the target, so on the same disk. When it is filled,
    every file and folder in it is flushed to the disk; then the two folders exchange their names in one step,
    where the system can do that (Linux, on local disks). Elsewhere the old one is moved away, to ``old``
    beside ``new``, and ``new`` moved in. A process that is killed between the two leaves nothing at the
    target, but ``old`` and ``new`` side by side, and then ``new`` is whole: ``current`` finds it there, and
    the next save begins by moving it in.

    Of several processes that replace one folder at the same time the last one wins, whole. Each holds a lock
    in its folder while it lives; what others have left behind when they were killed is removed.

    Args:
        target: A path whose parent exists. Where it is a link to a folder, that folder is replaced.

    Raises:
        OSError: A file cannot be written or a folder not be renamed; the target is as it was.
    """
    target = target.resolve()
    finish(target)
    scratch, lock = _scratch(target)
    try:
        fresh = scratch / NEW
        fresh.mkdir()
        yield fresh
        _flush(fresh)
        _swap(fresh, target)
        _sync(target.parent)
    finally:
        if target.exists() or not _is_halfway(scratch):
            shutil.rmtree(scratch, ignore_errors=True)
        lock.release()
    _clean(target)


def current(target: Path) -> Path:
    """Return the folder that holds what ``replacing`` put at a path, also where that was killed halfway.

    >>> current(Path("nowhere")).name
    'nowhere'
    """
    halves = [] if target.exists() else _halfway(target.resolve())
    return halves[0] / NEW if halves else target


def finish(target: Path) -> None:
    """Do what is left to do where ``replacing`` was killed between its two renames."""
    for scratch in [] if target.exists() else _halfway(target):
        with _held(scratch) as free:
            if free and not target.exists():
                (scratch / NEW).rename(target)


def _scratch(target: Path) -> tuple[Path, FileLock]:
    """Make a folder beside the target, and lock it as in use."""
    for _ in range(ROUNDS):
        scratch = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        lock = FileLock(scratch / LOCK)
        try:
            lock.acquire(blocking=False)
        except (Timeout, FileNotFoundError):  # a cleaner took it for one of the dead
            continue
        if scratch.exists():
            return scratch, lock
        lock.release()
    raise OSError(errno.EBUSY, "others keep removing the folder to save to", str(target))


def _swap(fresh: Path, target: Path) -> None:
    for attempt in range(ROUNDS):
        if _exchange(fresh, target):
            return
        aside = fresh.with_name(f"{OLD}{attempt}")
        with suppress(FileNotFoundError):
            target.rename(aside)
        try:
            fresh.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another saver was faster
                continue
            if aside.exists():
                aside.rename(target)
            raise
        return
    raise OSError(errno.EBUSY, "others keep replacing it", str(target))


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders exchange their names in one step; return whether that was possible."""
    rename = _renameat2()
    return rename is not None and not rename(
        AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE
    )


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old one
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function


def _flush(folder: Path) -> None:
    """Wait until a folder and all that is in it are on the disk."""
    for place, _, files in os.walk(folder):
        for file in files:
            if not os.path.islink(os.path.join(place, file)):
                _sync(os.path.join(place, file))
        _sync(place)
    _sync(folder.parent)


def _sync(path: str | os.PathLike[str]) -> None:
    if os.name == "nt" and os.path.isdir(path):
        return  # there a folder cannot be flushed, and need not be
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prefix(target: Path) -> str:
    return f".{target.name}.saving-"


def _leftovers(target: Path) -> list[Path]:
    return sorted(target.parent.glob(glob.escape(_prefix(target)) + "*"))


def _halfway(target: Path) -> list[Path]:
    return [scratch for scratch in _leftovers(target) if _is_halfway(scratch)]


def _is_halfway(scratch: Path) -> bool:
    """Return whether the old one has been moved away and the new one not yet moved in."""
    return any(scratch.glob(f"{OLD}*")) and (scratch / NEW).is_dir()


def _clean(target: Path) -> None:
    """Remove what killed processes have left."""
    for scratch in _leftovers(target):
        with _held(scratch) as free:
            if free:
                shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _held(scratch: Path) -> Iterator[bool]:
    """Hold the lock of a folder; return whether that was possible, since its owner is dead."""
    lock = FileLock(scratch / LOCK)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
