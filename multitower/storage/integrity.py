"""What ``fusion.json`` says of the files of a checkpoint and of itself, so that no change goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError
from .atomic import current
from .files import FUSION, check_inside, read_json

DIGEST, FILES = "digest", "files"
SEALED = (2,)
"""The versions of the format that have a seal as it is here; what reads one that is newer is to say so."""

Loaded = TypeVar("Loaded")


def write_sealed(folder: Path, document: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Write ``fusion.json``, with the SHA-256 of each file of a checkpoint and of itself.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "links.safetensors").write_text("links")
    ...     write_sealed(Path(folder), {"format_version": 2}, ("links.safetensors",))
    ...     [*read_sealed(Path(folder))["files"]]
    ['links.safetensors']

    Args:
        folder: The checkpoint; all its other files are there.
        document: What else ``fusion.json`` says.
        parts: The files and folders that are the checkpoint's; others, as a README, are not sealed.
    """
    files = {name: _sha256(folder / name) for name in _files_of(folder, parts)}
    sealed = {**document, FILES: files}
    sealed[DIGEST] = _digest(sealed)
    (folder / FUSION).write_text(json.dumps(sealed, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_sealed(folder: Path) -> dict[str, Any]:
    """Read ``fusion.json``, whose digest has to be right; no file of the checkpoint may lie outside of it.

    Raises:
        CheckpointError: It is missing, damaged or changed; or a link leads out of the checkpoint.
    """
    check_inside(folder)
    document, file = read_json(folder / FUSION), folder / FUSION
    if document.get("format_version") not in SEALED:
        return document
    if document.get(DIGEST) != _digest(document):
        raise CheckpointError(
            f"{file} is damaged: it is not as it was saved (its digest differs). To take a tower from "
            "elsewhere, give towers={...}; else copy the checkpoint anew"
        )
    if not isinstance(document.get(FILES), dict):
        raise CheckpointError(f"{file} is damaged: it does not say which files the checkpoint has")
    return document


def check_files(folder: Path, document: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Check that files and folders of a checkpoint are as they were saved, and nothing has been added.

    Args:
        folder: The checkpoint.
        document: What ``read_sealed`` gave.
        parts: The files and folders, relative to the checkpoint.

    Raises:
        CheckpointError: A file is missing, changed or added; all are listed.
    """
    if FILES not in document:
        return  # of an older version
    parts = list(parts)
    listed = {
        name: digest
        for name, digest in document[FILES].items()
        if any(name == part or name.startswith(f"{part}/") for part in parts)
    }
    found = set(_files_of(folder, parts))
    problems = [f"missing: {name}" for name in listed if name not in found]
    problems += [f"unexpected: {name}" for name in sorted(found - set(listed))]
    problems += [
        f"damaged: {name}"
        for name, digest in listed.items()
        if name in found and _sha256(folder / name) != digest
    ]
    if problems:
        raise CheckpointError(
            f"{folder} is not as it was saved; was it wholly copied?\n  " + "\n  ".join(problems)
        )


def steadily(folder: Path, load: Callable[[Path], Loaded], *, again: bool = True) -> Loaded:
    """Load a checkpoint that others may replace at the same time; return one of them, never a mixture.

    Args:
        folder: The checkpoint.
        load: Loads it from the folder where it is found.
        again: Whether it may be called again, when the checkpoint was replaced while it ran.

    Raises:
        CheckpointError: The checkpoint was replaced again and again.
    """
    for _ in range(10 if again else 1):
        root = current(folder)
        with _kept_open(root / FUSION) as before:
            try:
                loaded = load(root)
            except (CheckpointError, OSError):
                if _is_still(before, current(folder) / FUSION):
                    raise
                continue
            if _is_still(before, current(folder) / FUSION):
                return loaded
    raise CheckpointError(f"{folder} was replaced by another checkpoint while it was read; load it again")


@contextmanager
def _kept_open(file: Path) -> Iterator[os.stat_result | None]:
    """Return which file this is. While it is open, no other can be given its number."""
    try:
        stream = file.open("rb") if file.is_file() else None  # a pipe would wait
    except OSError:
        stream = None
    if stream is None:
        yield None
        return
    with stream:
        yield os.fstat(stream.fileno())


def _is_still(before: os.stat_result | None, file: Path) -> bool:
    try:
        now = file.stat() if file.is_file() else None
    except OSError:
        now = None
    return now is before if now is None or before is None else os.path.samestat(before, now)


def _digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all that a document says beside its digest."""
    rest = {key: value for key, value in document.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _files_of(folder: Path, parts: Iterable[str]) -> list[str]:
    found = []
    for part in parts:
        place = folder / part
        files = [place] if place.is_file() else (path for path in place.rglob("*") if not path.is_dir())
        found += [path.relative_to(folder).as_posix() for path in files]
    return sorted(found)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
