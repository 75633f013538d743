"""Compare places in segments with a plain implementation of their definition."""

from __future__ import annotations

import pytest
import torch

import multitower as mt
from models import segment
from multitower.batch.places import ROOM, places

st = pytest.importorskip("hypothesis.strategies", reason="needs the testing extra")

from hypothesis import given, settings

from multitower.testing.strategies import examples

VOCABULARIES = {"a": 9, "b": 9, "c": 9}


def pairs(found: torch.Tensor) -> list[tuple[int, int]]:
    return [(place // ROOM, place % ROOM) for place in found.tolist()]


def by_hand(row: list) -> dict[str, list[tuple[int, int]]]:
    """Compute the places by walking through an example."""
    said: dict[str, list[tuple[int, int]]] = {}
    times: dict[str, list[int]] = {}
    time, begun = 0, 0
    for entry in row:
        together = entry if isinstance(entry, tuple) else (entry,)
        goes_on = {
            each.tower: bool(times.get(each.tower)) and times[each.tower][-1] == time - 1 for each in together
        }
        for each in together:
            first = said[each.tower][-1] if goes_on[each.tower] else (begun, -1)
            new = [(first[0], first[1] + 1 + place) for place in range(len(each.tokens))]
            said.setdefault(each.tower, []).extend(new)
            times.setdefault(each.tower, []).extend(range(time, time + len(each.tokens)))
        begun += not all(goes_on.values())
        time += max(len(each.tokens) for each in together)
    return said


@settings(max_examples=100, deadline=None)
@given(rows=examples(VOCABULARIES), packed=st.booleans(), one_row=st.booleans())
def test_places_are_those_of_a_walk(rows: list, packed: bool, one_row: bool) -> None:
    batch = mt.collate(rows)
    found = places(batch["streams"])
    for number, row in enumerate(rows):
        for name, expected in by_hand(row).items():
            mask = batch["streams"][name]["mask"][number]
            assert pairs(found[name][number][mask]) == expected
    if packed:
        streams = mt.pack(batch, one_row=one_row)["streams"]
        for name, each in places(streams).items():
            stream = streams[name]
            for number in range(len(rows)):
                here = stream["mask"] & (stream["examples"] == number)
                mask = batch["streams"][name]["mask"][number]
                assert torch.equal(each[here], found[name][number][mask])


def test_an_example_that_goes_on_where_another_ended_has_segments_of_its_own() -> None:
    """Times restart with each packed example: "b" ends at 6 in the second and begins at 7 in the first."""
    rows = [[segment("a", *range(1, 6)), segment("b")], [segment("a", 1, 2, 3), segment("b")]]
    for one, other in ((0, 1), (1, 0)):
        packed = mt.pack(mt.collate([rows[one], rows[other]]), one_row=True)["streams"]
        assert pairs(places(packed)["b"][0]) == [(1, 0), (1, 1)] * 2


def test_what_comes_later_changes_no_place() -> None:
    row = [segment("a", 3), segment("b", 4, 5), segment("a", 6, 7), (segment("a", 1), segment("c", 2))]
    whole = places(mt.collate([row])["streams"])
    for end in range(1, len(row)):
        for name, each in places(mt.collate([row[:end]])["streams"]).items():
            assert torch.equal(each[0], whole[name][0, : each.shape[1]])


def test_a_pace_is_of_examples_that_have_both() -> None:
    rows = [
        [segment("a", 3, 4), segment("b", 4)],
        [segment("a", 9)],
        [(segment("b", 4, 5), segment("a", 6, 7))],
    ]
    assert mt.batch.measure_pace(rows, "a", "b") == 8 / 7
    assert mt.batch.measure_pace(iter(rows), "b", "a") == 7 / 8
    with pytest.raises(ValueError, match="no example has tokens of both 'a' and 'c'"):
        mt.batch.measure_pace(rows, "a", "c")
