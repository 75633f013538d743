"""Hypothesis strategies for towers, graphs, examples, and models with examples.

They need hypothesis, which is part of the extra ``testing``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from ..batch.collate import Example, Segment
from ..compile.schedule import make_schedule
from ..declare.graph import FusionGraph
from ..declare.spec import ADAPTERS, GATES, MEMORIES, PROJECTIONS, LinkSpec
from ..errors import GraphError
from ..link.cross_attention import default_heads
from ..model import FusedModel
from ..tower import Tower
from .tiny import TinyTower, tiny_tower

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Dtypes of drawn towers."""


class Case:
    """A fused model and examples; its repr shows the declaration instead of the modules."""

    def __init__(self, model: FusedModel, examples: Sequence[Example]) -> None:
        self.model, self.examples = model, examples

    def __repr__(self) -> str:
        towers = {name: self.model.tower(name) for name in self.model.towers}
        sizes = "".join(
            f"\n  {name}: {each.depth} layers of {each.width}, {next(each.parameters()).dtype}, "
            f"{self.model.graph.towers[name]}"
            for name, each in towers.items()
        )
        links = "".join(f"\n  {link}" for link in self.model.graph.links.values())
        return f"{sizes}{links}\n  examples {self.examples}"


@st.composite
def tiny_towers(draw: st.DrawFn, *, dtypes: Sequence[torch.dtype] = DTYPES) -> TinyTower:
    """Draw small random towers in plain PyTorch: 1 to 5 layers of various widths and vocabulary sizes.

    >>> from hypothesis import find
    >>> find(tiny_towers(), lambda tower: tower.depth > 2).depth
    3

    Args:
        draw: Passed by hypothesis.
        dtypes: The dtypes to draw from.
    """
    tower = tiny_tower(
        draw(st.integers(0, 99)),
        depth=draw(st.integers(1, 5)),
        width=draw(st.integers(2, 12)),
        vocab_size=draw(st.integers(3, 20)),
    )
    return tower.to(draw(st.sampled_from(dtypes)))


@st.composite
def graphs(
    draw: st.DrawFn, *, towers: st.SearchStrategy[Tower] | None = None, most_towers: int = 6
) -> FusionGraph:
    """Draw graphs that compile: 2 to 6 towers, and links of every kind between them.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=3, derandomize=True, deadline=None)
    ... @given(graphs())
    ... def test_compiles(graph):
    ...     assert graph.compile().schedule.taps
    >>> test_compiles()

    Args:
        draw: Passed by hypothesis.
        towers: A strategy that returns a new tower each time; ``tiny_towers()`` by default. To include your
            own: ``st.one_of(tiny_towers(), st.builds(MyTower, depth=st.integers(1, 4)))``.
        most_towers: Maximal number of towers.
    """
    names = draw(st.permutations("abcdef"[: draw(st.integers(2, most_towers))]))
    if towers is None:
        dtypes = draw(st.sampled_from([*((dtype,) for dtype in DTYPES), DTYPES]))
        towers = tiny_towers(dtypes=dtypes)
    drawn = {name: draw(towers) for name in names}
    graph = FusionGraph()
    for name, tower in drawn.items():
        adapter, train = draw(st.sampled_from(ADAPTERS)), draw(st.sampled_from(["none", "all"]))
        memory = draw(st.sampled_from(MEMORIES)) if tower.packs else "all"
        graph.add_tower(name, tower, train=train, adapter=adapter, memory=memory)
    depths = {name: tower.depth for name, tower in drawn.items()}
    for link in draw(_acyclic_links(depths, least=1)):
        width = drawn[link.target].width
        heads = draw(st.sampled_from([None, *(each for each in range(1, width + 1) if width % each == 0)]))
        even = width // (heads or default_heads(width, even=True)) % 2 == 0
        graph.add_link(
            link.source,
            link.target,
            name=link.name,
            interleave=link.interleave,
            taps=link.taps,
            embeddings=link.embeddings,
            gate=draw(st.sampled_from(GATES)),
            projection=draw(st.sampled_from(PROJECTIONS)),
            heads=heads,
            position=(position := draw(st.sampled_from(["rotary", "segment", None])) if even else None),
            pace=draw(st.sampled_from([1.0, 2.5, 0.25])) if position == "segment" else 1.0,
            window=draw(st.none() | st.integers(1, 4)),
            feed_forward=draw(st.booleans()),
            relative=draw(st.booleans()),
        )
    return graph


@st.composite
def examples(draw: st.DrawFn, vocabularies: Mapping[str, int], *, most_rows: int = 3) -> list[Example]:
    """Draw batches of examples: segments of some towers in any order, one by one or simultaneous.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=3, derandomize=True, deadline=None)
    ... @given(examples({"a": 5, "b": 5}))
    ... def test(rows):
    ...     assert 1 <= len(rows) <= 3
    >>> test()

    Args:
        draw: Passed by hypothesis.
        vocabularies: The vocabulary size of each tower.
        most_rows: Maximal number of examples.
    """
    names = st.sampled_from(sorted(vocabularies))

    def segment(name: str) -> st.SearchStrategy[Segment]:
        tokens = st.lists(st.integers(0, vocabularies[name] - 1), min_size=1, max_size=4)
        return st.builds(Segment, st.just(name), tokens, st.booleans())

    together = st.lists(names, unique=True, min_size=1, max_size=3).flatmap(
        lambda chosen: st.tuples(*map(segment, chosen))
    )
    entries = names.flatmap(segment) | together
    return draw(st.lists(st.lists(entries, min_size=1, max_size=4), min_size=1, max_size=most_rows))


@st.composite
def cases(draw: st.DrawFn, *, towers: st.SearchStrategy[Tower] | None = None, most_towers: int = 6) -> Case:
    """Draw a compiled model, declared by ``graphs``, and examples for it.

    >>> from hypothesis import given, settings
    >>> from multitower.testing import check_causality
    >>> @settings(max_examples=2, derandomize=True, deadline=None)
    ... @given(cases())
    ... def test_causality(case):
    ...     check_causality(case.model, case.examples)
    >>> test_causality()

    Args:
        draw: Passed by hypothesis.
        towers: As in ``graphs``.
        most_towers: Maximal number of towers.
    """
    graph = draw(graphs(towers=towers, most_towers=most_towers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 99)))
        model = graph.compile().eval()
    vocabularies = {name: model.tower(name).vocab_size for name in model.towers}
    return Case(model, draw(examples(vocabularies)))


@st.composite
def _acyclic_links(draw: st.DrawFn, depths: Mapping[str, int], *, least: int = 0) -> list[LinkSpec]:
    """Draw links whose layers form no cycle; there may be several between the same pair."""
    links: list[LinkSpec] = []
    for link in draw(_links_among(depths, least=least)):
        try:
            make_schedule(depths, [*links, link])
        except GraphError:
            continue
        links.append(link)
    return links


@st.composite
def _links_among(draw: st.DrawFn, depths: Mapping[str, int], *, least: int = 0) -> list[LinkSpec]:
    """Draw links with any form of ``interleave`` or with ``taps``; their layers may form cycles."""
    pairs = st.lists(st.sampled_from(sorted(depths)), unique=True, min_size=2, max_size=2)
    links = []
    for number, (source, target) in enumerate(draw(st.lists(pairs, min_size=least, max_size=8))):
        name = f"{draw(st.sampled_from('xyz'))}{number}"
        crossing = draw(_crossings(depths[source], depths[target]))
        links.append(LinkSpec(source, target, name=name, **crossing))
    return links


def _crossings(source_depth: int, target_depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Draw ``interleave`` or ``taps`` of a link, as keyword arguments for ``add_link``."""
    source, target = st.integers(1, source_depth), st.integers(1, target_depth)
    tap = st.tuples(st.integers(0, source_depth), st.integers(0, target_depth))
    taps = st.lists(tap, unique=True, min_size=1, max_size=4).map(tuple)
    return st.one_of(
        st.fixed_dictionaries({"interleave": target, "embeddings": st.booleans()}),
        st.fixed_dictionaries({"interleave": st.tuples(source, target), "embeddings": st.booleans()}),
        st.fixed_dictionaries({"taps": taps}),
    )


@st.composite
def structures(draw: st.DrawFn) -> tuple[dict[str, int], list[LinkSpec]]:
    """Draw the depths of 2 to 6 towers, and links between them whose layers may form cycles.

    >>> from hypothesis import find
    >>> find(structures(), lambda case: len(case[1]) == 0)
    ({'a': 1, 'b': 1}, [])
    """
    depths = draw(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 6), min_size=2))
    return depths, draw(_links_among(depths))


@st.composite
def cyclic_structures(draw: st.DrawFn) -> tuple[dict[str, int], list[LinkSpec]]:
    """Draw depths and links with at least one cycle: a ring of towers, each read above its tap.

    >>> from hypothesis import given, settings
    >>> from multitower.testing import check_schedule
    >>> @settings(max_examples=3, derandomize=True, deadline=None)
    ... @given(cyclic_structures())
    ... def test_cycles_are_shown(structure):
    ...     check_schedule(*structure)
    >>> test_cycles_are_shown()
    """
    depths = draw(st.dictionaries(st.sampled_from("abcdef"), st.integers(2, 6), min_size=2))
    names = draw(st.permutations(sorted(depths)))
    ring = names[: draw(st.integers(2, len(names)))]
    tapped = {name: draw(st.integers(1, depths[name] - 1)) for name in ring}
    links = [
        LinkSpec(
            source,
            target,
            name=f"ring{number}",
            taps=((draw(st.integers(tapped[source] + 1, depths[source])), tapped[target]),),
        )
        for number, (source, target) in enumerate(zip(ring, [*ring[1:], ring[0]], strict=True))
    ]
    return depths, draw(st.permutations(links + draw(_links_among(depths))))
