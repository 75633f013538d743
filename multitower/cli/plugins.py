"""Commands for plugins: list those installed, and create a package for a new modality."""

from __future__ import annotations

import json
import keyword
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from ..base.extras import require
from ..base.version import __version__
from ..plugins.entry_points import MODALITIES, TOWERS, Plugin, installed
from .arguments import JsonOption

typer: Any = require("typer", "cli")

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")

TEMPLATE = Path(__file__).with_name("template")
"""A working package with a modality named octets."""


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
    module = f"multitower_{name}"
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValueError(
            f"{name!r} cannot be the name of a modality: give letters a-z, digits and single underscores, "
            "a letter first, no keyword of Python, as in 'smell' or 'brain_waves'"
        )
    for entry in entry_points(group=MODALITIES, name=name):
        owner = entry.dist.name if entry.dist else entry.value
        raise ValueError(f"the modality {name!r} is that of {owner}, which is installed: choose another name")
    if find_spec(module) is not None:
        raise ValueError(f"there is a module {module} already: choose another name")
    target = Path(module.replace("_", "-") if folder is None else folder)
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} is there already: remove it, or give another folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder: make it first, or give another folder")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".multitower-") as work:
        for file in (*TEMPLATE.glob("[!.]*.*"), *TEMPLATE.glob("*/*.py")):  # without caches
            copy = Path(work, "new", _renamed(file.relative_to(TEMPLATE).as_posix(), name))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_renamed(file.read_text(encoding="utf-8"), name), encoding="utf-8")
        Path(work, "new").rename(target)
    print(f"wrote {target}; next: cd {shlex.quote(str(target))} && pip install -e '.[dev]' && pytest")


def _renamed(text: str, name: str) -> str:
    """Replace the modality's name in a text or path of the template."""
    values = {
        "multitower-octets": f"multitower-{name.replace('_', '-')}",
        "multitower>=0": f"multitower>={__version__}",
        "Octets": "".join(part.capitalize() for part in name.split("_")),
        "octets": name,
    }
    return re.sub("|".join(values), lambda found: values[found[0]], text)


def _table(kind: str, heading: str, plugins: Sequence[Plugin], offer: Callable[[Plugin], str]) -> str:
    """Format plugins as a table; broken ones show the reason."""
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
