"""Everything that a tower promises, checked on a few random tokens."""

from __future__ import annotations

from collections.abc import Iterable

from ...tower import Tower
from ..report import demand, report_of
from .case import Logits, TowerCase
from .promises import TOWER_PROMISES


def check_tower(tower: Tower, logits: Logits | None = None, *, promises: Iterable[str] | None = None) -> None:
    """Check everything that a tower promises; raise what is broken, and how.

    >>> from multitower.testing import tiny_tower
    >>> check_tower(tiny_tower())

    The tower is left as it was. It is run on the CPU in float32 or wherever it is; half precision has
    wider tolerances. Tokens are drawn from its whole vocabulary.

    Args:
        tower: The tower.
        logits: How to get the logits of ``tower.native``, for one that does not give them (alone or first in
            a tuple) as ``native(tokens)``: for example ``lambda native, tokens: native(tokens).scores``.
        promises: The names of those to check, as in ``TOWER_PROMISES``; all unless they are given.

    Raises:
        AssertionError: Some promise is broken; all of them are listed.
        ValueError: There is no promise of such a name.
    """
    demand(tower_report(tower, logits, promises=promises), type(tower).__name__)


def tower_report(
    tower: Tower, logits: Logits | None = None, *, promises: Iterable[str] | None = None
) -> dict[str, str]:
    """Check each promise of a tower; return by its name what is wrong, empty where nothing is.

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
