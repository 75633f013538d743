from __future__ import annotations

import itertools
import random

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import multitower as mt
from multitower.schedule import Step, make_schedule
from multitower.spec import LinkSpec


def link(source: str, target: str, **options: object) -> LinkSpec:
    return LinkSpec(source, target, name=f"{source}->{target}", **options)


@st.composite
def depths_and_links(draw: st.DrawFn) -> tuple[dict[str, int], list[LinkSpec]]:
    names = "abcdef"[: draw(st.integers(2, 6))]
    depths = {name: draw(st.integers(1, 6)) for name in names}
    pairs = draw(st.lists(st.sampled_from(list(itertools.permutations(names, 2))), unique=True, max_size=8))
    return depths, [
        link(source, target, interleave=draw(st.integers(1, depths[target]))) for source, target in pairs
    ]


@given(depths_and_links(), st.randoms())
def test_every_layer_once_every_tap_after_what_it_reads(
    case: tuple[dict[str, int], list[LinkSpec]], chance: random.Random
) -> None:
    depths, links = case
    schedule = make_schedule(depths, links)
    place = {step: number for number, step in enumerate(schedule.steps)}
    layers = [(step.tower, step.layer) for step in schedule.steps if not step.taps]
    assert sorted(layers) == sorted((name, layer) for name in depths for layer in range(1, depths[name] + 1))
    for name in depths:
        assert [layer for tower, layer in layers if tower == name] == list(range(1, depths[name] + 1))
    for step in schedule.steps:
        if step.taps:
            assert place[Step(step.tower, step.layer)] < place[step]
            if step.layer < depths[step.tower]:
                assert place[step] < place[Step(step.tower, step.layer + 1)]
        for tap in step.taps:
            assert place[Step(tap.source, tap.source_layer)] < place[step]
    wanted = sorted(
        (each.name, *tap) for each in links for tap in each.resolve(depths[each.source], depths[each.target])
    )
    assert sorted((tap.link, tap.source_layer, tap.target_layer) for tap in schedule.taps) == wanted
    chance.shuffle(links)
    assert make_schedule(dict(reversed(depths.items())), links) == schedule


@given(depths_and_links())
def test_fewest_stages(case: tuple[dict[str, int], list[LinkSpec]]) -> None:
    depths, links = case
    schedule = make_schedule(depths, links)
    waits: nx.DiGraph = nx.DiGraph()
    by_place = {(step.tower, step.layer, bool(step.taps)): step for step in schedule.steps}
    for (tower, layer, is_tap), step in by_place.items():
        waits.add_node(step)
        if is_tap:
            waits.add_edge(by_place[tower, layer, False], step)
        elif layer > 1:
            waits.add_edge(by_place.get((tower, layer - 1, True)) or by_place[tower, layer - 1, False], step)
        for tap in step.taps:
            waits.add_edge(by_place[tap.source, tap.source_layer, False], step)
    assert len(schedule.stages) == 1 + nx.dag_longest_path_length(waits)


def test_both_directions_of_a_pair_share_a_stage() -> None:
    schedule = make_schedule(
        {"a": 3, "b": 3}, [link("a", "b", interleave=(1, 1)), link("b", "a", interleave=(1, 1))]
    )
    assert len(schedule.stages) == 6


def test_cycle_among_layers_is_shown() -> None:
    links = [link("a", "b", taps=((3, 1),)), link("b", "a", taps=((3, 1),))]
    with pytest.raises(mt.GraphError) as caught:
        make_schedule({"a": 3, "b": 3}, links)
    message = str(caught.value)
    assert "wait for each other" in message
    assert "after b layer 1, read a layer 3" in message
    assert "after a layer 1, read b layer 3" in message
    assert "To break the circle" in message
    assert "tap (3, 1) of link" in message


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
    assert len(schedule.stages) == 16
    assert len(schedule.taps) == 16 * 15 * 8
