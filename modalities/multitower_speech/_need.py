"""Import the optional dependencies when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def need(name: str) -> Any:
    """Import a module of the ``speech`` extra.

    >>> need("librosa.filters").__name__
    'librosa.filters'

    Raises:
        ImportError: It is not installed; the message says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"speech needs {package}: pip install multitower[speech]") from error
