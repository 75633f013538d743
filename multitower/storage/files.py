"""Read and write ``fusion.json``, and check the files of an untrusted checkpoint against it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.version import __version__
from ..errors import CheckpointError

FUSION = "fusion.json"
"""The manifest of a checkpoint."""
LARGEST_JSON = 1 << 24
"""Maximum size of a JSON file in a checkpoint, in bytes."""
FORMAT_VERSION = 1
DIGEST, FILES = "digest", "files"
SMALL, BLOCK, BLOCKS = 1 << 22, 1 << 12, 64
"""Files of up to SMALL bytes are always hashed in full; of larger ones, BLOCKS blocks of BLOCK bytes."""
PART = re.compile(r"(links(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|towers|modalities)(/.*)?")

Files = dict[str, dict[str, Any]]
"""By path, ``{"bytes", "sha256", "sample"}``; "sample" is the hash of some blocks of the file."""


def is_part(name: str) -> bool:
    """Whether a path in a checkpoint's folder belongs to the checkpoint; anything else is the user's."""
    return PART.fullmatch(name) is not None


def write_manifest(folder: Path, document: Mapping[str, Any]) -> None:
    """Write ``fusion.json`` with the size and checksums of every file, and its own digest."""
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": _sha256(folder / name),
            "sample": _sampled(folder / name),
        }
        for name in _parts(folder)
    }
    manifest = {"format_version": FORMAT_VERSION, "multitower": __version__, **document, FILES: files}
    manifest[DIGEST] = _digest(manifest)
    (folder / FUSION).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read ``fusion.json`` and check its digest; refuse a checkpoint with links to files outside of it."""
    check_inside(folder)
    document, file = read_json(folder / FUSION), folder / FUSION
    version, release = document.get("format_version"), document.get("multitower")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file} is damaged: {version!r} is no version of the format")
    if version > FORMAT_VERSION:
        wanted = f"'multitower>={release}'" if isinstance(release, str) else "multitower"
        raise CheckpointError(
            f"{file} has format version {version}, and this release reads up to {FORMAT_VERSION}; upgrade "
            f"multitower: pip install -U {wanted}"
        )
    if document.get(DIGEST) != _digest(document):
        raise CheckpointError(
            f"{file} is damaged: it is not as it was saved (its digest differs). To take a tower from "
            "elsewhere, give towers={...}; else copy the checkpoint anew"
        )
    files = document.get(FILES)
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise CheckpointError(f"{file} is damaged: it does not say which files the checkpoint has")
    return document


def check_files(folder: Path, files: Files, parts: tuple[str, ...], *, verify: bool) -> None:
    """Check the files whose paths start with one of ``parts``: unchanged, none missing, none unexpected.

    For large files, only the size and a sample are compared, unless ``verify`` is set.
    """
    found = [name for name in _parts(folder) if name.startswith(parts)]
    problems = [f"missing: {name}" for name in files if name.startswith(parts) and name not in found]
    for name in found:
        if name not in files:
            problems.append(f"unexpected: {name}")
            continue
        size = (folder / name).stat().st_size
        if size != files[name]["bytes"]:
            problems.append(f"damaged: {name} has {size} bytes, not {files[name]['bytes']}")
        elif verify or size <= SMALL:
            problems += [f"damaged: {name}"] * (_sha256(folder / name) != files[name]["sha256"])
        else:
            problems += [f"damaged: {name}"] * (_sampled(folder / name) != files[name]["sample"])
    if problems:
        raise CheckpointError(
            f"{folder} is not as it was saved; was it wholly copied?\n  " + "\n  ".join(problems)
        )


def _parts(folder: Path) -> list[str]:
    """List the files of a checkpoint, except the manifest."""
    tops = [top for top in folder.iterdir() if is_part(top.name)]
    files = (path for top in tops for path in ([top] if top.is_file() else top.rglob("*")))
    return sorted(path.relative_to(folder).as_posix() for path in files if not path.is_dir())


def _is_entry(found: Any) -> bool:
    kinds = {"bytes": int, "sha256": str, "sample": str}
    return isinstance(found, dict) and all(type(found.get(key)) is kind for key, kind in kinds.items())


def _digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a document without its digest."""
    rest = {key: value for key, value in document.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sampled(file: Path) -> str:
    """Return the SHA-256 of blocks evenly spaced over a file, from its first to its last byte."""
    digest, last = hashlib.sha256(), max(file.stat().st_size - BLOCK, 0)
    with file.open("rb", buffering=0) as stream:
        for place in range(BLOCKS):
            stream.seek(last * place // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of at most ``LARGEST_JSON`` bytes, without duplicate keys, NaN or infinities."""
    try:
        if file.is_file() and file.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{file} is damaged: it has more than {LARGEST_JSON} bytes")
        data = json.loads(
            file.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_such_number
        )
    except FileNotFoundError as error:
        inside = ", ".join(str(each.parent) for each in sorted(file.parent.glob(f"*/{file.name}"))[:3])
        hint = f" There is {inside}" if inside else ""
        raise CheckpointError(
            f"{file} is missing; is {file.parent} a fused checkpoint, wholly copied?{hint}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is damaged: expected a JSON object")
    return data


def check_inside(folder: Path) -> None:
    """Check that a checkpoint consists of plain files and folders, without symbolic links.

    The only links allowed are those of the Hub's cache, from ``snapshots/<revision>`` to ``blobs``. Other
    files in the folder are never read and not checked.
    """
    root = folder.resolve()
    blobs = [place.parent / "blobs" for place in root.parents if place.name == "snapshots"]
    for place, folders, files in os.walk(root):
        if Path(place) == root:
            folders[:], files = _own(folders), _own(files)
        for entry in (Path(place, name) for name in (*folders, *files)):
            try:
                real = entry.resolve(strict=True)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"{entry} is a link that leads nowhere: {error}") from error
            if entry.is_symlink() and not (real.parent in blobs and real.is_file()):
                raise CheckpointError(
                    f"{entry} is a link to {real}, and none is followed; put a copy in its place"
                )
            if not (real.is_file() or real.is_dir()):
                raise CheckpointError(f"{entry} is neither a file nor a folder")


def _own(names: list[str]) -> list[str]:
    return [
        name for name in names if name in ("towers", "modalities") or name.endswith((".json", ".safetensors"))
    ]


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return data


def _no_such_number(name: str) -> float:
    raise ValueError(f"{name} is no number")
