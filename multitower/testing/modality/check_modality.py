"""Check a modality on samples of its data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...plugins.modality import Modality
from ..report import demand, report_of
from .case import ModalityCase, RoundTrip, kept_random_states
from .promises import MODALITY_PROMISES


def check_modality(
    modality: Modality,
    samples: Sequence[Any],
    *,
    round_trip: RoundTrip = "data",
    bound: float | None = None,
    edges_inside: bool = False,
    promises: Iterable[str] | None = None,
) -> None:
    """Check everything that the library relies on in a modality; list all failures.

    >>> import multitower as mt, torch
    >>> from multitower.plugins import check_tokens
    >>> class Bytes(mt.Modality):
    ...     name, accepts = "bytes", (bytes,)
    ...     vocab_size, begin, end = 258, 256, 257
    ...     def encode(self, raw):
    ...         if not isinstance(raw, bytes):
    ...             raise TypeError(f"give bytes, not {type(raw).__name__}")
    ...         return torch.tensor([256, *raw, 257])
    ...     def decode(self, tokens):
    ...         return bytes(token for token in check_tokens(tokens) if token < 256)
    >>> check_modality(Bytes(), [b"", b"two towers"])

    A lossy modality declares how much may be lost:

    >>> class Loud(Bytes):
    ...     def decode(self, tokens):
    ...         return super().decode(tokens).upper()
    >>> check_modality(Loud(), [b"two"])
    Traceback (most recent call last):
    AssertionError: Loud breaks 1 of 11 promises:
      round trip: sample 0 comes back as b'TWO', not as b'two'; where a loss is meant, ...
    >>> def changed(raw, again):
    ...     return sum(a != b for a, b in zip(raw, again, strict=True))
    >>> check_modality(Loud(), [b"two"], round_trip=changed, bound=3)

    The checks encode and decode the samples, unusual tokens, and raw data of wrong types. They save the
    modality to a temporary folder and load it, also from damaged files. The global random generators are
    restored.

    Args:
        modality: The modality.
        samples: Some raw data of each accepted type, of different lengths, including the shortest possible.
            They are copied before encoding. Arrays, tensors, and containers and dataclasses of them are
            compared part by part, other objects by ``==``.
        round_trip: What survives encoding and decoding. ``"data"``: ``decode(encode(raw))`` is ``raw``.
            ``"tokens"``: ``encode(decode(tokens))`` are the tokens of each sample. A function of ``raw`` and
            the result returns the loss, which must be at most ``bound``.
        bound: The maximal loss; required with a function, and only then.
        edges_inside: Whether ``begin`` and ``end`` may also occur between other tokens.
        promises: The names of the checks in ``MODALITY_PROMISES`` to run; all by default.

    Raises:
        AssertionError: Some checks fail; all of them are listed.
        ValueError: There are no samples, there is no check of that name, or ``round_trip`` and ``bound`` do
            not fit.
    """
    report = modality_report(
        modality, samples, round_trip=round_trip, bound=bound, edges_inside=edges_inside, promises=promises
    )
    demand(report, type(modality).__name__)


def modality_report(
    modality: Modality,
    samples: Sequence[Any],
    *,
    round_trip: RoundTrip = "data",
    bound: float | None = None,
    edges_inside: bool = False,
    promises: Iterable[str] | None = None,
) -> dict[str, str]:
    """Run each check of a modality; return an error message for each name, empty if the check passes.

    >>> import multitower as mt, torch
    >>> class Nothing(mt.Modality):
    ...     name, accepts = "nothing", (str,)
    ...     vocab_size, begin, end = 2, 0, 1
    ...     def encode(self, raw):
    ...         return torch.tensor([0, 1])
    ...     def decode(self, tokens):
    ...         return ""
    >>> report = modality_report(Nothing(), ["", "two"])
    >>> report["tokens"]
    ''
    >>> report["round trip"]
    "sample 1 comes back as '', not as 'two'; where a loss is meant, declare it with round_trip="

    The arguments are those of ``check_modality``.

    Raises:
        ValueError: There are no samples, there is no check of that name, or ``round_trip`` and ``bound`` do
            not fit.
    """
    if not samples:
        raise ValueError("there are no samples: give some pieces of raw data that the modality encodes")
    if not callable(round_trip) and round_trip not in ("data", "tokens"):
        raise ValueError(
            f"round_trip={round_trip!r}: give 'data', 'tokens' or a function that measures a loss"
        )
    if callable(round_trip) != (bound is not None):
        raise ValueError("round_trip= and bound= go together: a function that measures a loss, and its limit")
    case = ModalityCase(modality, samples, round_trip, bound, edges_inside)
    with kept_random_states():
        return report_of(MODALITY_PROMISES, promises, case)
