"""From what older releases wrote in ``fusion.json`` to what this one reads: a function for each version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError
from ..storage.fingerprint import SAMPLED
from .layout import FORMAT_VERSION

Document = dict[str, Any]


def migrated(document: Mapping[str, Any], file: object) -> Document:
    """Return what ``fusion.json`` says, as the newest version of the format says it.

    >>> migrated({"format_version": 99, "multitower": "7.0"}, "fusion.json")
    Traceback (most recent call last):
    multitower.errors.CheckpointError: fusion.json has format version 99, ...: pip install ...

    Args:
        document: What the file says.
        file: The file, for errors.

    Raises:
        CheckpointError: The version is newer than this release, or none; or the document is damaged.
    """
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{file} is damaged: {version!r} is no version of the format")
    if version > FORMAT_VERSION:
        release = document.get("multitower")
        wanted = f"'multitower>={release}'" if isinstance(release, str) else "multitower"
        raise CheckpointError(
            f"{file} has format version {version}, and this release reads up to {FORMAT_VERSION}; upgrade "
            f"multitower: pip install -U {wanted}"
        )
    newest = dict(document)
    try:
        for old in range(version, FORMAT_VERSION):
            newest = {**MIGRATIONS[old](newest), "format_version": old + 1}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
    return newest


def _from_1(document: Document) -> Document:
    """Version 1 had fingerprints of some values, and did not say which tensors and taps there are."""
    towers = {}
    for name, old in document["towers"].items():
        record = dict(old)
        if "fingerprint" in record:
            record["fingerprint"] = SAMPLED + record["fingerprint"]
        if "adapters" in record:
            record["adapters"] = {key: SAMPLED + value for key, value in record["adapters"].items()}
        towers[name] = record
    return {"modalities": {}, **document, "towers": towers, "tensors": None, "schedule": None}


MIGRATIONS: Mapping[int, Callable[[Document], Document]] = {1: _from_1}
