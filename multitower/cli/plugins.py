"""Commands about plugins: which are installed, and a package to start one from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from ..base.extras import require
from ..plugins.entry_points import MODALITIES, TOWERS, Plugin, installed
from .arguments import JsonOption
from .new_modality import new_modality as write_package

typer: Any = require("typer", "cli")


def modalities(as_json: JsonOption = False) -> None:
    """List the modalities and tower loaders of installed packages."""
    kinds = (("modality", "accepts", MODALITIES, _accepts), ("tower loader", "for sources", TOWERS, _source))
    if as_json:
        found = {
            kind: [
                {"name": each.name, "package": each.package, "version": each.version, "error": each.error}
                for each in installed(group)
            ]
            for kind, _, group, _ in kinds
        }
        print(json.dumps(found, indent=2))
        return
    print(
        "\n\n".join(_table(kind, heading, installed(group), offer) for kind, heading, group, offer in kinds)
    )


def new_modality(
    name: Annotated[
        str, typer.Argument(help="What kind of data it is, in lower case, as in: smell", show_default=False)
    ],
    folder: Annotated[
        Path | None,
        typer.Option(help="Where to write it (default: multitower-NAME).", show_default=False),
    ] = None,
) -> None:
    """Create a small package with a modality, to start from."""
    written = write_package(name, folder)
    print(f"wrote {written}; next: cd {shlex.quote(str(written))} && pip install -e '.[dev]' && pytest")


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
