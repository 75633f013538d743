"""A small package with a modality, for the author of one to start from."""

from __future__ import annotations

import keyword
import os
import re
import tempfile
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from string import Template

from ..base.version import __version__
from ..plugins.entry_points import MODALITIES

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "$package"
version = "0.1.0"
description = "The modality $name for multitower."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["multitower>=$version"]

[project.optional-dependencies]
dev = ["pytest>=8.3"]

[project.entry-points."multitower.modalities"]
$name = "$module:$class_name"

[tool.pytest.ini_options]
testpaths = ["tests", "$module"]
pythonpath = ["."]
addopts = ["--doctest-modules"]
"""

README = """\
# $package

The modality `$name` for multitower.

    pip install -e '.[dev]' && pytest
    multitower modalities

The second command lists `$name` as soon as this package is installed.

## Make it yours

As it was generated, `$name` is bytes: 256 tokens, and two that begin and end.

1. In `$module/modality.py`, let `encode` and `decode` do what your data need; set `accepts` and
   `vocab_size`. `decode` meets what no encoder would write: drop what means nothing.
2. What the modality has to remember, give in `config()` as JSON and in `tensors()`; `__init__` is then
   called with both, by name, when it is loaded. Saving and loading come by themselves.
3. In `tests/test_$name.py`, give samples of your data. `check_modality` says what is broken. Where decoding
   does not bring back exactly what was encoded, declare how much may be lost with `round_trip=`.
"""

INIT = '''\
"""The modality $name for multitower."""

from .modality import $class_name

__all__ = ["$class_name"]
'''

MODALITY = '''\
"""The codec between bytes and tokens."""

import multitower as mt
import torch
from multitower.plugins import check_tokens


class $class_name(mt.Modality):
    """Bytes to tokens, and back.

    >>> $name = $class_name()
    >>> $name.encode(b"hi")
    tensor([256, 104, 105, 257])
    >>> $name.decode($name.encode(b"hi"))
    b'hi'
    """

    name = "$name"
    accepts = (bytes,)
    vocab_size = 258
    begin = 256
    end = 257

    def encode(self, raw: bytes) -> torch.Tensor:
        """Return the tokens of bytes: int64, shape (length,), begin and end included."""
        if not isinstance(raw, bytes):
            raise TypeError(f"$name is encoded from bytes, not from {type(raw).__name__}")
        return torch.tensor([self.begin, *raw, self.end])

    def decode(self, tokens: torch.Tensor) -> bytes:
        """Return the bytes of tokens of shape (length,); what is no byte is dropped."""
        return bytes(token for token in check_tokens(tokens) if token < 256)
'''

TEST = '''\
"""The modality $name keeps what modalities promise."""

import pytest
import torch
from multitower.testing import check_modality

from $module import $class_name


def test_promises():
    check_modality($class_name(), [b"", b"hello", bytes(range(256))])


def test_tokens():
    assert $class_name().encode(b"hi").tolist() == [256, 104, 105, 257]


def test_what_means_nothing_is_dropped():
    assert $class_name().decode(torch.tensor([104, 256, 105, 9_999])) == b"hi"


def test_other_data_are_refused():
    with pytest.raises(TypeError, match="from bytes, not from str"):
        $class_name().encode("hi")
'''


def new_modality(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    r"""Write a package with a modality that works, and passes its own tests, to start from.

    >>> with tempfile.TemporaryDirectory() as place:
    ...     folder = new_modality("smell", Path(place) / "multitower-smell")
    ...     print(*sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.*")), sep="\n")
    README.md
    multitower_smell/__init__.py
    multitower_smell/modality.py
    pyproject.toml
    tests/test_smell.py

    Args:
        name: The name of the modality: letters a-z, digits and single underscores.
        folder: Where to write it; there must be nothing yet. ``multitower-NAME`` unless it is given.

    Raises:
        ValueError: The name cannot be one, or an installed package has it; nothing is written.
        FileExistsError: There is something where the folder should be.
        FileNotFoundError: The folder that it should be in is missing.
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
        for path, text in _files(name, module).items():
            file = Path(work, "new", path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        Path(work, "new").rename(target)
    return target


def _files(name: str, module: str) -> dict[str, str]:
    """Return the text of each file of the package."""
    values = {
        "name": name,
        "version": __version__,
        "module": module,
        "package": module.replace("_", "-"),
        "class_name": "".join(part.capitalize() for part in name.split("_")) + "Modality",
    }
    templates = {
        "pyproject.toml": PYPROJECT,
        "README.md": README,
        f"{module}/__init__.py": INIT,
        f"{module}/modality.py": MODALITY,
        f"tests/test_{name}.py": TEST,
    }
    return {path: Template(text).substitute(values) for path, text in templates.items()}
