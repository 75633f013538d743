"""Lazy imports of optional dependencies."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import an optional module; the error names the extra that installs it.

    >>> require("json", "transformers").loads("[1]")
    [1]

    Raises:
        ImportError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{module} is not installed; it comes with the extra: pip install 'multitower[{extra}]'"
        ) from error
