"""The library's logger."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("multitower")


def set_verbosity(level: int | str) -> None:
    """Set the level of the library's logger: "info" for more messages than by default, "error" for fewer.

    >>> import multitower as mt
    >>> mt.set_verbosity("error")
    >>> mt.set_verbosity("warning")     # as at first

    The logger is ``logging.getLogger("multitower")``. Messages go to stderr unless the program has configured
    logging. Warnings of the ``warnings`` module are not affected.

    Args:
        level: A level of ``logging``: its number, or its name in upper or lower case.

    Raises:
        ValueError: There is no level of that name.
    """
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once per process."""
    logger.warning(message)
