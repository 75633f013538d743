"""Check of sessions: each turn must have the logits of a full forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...batch.collate import Example
from ...generate.session import Session
from ...model import FusedModel
from .case import opened
from .decoding import Scores, check_row, without_targets

STEPS = 3
"""Maximal number of tokens to decode per turn."""


@torch.no_grad()
def check_session(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that each turn of a session has the logits of a forward over its whole history.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_session(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    The examples are appended entry by entry. After each, segments are decoded: of one tower, of several in
    turn, or simultaneously. Each turn is decoded in a fork, then in the session itself, and again after a
    rollback.

    Raises:
        AssertionError: Some logits differ, or a segment ends too early or too late.
        ImportError: transformers is not installed.
    """
    model = opened(model)
    given = [without_targets(example) for example in examples]
    names = [name for name in model.towers if model.tower(name).begin is not None]
    outputs: list[list[Any]] = [[name] for name in names]
    if len(names) > 1:
        outputs = [names, [tuple(names)], *outputs]
    together = all(model.tower(name).pads_left for name in names)
    for rows in [given] if together else [[row] for row in given]:
        session = model.session(len(rows))
        for turn in range(max(map(len, rows))):
            session.append([row[turn : turn + 1] for row in rows])
            output, where, mark = outputs[turn % len(outputs)], f"turn {turn + 1}", session.mark()
            _check_turn(model, session.fork(), output, f"{where} in a fork")
            _check_turn(model, session, output, where)
            session.rollback(mark)
            _check_turn(model, session, output, f"{where} after going back")


def _check_turn(model: FusedModel, session: Session, output: Sequence[Any], where: str) -> None:
    """Decode; compare the logits of each step with those of a forward over the whole history."""
    names = [name for entry in output for name in ((entry,) if isinstance(entry, str) else entry)]
    scores, before = {name: Scores() for name in names}, session.history
    processors = {name: [each] for name, each in scores.items()}
    decoded = session.generate(output, do_sample=False, max_new_tokens=STEPS, logits_processor=processors)
    for number, (row, new) in enumerate(zip(before, decoded, strict=True)):
        assert session.history[number] == [*row, *new], f"{where}: the history lacks what was decoded"
        for place, entry in enumerate(new):
            for segment in entry if isinstance(entry, tuple) else (entry,):
                stepwise = [each[number] for each in scores[segment.tower].seen]
                whole = [*row, *new[: place + 1]]
                check_row(
                    model, whole, segment, stepwise, STEPS, f"tower {segment.tower!r}, row {number}, {where}"
                )
