"""The command line: ``multitower modalities``, ``multitower new-modality`` and ``multitower verify``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..base.version import __version__
from ..checkpoint.manifest import open_checkpoint
from ..errors import CheckpointError
from ..plugins.entry_points import MODALITIES, TOWERS, Plugin, installed
from ..storage.find import find_checkpoint
from ..storage.integrity import check_files
from .new_modality import new_modality


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status.

    >>> main(["modalities"])                            # doctest: +SKIP
    modality       package     version  accepts
    speech         multitower  0.1.0    str, PathLike, bytes, ndarray, Tensor, tuple
    speech_codec   multitower  0.1.0    str, PathLike, bytes, ndarray, Tensor, tuple
    speech_hubert  multitower  0.1.0    str, PathLike, bytes, ndarray, Tensor, tuple
    text           multitower  0.1.0    str
    <BLANKLINE>
    no installed package offers a tower loader
    0

    Args:
        arguments: Those after the name of the program; of this process unless they are given.

    Raises:
        SystemExit: The arguments are wrong, or only help was asked for.
    """
    parser = argparse.ArgumentParser(
        prog="multitower", description="Fuse pretrained decoders into one model."
    )
    parser.add_argument("--version", action="version", version=f"multitower {__version__}")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("modalities", help="list the modalities and tower loaders of installed packages")
    new = commands.add_parser("new-modality", help="write a small package with a modality, to start from")
    new.add_argument("name", help="what kind of data it is, in lower case, as in: smell")
    new.add_argument("--folder", type=Path, help="where to write it (default: multitower-NAME)")
    check = commands.add_parser(
        "verify", help="read every byte of a checkpoint, and compare it with its checksum"
    )
    check.add_argument("folder", help="the checkpoint, or its id on the Hub")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command == "modalities":
        print(_table("modality", "accepts", installed(MODALITIES), _accepts))
        print()
        print(_table("tower loader", "for sources", installed(TOWERS), _source))
        return 0
    if options.command == "verify":
        return _verify(options.folder)
    try:
        folder = new_modality(options.name, options.folder)
    except (ValueError, OSError) as error:
        new.error(str(error))
    print(f"wrote {folder}; next: cd {shlex.quote(str(folder))} && pip install -e '.[dev]' && pytest")
    return 0


def _verify(folder: str) -> int:
    try:
        checkpoint = open_checkpoint(find_checkpoint(folder))
        checkpoint.check(checkpoint.records, links=True, verify=True)
        check_files(checkpoint.root, checkpoint.files, ("modalities/",), verify=True)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{checkpoint.root} is as it was saved, every byte of {len(checkpoint.files)} files")
    records = checkpoint.records.items()
    if others := [name for name, record in records if not record.get("embedded", True)]:
        print(f"not in it, and compared by from_pretrained(folder, verify=True): {', '.join(others)}")
    return 0


def _table(kind: str, heading: str, plugins: Sequence[Plugin], offer: Callable[[Plugin], str]) -> str:
    """Show plugins in columns, the broken ones with the reason."""
    if not plugins:
        return f"no installed package offers a {kind}"
    rows = [(kind, "package", "version", heading)]
    for plugin in plugins:
        last = offer(plugin) if plugin.error is None else f"cannot be used: {' '.join(plugin.error.split())}"
        rows.append((plugin.name, plugin.package, plugin.version, last))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]])
        for row in rows
    )


def _accepts(plugin: Plugin) -> str:
    accepts = getattr(plugin.value, "accepts", None)
    if not isinstance(accepts, tuple):
        return "(its class does not say)"
    return ", ".join(getattr(kind, "__name__", repr(kind)) for kind in accepts)


def _source(plugin: Plugin) -> str:
    return f"{plugin.name}://..."
