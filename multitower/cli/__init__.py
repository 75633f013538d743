"""The command line: ``multitower`` and ``python -m multitower``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 1 after an error, 2 for invalid arguments.

    >>> main(["--version"])                             # doctest: +ELLIPSIS
    multitower ...
    0

    Args:
        arguments: The arguments after the program's name; by default those of this process.
    """
    try:
        from .app import run
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return run(arguments)
