from __future__ import annotations

import itertools

import pytest

import multitower as mt
from multitower.compile.schedule import make_schedule
from multitower.declare.spec import LinkSpec


def link(source: str, target: str, **options: object) -> LinkSpec:
    return LinkSpec(source, target, name=f"{source}->{target}", **options)


def test_both_directions_of_a_pair_share_a_stage() -> None:
    schedule = make_schedule(
        {"a": 3, "b": 3}, [link("a", "b", interleave=(1, 1)), link("b", "a", interleave=(1, 1))]
    )
    assert len(schedule.stages) == 7


def test_cycle_among_layers_is_shown() -> None:
    links = [link("a", "b", taps=((3, 1),)), link("b", "a", taps=((3, 1),))]
    with pytest.raises(mt.errors.GraphError) as caught:
        make_schedule({"a": 3, "b": 3}, links)
    message = str(caught.value)
    assert "wait for each other" in message
    assert "after b layer 1, read a layer 3" in message
    assert "after a layer 1, read b layer 3" in message
    assert "To break the circle" in message
    assert "tap (3, 1) of link" in message


def test_embeddings_are_read_before_the_first_layer() -> None:
    schedule = make_schedule({"a": 2, "b": 2}, [link("a", "b", interleave=(2, 1), embeddings=True)])
    assert [str(step) for step in schedule.stages[1]] == [
        "run a layer 1",
        "after the embedding of b, read the embedding of a",
    ]
    assert [(tap.source_layer, tap.target_layer) for tap in sorted(schedule.taps)] == [(0, 0), (2, 1)]


def test_a_tap_into_the_embedding_may_be_in_a_cycle() -> None:
    links = [link("a", "b", taps=((1, 0),)), link("b", "a", taps=((2, 0),))]
    with pytest.raises(mt.errors.GraphError, match="after the embedding of b, read a layer 1"):
        make_schedule({"a": 2, "b": 2}, links)


def test_explanation_names_everything() -> None:
    schedule = make_schedule({"speech": 4, "text": 2}, [link("speech", "text", interleave=1)])
    words = schedule.explain()
    assert "speech (4 layers)" in words
    assert "text reads speech at 2 taps" in words
    assert "2 to 1, 4 to 2" in words
    assert "Read no other tower: speech." in words


def test_sixteen_towers_linked_completely_are_scheduled() -> None:
    names = [f"tower{number}" for number in range(16)]
    links = [link(a, b, interleave=1) for a, b in itertools.permutations(names, 2)]
    schedule = make_schedule(dict.fromkeys(names, 8), links)
    assert len(schedule.stages) == 17
    assert len(schedule.taps) == 16 * 15 * 8


def test_each_tower_runs_as_far_as_it_can() -> None:
    there = LinkSpec("b", "a", name="b->a", taps=((1, 1), (3, 2)))
    back = LinkSpec("a", "b", name="a->b", taps=((1, 2),))
    schedule = make_schedule({"a": 3, "b": 4}, [there, back])
    order = [f"{step.tower}{step.layer}{'+' if step.taps else ''}" for step in schedule.steps]
    assert order == ["a0", "a1", "b0", "b1", "b2", "b2+", "b3", "b4", "a1+", "a2", "a2+", "a3"]
    assert sorted(schedule.steps, key=str) == sorted((s for stage in schedule.stages for s in stage), key=str)
