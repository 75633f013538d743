"""What the library has to say while it works, by Python's own logging."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("multitower")


def set_verbosity(level: int | str) -> None:
    """Choose what is said of the library's work: "info" for more than is at first, "error" for less.

    >>> import multitower as mt
    >>> mt.set_verbosity("error")
    >>> mt.set_verbosity("warning")     # as at first

    That is the level of ``logging.getLogger("multitower")``. Where the program has not set up logging, the
    messages go to stderr. Python's own warnings are not concerned.

    Args:
        level: A level of ``logging``, by its number or its name in either case.

    Raises:
        ValueError: There is no level of that name.
    """
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, the first time that it is to be given."""
    logger.warning(message)
