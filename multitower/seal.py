"""What ``fusion.json`` says of the files of a checkpoint and of itself, so that no change goes unnoticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .atomic import current
from .files import FUSION, CheckpointError, check_inside, read_json

DIGEST, FILES = "digest", "files"
FORMAT_VERSION = 2
"""Which version of the format is written."""
SEALED_SINCE = 2
"""The first version that has a seal."""

Loaded = TypeVar("Loaded")


def write_sealed(folder: Path, document: Mapping[str, Any], parts: tuple[str, ...]) -> None:
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
        CheckpointError: It is missing, damaged, changed or of a newer format; or a link leads out of the
            checkpoint.
    """
    check_inside(folder)
    document, file = read_json(folder / FUSION), folder / FUSION
    version = document.get("format_version")
    if type(version) is not int or not 0 < version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version!r}; this release reads up to {FORMAT_VERSION}: "
            "upgrade multitower"
        )
    must = version >= SEALED_SINCE
    if (must or DIGEST in document) and document.get(DIGEST) != _digest(document):
        raise CheckpointError(
            f"{file} is damaged: it is not as it was saved (its digest differs). To take a tower from "
            "elsewhere, give towers={...}; else copy the checkpoint anew"
        )
    files = document.get(FILES, {})
    if not (isinstance(files, dict) and (FILES in document or not must)):
        raise CheckpointError(f"{file} is damaged: it does not say which files the checkpoint has")
    return document


def check_files(folder: Path, document: Mapping[str, Any], part: str) -> None:
    """Check that a file or folder of a checkpoint is as it was saved, and that nothing has been added to it.

    Args:
        folder: The checkpoint.
        document: What ``read_sealed`` gave.
        part: The file or folder, relative to the checkpoint.

    Raises:
        CheckpointError: A file is missing, changed or added; all are listed.
    """
    if FILES not in document:
        return  # of an older version
    listed = {name: digest for name, digest in document[FILES].items() if _is_in(name, part)}
    found = set(_files_of(folder, (part,)))
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
    """Load a checkpoint that others may replace at the same time; give one of them, never a mixture.

    Args:
        folder: The checkpoint.
        load: Loads it from the folder where it is found.
        again: Whether it may be called again, when the checkpoint was replaced while it ran.

    Raises:
        CheckpointError: The checkpoint was replaced again and again.
    """
    for _ in range(10 if again else 1):
        root = current(folder)
        before = _stamp(root)
        try:
            loaded = load(root)
        except (CheckpointError, OSError):
            if _stamp(current(folder)) == before:
                raise
            continue
        if _stamp(current(folder)) == before:
            return loaded
    raise CheckpointError(f"{folder} was replaced by another checkpoint while it was read; load it again")


def _stamp(folder: Path) -> bytes | None:
    try:
        return (folder / FUSION).read_bytes()
    except OSError:
        return None


def _digest(document: Mapping[str, Any]) -> str:
    """Give the SHA-256 of all that a document says beside its digest."""
    rest = {key: value for key, value in document.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _files_of(folder: Path, parts: tuple[str, ...]) -> list[str]:
    found = []
    for part in parts:
        place = folder / part
        files = [place] if place.is_file() else (path for path in place.rglob("*") if not path.is_dir())
        found += [path.relative_to(folder).as_posix() for path in files]
    return sorted(found)


def _is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}/")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
