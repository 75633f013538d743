"""A small package with a modality, for the author of one to start from."""

from __future__ import annotations

import keyword
import os
import re
import tempfile
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from ..base.version import __version__
from ..plugins.entry_points import MODALITIES

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")

TEMPLATE = Path(__file__).with_name("template")
"""A package that works as it is, whose modality is called octets."""


def new_modality(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    r"""Write a package with a modality that works, and passes its own tests, to start from.

    Args:
        name: The name of the modality: letters a-z, digits and single underscores.
        folder: Where to write it; there must be nothing yet. ``multitower-NAME`` unless it is given.
    """
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
        for file in (*TEMPLATE.glob("[!.]*.*"), *TEMPLATE.glob("*/*.py")):  # not what running it leaves
            copy = Path(work, "new", _renamed(file.relative_to(TEMPLATE).as_posix(), name))
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_renamed(file.read_text(encoding="utf-8"), name), encoding="utf-8")
        Path(work, "new").rename(target)
    return target


def _renamed(text: str, name: str) -> str:
    """Return a text, or a path, of the template as it is in the package of another modality."""
    values = {
        "multitower-octets": f"multitower-{name.replace('_', '-')}",
        "multitower>=0": f"multitower>={__version__}",
        "Octets": "".join(part.capitalize() for part in name.split("_")),
        "octets": name,
    }
    return re.sub("|".join(values), lambda found: values[found[0]], text)
