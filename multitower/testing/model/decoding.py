"""Checks of ``generate``: with caches, each step must have the logits of a full forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...batch.collate import Example, Segment, place_in_time
from ...model import FusedModel
from ...tower import TransformersTower
from ..compare import assert_close
from .case import opened, rounding, streams_of

STEPS = 4
"""Maximal number of tokens to decode."""


@torch.no_grad()
def check_decoding(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that each step of greedy decoding, batched and with caches, has the logits of a full forward.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_decoding(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    Each tower with a BOS token is decoded alone, then one after the other, then simultaneously, for all
    examples in one batch where towers support left padding.

    Raises:
        AssertionError: Some logits differ, or a segment ends too early or too late.
        ImportError: transformers is not installed.
    """
    model = opened(model)
    given = [without_targets(example) for example in examples]
    names = [name for name in model.towers if model.tower(name).begin is not None]
    for output in [*([name] for name in names), *([names] if len(names) > 1 else [])]:
        together = all(model.tower(name).pads_left for name in output)
        for rows in [given] if together else [[row] for row in given]:
            _check_steps(model, rows, output, STEPS)
    if len(names) > 1:
        together = all(model.tower(name).pads_left for name in names)
        for rows in [given] if together else [[row] for row in given]:
            _check_together(model, rows, tuple(names), STEPS)


@torch.no_grad()
def check_prefill(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that chunks of any size in the prefill do not change what is decoded.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_prefill(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    Only towers that decode with a cache of keys and values are checked.

    Raises:
        AssertionError: Some logits differ, or a segment ends too early or too late.
    """
    model = opened(model)
    given = [without_targets(example) for example in examples]
    for name in model.towers:
        tower = model.tower(name)
        if tower.begin is None or not isinstance(tower, TransformersTower) or not tower.decodes_cached:
            continue
        if getattr(tower.model, "_is_stateful", False):
            continue
        for rows in [given] if tower.pads_left else [[row] for row in given]:
            longest = max(_own_tokens(row, name) for row in rows)
            for size in range(1, longest + 1):
                _check_steps(model, rows, [name], 2, f" in chunks of {size}", prefill_chunk_size=size)


def _check_steps(
    model: FusedModel,
    rows: Sequence[Any],
    output: Sequence[str],
    steps: int,
    how: str = "",
    **options: Any,
) -> None:
    """Decode; compare the logits of each step with those of a forward over the result."""
    scores = Scores()
    decoded = model.generate(
        rows, output=output, do_sample=False, max_new_tokens=steps, logits_processor=[scores], **options
    )
    for place, name in enumerate(output):
        segments = [new[place] for new in decoded]
        longest = max(len(segment.tokens) for segment in segments if isinstance(segment, Segment))
        seen = [scores.seen.pop(0) for _ in range(longest - 1)]
        how_now = f"{how} after {', '.join(output[:place])}" if place else how
        for number, (row, new) in enumerate(zip(rows, decoded, strict=True)):
            segment, stepwise = new[place], [each[number] for each in seen]
            assert isinstance(segment, Segment)
            where = f"tower {name!r}, row {number}{how_now}"
            check_row(model, [*row, *new[: place + 1]], segment, stepwise, steps, where)


def check_row(
    model: FusedModel,
    row: Sequence[Any],
    segment: Segment,
    seen: Sequence[Tensor],
    steps: int,
    where: str,
) -> None:
    """Compare the logits from which a row's last segment was decoded with those of a forward."""
    name, tokens = segment.tower, torch.as_tensor(segment.tokens)
    ended = int(tokens[-1]) in model.tower(name).end and len(tokens) > 1
    assert ended or len(tokens) == steps + 1, f"{where}: the segment {tokens.tolist()} ends without an end"
    expected = model(streams_of(model, [row])).logits[name][0, -len(tokens) : -1].cpu()
    stepwise = torch.stack(list(seen[: len(tokens) - 1]))
    assert_close(
        stepwise,
        expected.float(),
        f"{where}: decoding gives other logits than a forward over what was decoded",
        max(rounding(model), 1e-6),
    )
    assert torch.equal(stepwise.argmax(-1), tokens[1:]), f"{where}: not the best token was taken"


def _check_together(model: FusedModel, rows: Sequence[Any], names: tuple[str, ...], steps: int) -> None:
    """Like ``_check_steps``, for simultaneous decoding."""
    scores = {name: Scores() for name in names}
    processors = {name: [each] for name, each in scores.items()}
    decoded = model.generate(
        rows, output=[names], do_sample=False, max_new_tokens=steps, logits_processor=processors
    )
    for number, (row, (new,)) in enumerate(zip(rows, decoded, strict=True)):
        assert isinstance(new, tuple)
        for segment in new:
            others = ", ".join(name for name in names if name != segment.tower)
            where = f"tower {segment.tower!r}, row {number} at the time of {others}"
            stepwise = [each[number] for each in scores[segment.tower].seen]
            check_row(model, [*row, new], segment, stepwise, steps, where)


class Scores:
    """A logits processor that records the scores and does not change them."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record the scores of one step."""
        self.seen.append(scores.detach().float().cpu().clone())
        return scores


def _own_tokens(row: Example, name: str) -> int:
    """Return the length of a tower's prompt, including the BOS token of the new segment."""
    return 1 + sum(len(segment.tokens) for segment, _ in place_in_time(row) if segment.tower == name)


def without_targets(example: Example) -> list[Any]:
    """Return an example without targets, as ``generate`` takes it."""

    def plain(segment: Segment) -> Segment:
        return dataclasses.replace(segment, target=False)

    return [tuple(map(plain, entry)) if isinstance(entry, tuple) else plain(entry) for entry in example]
