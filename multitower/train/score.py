"""Decode the targets of examples, for the metrics of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..batch.collate import Example
from ..generate.generate import Entry, generate
from ..run.fusion import Fusion


def decode_targets(
    model: Fusion, examples: Sequence[Example], options: Mapping[str, Any]
) -> list[tuple[list[Any], list[Any], Example]]:
    """Decode what each example is to learn; return its prompt, the output and the example itself.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> example = [mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7, 2], target=True)]
    >>> ((prompt, output, _),) = decode_targets(tiny_model(), [example], {"max_new_tokens": 3})
    >>> [segment.tower for segment in prompt], [segment.tower for segment in output]
    (['speech'], ['text'])
    """
    found: list[tuple[list[Any], list[Any], Example]] = []
    alike: dict[tuple[Entry, ...], list[Example]] = {}
    for example in examples:
        alike.setdefault(tuple(map(_tower, example[_first_target(example) :])), []).append(example)
    for towers, group in alike.items():
        prompts = [list(example[: _first_target(example)]) for example in group]
        found += zip(prompts, generate(model, prompts, list(towers), options), group, strict=True)
    return found


def _first_target(example: Example) -> int:
    """Return the index of the first target, which only targets may follow."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in example]
    learnt = [any(segment.target for segment in entry) for entry in entries]
    if True not in learnt:
        raise ValueError("score needs examples with a target, and one has none: Segment(..., target=True)")
    first = learnt.index(True)
    for segment in (segment for entry in entries[first:] for segment in entry):
        if not segment.target:
            raise ValueError(
                f"score cannot evaluate an example in which a segment of {segment.tower!r} that is no target "
                "comes after, or at the time of, the first target: make an example of each turn, with the "
                "turns before it as segments without target"
            )
    return first


def _tower(entry: Any) -> Entry:
    return tuple(segment.tower for segment in entry) if isinstance(entry, tuple) else entry.tower
