"""Checks of the schedule: against stages computed independently, and of the cycles that errors show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ...batch.collate import Example
from ...compile.schedule import Step, Tap, make_schedule
from ...declare.spec import LinkSpec
from ...errors import GraphError
from ...model import FusedModel


class Node(NamedTuple):
    """A layer of a tower or, if ``reads``, the taps after that layer."""

    tower: str
    layer: int
    reads: bool


def check_schedule(depths: Mapping[str, int], links: Iterable[LinkSpec]) -> None:
    """Check that every layer and tap runs once, after what it needs, and in the earliest possible stage.

    >>> from multitower.declare.spec import LinkSpec
    >>> check_schedule({"a": 2, "b": 2}, [LinkSpec("a", "b", name="a->b", interleave=1)])

    Then there are as few stages as possible: as many as there are steps on the longest path. If layers wait
    for each other, the error must show a cycle in which each line waits for the one above it.

    Args:
        depths: Number of layers of each tower.
        links: The links between these towers.

    Raises:
        AssertionError: The schedule is wrong or depends on the order of declaration, or a cycle is accepted
            or shown wrongly.
    """
    links = list(links)
    needs = _needs(depths, links)
    stages = _stages(needs)
    if sum(map(len, stages)) < len(needs):
        _check_cycle(depths, links, needs)
        return
    schedule = make_schedule(depths, links)
    found = {}
    for number, stage in enumerate(schedule.stages, 1):
        for step in stage:
            node = Node(step.tower, step.layer, bool(step.taps))
            assert node in needs, f"step '{step}' is not called for"
            assert node not in found, f"step '{step}' runs twice"
            found[node] = number
    assert set(found) == set(needs), f"these never run: {sorted(set(needs) - set(found))}"
    for node, sources in needs.items():
        for source in sources:
            assert found[source] < found[node], f"{node} runs before {source}, which it needs"
    for number, nodes in enumerate(stages, 1):
        for node in nodes:
            assert found[node] == number, f"{node} runs in stage {found[node]}, and could in stage {number}"
    wanted = sorted(
        Tap(link.name, link.source, source_layer, link.target, target_layer)
        for link in links
        for source_layer, target_layer in link.resolve(depths[link.source], depths[link.target])
    )
    assert sorted(schedule.taps) == wanted, f"the taps are {sorted(schedule.taps)}, declared were {wanted}"
    _check_order(schedule.steps, needs)
    turned = make_schedule(dict(reversed(list(depths.items()))), links[::-1])
    assert turned == schedule, "the schedule depends on the order in which towers and links are declared"


def check_model_schedule(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that a model's schedule is correct and is that of its graph; see ``check_schedule``.

    >>> from multitower.testing import tiny_model
    >>> check_model_schedule(tiny_model(), [])
    """
    depths = {name: model.tower(name).depth for name in model.towers}
    check_schedule(depths, model.graph.links.values())
    expected = make_schedule(depths, model.graph.links.values())
    assert model.schedule == expected, "the model has another schedule than its graph"


def _needs(depths: Mapping[str, int], links: Iterable[LinkSpec]) -> dict[Node, set[Node]]:
    """Return what must run before each layer, and before the taps after each layer."""
    read: dict[tuple[str, int], set[Node]] = {}
    for link in links:
        for source_layer, target_layer in link.resolve(depths[link.source], depths[link.target]):
            read.setdefault((link.target, target_layer), set()).add(Node(link.source, source_layer, False))
    needs: dict[Node, set[Node]] = {}
    for tower, depth in depths.items():
        for layer in range(depth + 1):
            before = (tower, layer - 1)
            needs[Node(tower, layer, False)] = {Node(*before, before in read)} if layer else set()
            if (tower, layer) in read:
                needs[Node(tower, layer, True)] = {Node(tower, layer, False), *read[tower, layer]}
    return needs


def _stages(needs: Mapping[Node, set[Node]]) -> list[list[Node]]:
    """Run each node as soon as its needs have run; nodes in cycles, or after one, never run."""
    stages: list[list[Node]] = []
    done: set[Node] = set()
    while ready := [node for node, sources in needs.items() if node not in done and sources <= done]:
        stages.append(ready)
        done.update(ready)
    return stages


def _check_order(steps: Sequence[Step], needs: Mapping[Node, set[Node]]) -> None:
    """Check the order of the steps as they are run, regardless of stages."""
    ran: set[Node] = set()
    for step in steps:
        node = Node(step.tower, step.layer, bool(step.taps))
        assert node not in ran, f"step '{step}' runs twice"
        assert needs[node] <= ran, f"step '{step}' runs before {sorted(needs[node] - ran)}, which it needs"
        for tap in step.taps:
            assert (tap.target, tap.target_layer) == (step.tower, step.layer), f"{tap} is read at '{step}'"
        ran.add(node)
    assert ran == set(needs), f"these never run: {sorted(set(needs) - ran)}"


def _check_cycle(
    depths: Mapping[str, int], links: Sequence[LinkSpec], needs: Mapping[Node, set[Node]]
) -> None:
    try:
        make_schedule(depths, links)
    except GraphError as error:
        message = str(error)
    else:
        raise AssertionError("layers wait for each other in a cycle, and are scheduled all the same")
    steps = [_as_node(line) for line in message.splitlines() if line.startswith("  ")]
    assert steps, f"the error shows no cycle: {message}"
    unknown = set(steps) - set(needs)
    assert not unknown, f"the error shows {unknown}, which the graph does not have: {message}"
    for step, before in zip(steps, [steps[-1], *steps], strict=False):
        assert before in needs[step], f"the error says that {step} waits for {before}: {message}"
    advice = re.search(r"tap \((\d+), (\d+)\) of link '([^']+)'", message)
    assert advice is not None, f"the error does not say which tap to change: {message}"
    link = next(each for each in links if each.name == advice[3])
    source, target = Node(link.source, int(advice[1]), False), Node(link.target, int(advice[2]), True)
    assert {source, target} <= set(steps), f"the tap to change is not in the cycle: {message}"


def _as_node(line: str) -> Node:
    if run := re.fullmatch(r"  run (\S+) layer (\d+)", line):
        return Node(run[1], int(run[2]), False)
    if embed := re.fullmatch(r"  embed (\S+)", line):
        return Node(embed[1], 0, False)
    if read := re.fullmatch(r"  after (\S+) layer (\d+), read .+", line):
        return Node(read[1], int(read[2]), True)
    first = re.fullmatch(r"  after the embedding of (\S+), read .+", line)
    assert first is not None, f"this line of the error names no step: {line!r}"
    return Node(first[1], 0, True)
