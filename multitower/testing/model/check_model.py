"""Check a fused model on examples."""

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
"""The checks by name; each raises an AssertionError that explains what is wrong."""


def check_model(
    model: FusedModel, examples: Sequence[Example], *, promises: Iterable[str] | None = None
) -> None:
    """Check all guarantees of a fused model on examples; list all failures.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> speech, text = mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 7, 2], target=True)
    >>> check_model(tiny_model(), [[speech, text], [text, speech, text], [(speech, text)], [text]])

    The model does not change: all checks use copies, with gates opened at random. Choose examples that use
    its links: several segments, in different orders, and rows of different lengths. ``testing.strategies``
    draws models and examples for hypothesis.

    Args:
        model: The model.
        examples: The examples to run it on.
        promises: The names of the checks in ``MODEL_PROMISES`` to run; all by default.

    Raises:
        AssertionError: Some checks fail; all of them are listed.
        ValueError: There is no check of that name.
    """
    demand(model_report(model, examples, promises=promises), "the model")


def model_report(
    model: FusedModel, examples: Sequence[Example], *, promises: Iterable[str] | None = None
) -> dict[str, str]:
    """Run each check of a fused model; return an error message for each name, empty if the check passes.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> model_report(tiny_model(), [[mt.Segment("speech", [1, 5]), mt.Segment("text", [1, 7])]])["causality"]
    ''

    The arguments are those of ``check_model``.
    """
    return report_of(MODEL_PROMISES, promises, model, examples)
