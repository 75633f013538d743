"""Every guarantee that a tower gives, checked on a few random tokens."""

from __future__ import annotations

from ...errors import TowerError
from ...tower import Tower
from .case import Case, Logits
from .promises import GUARANTEES


def check_tower(tower: Tower, logits: Logits | None = None) -> None:
    """Check every guarantee of a tower; return which it breaks, and how.

    >>> from multitower.testing import tiny_tower
    >>> check_tower(tiny_tower())

    The tower is left as it was. It is run on the CPU in float32 or wherever it is; half precision has
    wider tolerances. Tokens are drawn from its whole vocabulary.

    Args:
        tower: The tower.
        logits: How to get the logits of ``tower.native``, for one that does not give them (alone or first in
            a tuple) as ``native(tokens)``: for example ``lambda native, tokens: native(tokens).scores``.

    Raises:
        TowerError: Some guarantee is broken; all of them are listed.
    """
    broken = {name: reason for name, reason in tower_report(tower, logits).items() if reason}
    if broken:
        raise TowerError(
            f"{type(tower).__name__} breaks {len(broken)} of {len(GUARANTEES)} guarantees:"
            + "".join(f"\n  {name}: {reason}" for name, reason in broken.items())
        )


def tower_report(tower: Tower, logits: Logits | None = None) -> dict[str, str]:
    """Check each guarantee of a tower; return by its name what is wrong, empty where nothing is.

    >>> from multitower.testing import tiny_tower
    >>> tower_report(tiny_tower())["causality"]
    ''

    Args:
        tower: The tower.
        logits: As in ``check_tower``.
    """
    mode = tower.training
    tower.eval()
    report = {}
    try:
        for name, check in GUARANTEES.items():
            report[name] = ""
            try:
                check(Case(tower, logits))
            except AssertionError as error:
                report[name] = str(error)
            except Exception as error:  # whatever a tower raises is its author's to read
                report[name] = f"{type(error).__name__}: {error}"
    finally:
        tower.train(mode)
    return report
