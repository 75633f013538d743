"""Segments that are continued equal segments decoded in one call."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
import torch

import multitower as mt
from models import BEGIN, END, segment
from sessions import FAMILIES, counted, fusion, lists

GREEDY = {"do_sample": False, "suppress_tokens": {"text": [END], "speech": [END]}}
BEFORE = [
    [segment("speech", 5, 6, 7), segment("text", 4, 5)],
    [segment("speech", 9), (segment("text", 4), segment("speech", 3, 8))],
]


def by_hand(model: mt.FusedModel, row: list, name: str, steps: int) -> list[int]:
    """Decode greedily, with a forward over the whole row for each token."""
    row, found = list(row), list[int]()
    for _ in range(steps):
        scores = model(**mt.collate([row])).logits[name][0, -1]
        scores[END] = -torch.inf
        found.append(int(scores.argmax()))
        row.append(mt.Segment(name, [found[-1]]))
    return found


@pytest.mark.parametrize(
    ("kind", "output"),
    [*((kind, ("text", "speech")) for kind in [*FAMILIES, "mamba"]), ("llama", "speech"), ("mamba", "text")],
)
def test_some_tokens_at_a_time(kind: str, output: str | tuple[str, ...]) -> None:
    model = fusion(kind, position="segment")
    whole, session = model.session(rows=2), model.session(rows=2)
    for each in (whole, session):
        each.append(BEFORE)
    expected = lists(whole.generate([output], max_new_tokens=6, **GREEDY))
    pieces = [
        lists(session.generate([output], continue_segment=True, max_new_tokens=2, **GREEDY)) for _ in range(3)
    ]
    for row in range(2):
        for place, tokens in enumerate(expected[row][0]):
            assert functools.reduce(operator.iadd, (piece[row][0][place] for piece in pieces), []) == tokens
    after = [
        lists(each.generate(["speech", "text"], max_new_tokens=3, do_sample=False))
        for each in (whole, session)
    ]
    assert after[0] == after[1]


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_others_said_meanwhile_is_read(kind: str) -> None:
    options: Any = {"position": "segment"} if kind in ("llama", "gpt2") else {"window": 4}
    model, other = fusion(kind, **options), [segment("speech", 5, 6, 7)]
    row = [segment("speech", 9, 8), mt.Segment("text", [BEGIN, 4, 5]), *other]
    found = model.generate([row], ["text"], continue_segment=True, max_new_tokens=4, **GREEDY)
    assert lists(found) == [[[by_hand(model, row, "text", 4)]]]

    session = model.session()
    for entry in row:
        session.append(entry)
    assert lists(session.generate(["text"], continue_segment=True, max_new_tokens=4, **GREEDY)) == lists(
        found
    )


def test_without_anything_to_go_on_with_a_segment_begins() -> None:
    model = fusion("llama")
    given = [[segment("text", 4, 5)], [segment("speech", 5)]]
    begun = model.generate(given, ["text"], max_new_tokens=3, **GREEDY)
    assert lists(model.generate(given, ["text"], continue_segment=True, max_new_tokens=3, **GREEDY)) == lists(
        begun
    )
    assert all(new[0].tokens[0] == BEGIN for new in begun)


def test_several_answers_to_a_beginning() -> None:
    model = fusion("llama")
    row = [segment("speech", 5, 6), mt.Segment("text", [BEGIN, 4])]
    options = {"continue_segment": True, "max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2}
    found = model.generate([row, row], ["text"], **GREEDY, **options)
    assert len(found) == 4
    assert lists(found[:2]) == lists(found[2:])
    assert all(len(new[0].tokens) == 3 for new in found)


def test_no_token_runs_twice() -> None:
    model = fusion("llama")
    session = model.session()
    session.append(BEFORE[0])
    ran = counted(model)
    for _ in range(3):
        session.generate(["text"], continue_segment=True, max_new_tokens=2, **GREEDY)
    assert {number for (name, _), number in ran.items() if name == "text"} == {6}  # with the begin token
    assert not any(number for (name, _), number in ran.items() if name == "speech")


def test_a_segment_that_was_given_in_part_runs_only_its_last_token_again() -> None:
    model = fusion("llama")
    session = model.session()
    session.append([segment("speech", 5, 6), mt.Segment("text", [BEGIN, 4, 5])])
    ran = counted(model)
    session.generate(["text"], continue_segment=True, max_new_tokens=2, **GREEDY)
    assert {number for (name, _), number in ran.items() if name == "text"} == {2}
