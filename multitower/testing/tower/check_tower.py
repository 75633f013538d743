"""Check a tower on a few random tokens."""

from __future__ import annotations

from collections.abc import Iterable

from ...tower import Tower
from ..report import demand, report_of
from .case import Logits, TowerCase
from .promises import TOWER_PROMISES


def check_tower(tower: Tower, logits: Logits | None = None, *, promises: Iterable[str] | None = None) -> None:
    """Check everything that the library relies on in a tower; list all failures.

    >>> from multitower.testing import tiny_tower
    >>> check_tower(tiny_tower())

    The tower does not change. It is run in its own dtype, on its own device; half precision has larger
    tolerances. Tokens are drawn from the whole vocabulary.

    Args:
        tower: The tower.
        logits: How to get the logits of ``tower.native`` if ``native(tokens)`` does not return them (alone or
            first in a tuple): for example ``lambda native, tokens: native(tokens).scores``.
        promises: The names of the checks in ``TOWER_PROMISES`` to run; all by default.

    Raises:
        AssertionError: Some checks fail; all of them are listed.
        ValueError: There is no check of that name.
    """
    demand(tower_report(tower, logits, promises=promises), type(tower).__name__)


def tower_report(
    tower: Tower, logits: Logits | None = None, *, promises: Iterable[str] | None = None
) -> dict[str, str]:
    """Run each check of a tower; return an error message for each name, empty if the check passes.

    >>> from multitower.testing import tiny_tower
    >>> tower_report(tiny_tower())["causality"]
    ''

    The arguments are those of ``check_tower``.
    """
    mode = tower.training
    tower.eval()
    try:
        return report_of(TOWER_PROMISES, promises, TowerCase(tower, logits))
    finally:
        tower.train(mode)
