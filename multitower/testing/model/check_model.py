"""Everything that a fused model promises, checked on examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ...batch.collate import Example
from ...model import FusedModel
from ..report import demand, report_of
from .batches import check_order, check_packing, check_padding, check_rows
from .decoding import check_decoding, check_prefill
from .definition import check_definition
from .forward import check_causality, check_identity, check_sight, check_unimodal
from .on_disk import check_saved
from .schedule import check_model_schedule
from .session import check_session
from .training import check_frozen, check_gradients, check_losses

MODEL_PROMISES: dict[str, Callable[[FusedModel, Sequence[Example]], None]] = {
    "schedule": check_model_schedule,
    "identity": check_identity,
    "unimodal": check_unimodal,
    "definition": check_definition,
    "sight": check_sight,
    "causality": check_causality,
    "order": check_order,
    "rows": check_rows,
    "padding": check_padding,
    "packing": check_packing,
    "gradients": check_gradients,
    "losses": check_losses,
    "frozen": check_frozen,
    "decoding": check_decoding,
    "prefill": check_prefill,
    "session": check_session,
    "saved": check_saved,
}
"""The checks by name: each raises an AssertionError that explains what is wrong."""


def check_model(
    model: FusedModel, examples: Sequence[Example], *, promises: Iterable[str] | None = None
) -> None:
    """Check everything that a fused model promises, on these examples; raise what is broken, and how.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> speech, text = mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 7, 2], target=True)
    >>> check_model(tiny_model(), [[speech, text], [text, speech, text], [(speech, text)], [text]])

    The model is left as it was: all is done on copies, whose gates are opened at random. Give examples that
    use its links: several segments, in several orders, rows of unlike length. ``testing.strategies`` draws
    models and examples for hypothesis.

    Args:
        model: The model.
        examples: What it is run on.
        promises: The names of those to check, as in ``MODEL_PROMISES``; all unless they are given.

    Raises:
        AssertionError: Some promise is broken; all of them are listed.
        ValueError: There is no promise of such a name.
    """
    demand(model_report(model, examples, promises=promises), "the model")


def model_report(
    model: FusedModel, examples: Sequence[Example], *, promises: Iterable[str] | None = None
) -> dict[str, str]:
    """Check each promise of a fused model; return by its name what is wrong, empty where nothing is.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> model_report(tiny_model(), [[mt.Segment("speech", [1, 5]), mt.Segment("text", [1, 7])]])["causality"]
    ''

    The arguments are those of ``check_model``.
    """
    return report_of(MODEL_PROMISES, promises, model, examples)
