"""Compile a graph to the ordered steps that a fused model runs: a pure function."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

import networkx as nx

from ..declare.spec import LinkSpec
from ..errors import GraphError

Layer = tuple[str, int]


@dataclass(frozen=True, order=True)
class Tap:
    """One connection of a link: after ``target_layer``, the target attends to the output of ``source_layer``.

    Layer 0 is the embedding, whose output is the input of layer 1.
    """

    link: str
    source: str
    source_layer: int
    target: str
    target_layer: int

    @property
    def key(self) -> str:
        """The name of the tap within its link, "source layer-target layer"."""
        return f"{self.source_layer}-{self.target_layer}"


@dataclass(frozen=True)
class Step:
    """One step: a layer of a tower, or the taps after that layer.

    Layer 0 embeds the tokens and applies the input adapter, if there is one.
    """

    tower: str
    layer: int
    taps: tuple[Tap, ...] = ()

    def __str__(self) -> str:
        if not self.taps:
            return f"run {self.tower} layer {self.layer}" if self.layer else f"embed {self.tower}"
        reads = _some([_layer(tap.source, tap.source_layer) for tap in self.taps], " and ", most=3)
        return f"after {_layer(self.tower, self.layer)}, read {reads}"


@dataclass(frozen=True, repr=False)
class Schedule:
    """The stages of a fused forward; the steps of one stage are independent.

    >>> from multitower.declare.spec import LinkSpec
    >>> there = LinkSpec("speech", "text", name="speech->text", taps=((1, 2),))
    >>> back = LinkSpec("text", "speech", name="text->speech", taps=((2, 1),))
    >>> print(make_schedule({"speech": 2, "text": 2}, [there, back]))
    stage 1: embed speech; embed text
    stage 2: run speech layer 1; run text layer 1
    stage 3: run text layer 2
    stage 4: after speech layer 1, read text layer 2; after text layer 2, read speech layer 1
    stage 5: run speech layer 2

    A tap reads a layer's output before any tap updates it, so the two directions of a pair do not wait for
    each other.
    """

    depths: tuple[tuple[str, int], ...]
    stages: tuple[tuple[Step, ...], ...]
    steps: tuple[Step, ...] = field(init=False, compare=False)
    """All steps in the order in which they run; see ``_in_turn``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _in_turn(self.stages))

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All taps, by stage."""
        return tuple(tap for stage in self.stages for step in stage for tap in step.taps)

    @property
    def read_layers(self) -> frozenset[Layer]:
        """The layers whose output some tap reads."""
        return frozenset((tap.source, tap.source_layer) for tap in self.taps)

    @property
    def fingerprint(self) -> str:
        """A digest of all depths and taps, which determine what is computed; their order does not matter."""
        said = [sorted(self.depths), [astuple(tap) for tap in sorted(self.taps)]]
        return f"sha256:{hashlib.sha256(json.dumps(said).encode()).hexdigest()}"

    def needed(
        self, wanted: Mapping[str, int], links: Collection[str], known: Collection[Layer] = ()
    ) -> tuple[Step, ...]:
        """Return the steps on which the wanted layers depend, in order.

        >>> from multitower.declare.spec import LinkSpec
        >>> schedule = make_schedule({"a": 3, "b": 2}, [LinkSpec("a", "b", name="a->b", taps=((2, 1),))])
        >>> print(*schedule.needed({"b": 3}, ["a->b"]), sep="; ")
        embed a; run a layer 1; run a layer 2; embed b; run b layer 1; ...; run b layer 2
        >>> print(*schedule.needed({"b": 2}, []), sep="; ")
        embed b; run b layer 1; run b layer 2

        Args:
            wanted: For each tower of interest, the layer whose output is needed, before any tap updates it,
                or ``depth + 1`` for the input of the head.
            links: The links with visible source tokens; taps of others are left out.
            known: Layers whose output is already known to the taps that read it.
        """
        deepest = dict(wanted)
        steps: list[Step] = []
        for step in reversed(self.steps):
            depth = deepest.get(step.tower, -1)
            if not step.taps:
                if step.layer <= depth:
                    steps.append(step)
                continue
            taps = tuple(tap for tap in step.taps if tap.link in links)
            if taps and step.layer < depth:
                steps.append(step if taps == step.taps else replace(step, taps=taps))
                for tap in taps:
                    if (tap.source, tap.source_layer) not in known:
                        deepest[tap.source] = max(tap.source_layer, deepest.get(tap.source, -1))
        return tuple(reversed(steps))

    def __str__(self) -> str:
        lines = []
        for number, stage in enumerate(self.stages, 1):
            count = f" ({len(stage)} steps)" if len(stage) > 6 else ""
            lines.append(f"stage {number}{count}: {_some(list(map(str, stage)), '; ')}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        layers = sum(depth for _, depth in self.depths)
        return (
            f"<Schedule of {len(self.depths)} towers: {layers} layers and {len(self.taps)} taps in "
            f"{len(self.stages)} stages>"
        )

    def explain(self) -> str:
        """Describe the schedule in words; links into one tower with the same taps share a line."""
        towers = ", ".join(f"{name} ({depth} layers)" for name, depth in self.depths)
        lines = [f"{len(self.depths)} towers: {towers}.", f"They run in {len(self.stages)} stages."]
        links: dict[str, list[Tap]] = {}
        for tap in sorted(self.taps):
            links.setdefault(tap.link, []).append(tap)
        alike: dict[tuple[str, tuple[str, ...]], list[Tap]] = {}
        for taps in links.values():
            pairs = tuple(f"{tap.source_layer} to {tap.target_layer}" for tap in taps)
            alike.setdefault((taps[0].target, pairs), []).append(taps[0])
        for (target, pairs), first in alike.items():
            which, each = ("Link", "") if len(first) == 1 else (f"{len(first)} links", " each")
            lines.append(
                f"{which} {_some([tap.link for tap in first], ', ')}: {target} reads "
                f"{_some([tap.source for tap in first], ', ')} at {len(pairs)} taps{each} "
                f"(source layer to target layer): {_some(pairs, ', ')}."
            )
        readers = {tap.target for tap in self.taps}
        alone = [name for name, _ in self.depths if name not in readers]
        if alone:
            lines.append(f"Read no other tower: {', '.join(alone)}.")
        return "\n".join(lines)


def make_schedule(depths: Mapping[str, int], links: Iterable[LinkSpec]) -> Schedule:
    r"""Sort all layers and taps topologically into the fewest stages.

    >>> str(make_schedule({"text": 2}, []))
    'stage 1: embed text\nstage 2: run text layer 1\nstage 3: run text layer 2'
    """
    crossings: dict[Layer, list[Tap]] = {}
    for link in links:
        for source_layer, target_layer in link.resolve(depths[link.source], depths[link.target]):
            tap = Tap(link.name, link.source, source_layer, link.target, target_layer)
            crossings.setdefault((link.target, target_layer), []).append(tap)
    steps: nx.DiGraph[Step] = nx.DiGraph()
    for tower, depth in depths.items():
        chain = []
        for index in range(depth + 1):
            chain.append(Step(tower, index))
            if (tower, index) in crossings:
                chain.append(Step(tower, index, tuple(sorted(crossings[tower, index]))))
        nx.add_path(steps, chain)
    for step in list(steps):
        for tap in step.taps:
            steps.add_edge(Step(tap.source, tap.source_layer), step)
    try:
        stages = tuple(
            tuple(sorted(stage, key=lambda step: (step.tower, step.layer)))
            for stage in nx.topological_generations(steps)
        )
    except nx.NetworkXUnfeasible:
        raise GraphError(_describe_cycle(steps)) from None
    return Schedule(tuple(sorted(depths.items())), stages)


def _in_turn(stages: Iterable[Iterable[Step]]) -> tuple[Step, ...]:
    """Order steps so that each tower runs as far as it can before the next one starts.

    This improves the locality of the CPU's caches.
    """
    waiting: dict[str, deque[Step]] = {}
    for step in itertools.chain.from_iterable(stages):
        waiting.setdefault(step.tower, deque()).append(step)
    steps: list[Step] = []
    done: set[Layer] = set()
    before = -1
    while len(steps) > before:
        before = len(steps)
        for rest in waiting.values():
            while rest and all((tap.source, tap.source_layer) in done for tap in rest[0].taps):
                steps.append(rest.popleft())
                done.add((steps[-1].tower, steps[-1].layer))
    return tuple(steps)


def _layer(tower: str, layer: int) -> str:
    return f"{tower} layer {layer}" if layer else f"the embedding of {tower}"


def _describe_cycle(steps: nx.DiGraph[Step]) -> str:
    cycle = [edge[0] for edge in nx.find_cycle(steps)]
    reads: list[Tap] = []
    lines = []
    for step, before in zip(cycle, [cycle[-1], *cycle], strict=False):
        waits = [tap for tap in step.taps if before == Step(tap.source, tap.source_layer)]
        reads += waits
        lines.append(f"  {Step(step.tower, step.layer, tuple(waits)) if waits else step}")
    deepest = max(reads, key=lambda tap: tap.source_layer - tap.target_layer)
    return (
        "these layers wait for each other, each for the one above it and the first for the last:\n"
        + "\n".join(lines)
        + "\nTo break the circle let a tap read an earlier layer or stand after a later one: for instance "
        f"tap ({deepest.source_layer}, {deepest.target_layer}) of link {deepest.link!r} reads layer "
        f"{deepest.source_layer} of {deepest.source!r} already after layer {deepest.target_layer} of "
        f"{deepest.target!r}"
    )


def _some(parts: Sequence[str], separator: str, most: int = 6) -> str:
    """Join parts; if there are more than ``most``, only the first ones and the last.

    >>> _some(["a", "b", "c", "d", "e", "f", "g"], ", "), _some(["a", "b"], "; ")
    ('a, b, c, d, ..., g', 'a; b')
    """
    shown = list(parts) if len(parts) <= most else [*parts[: most - 2], "...", parts[-1]]
    return separator.join(shown)
