from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import multitower as mt
from multitower.declare.spec import LinkSpec
from multitower.declare.stored import stored_graph


@pytest.fixture
def graph() -> mt.FusionGraph:
    graph = mt.FusionGraph()
    graph.add_tower("speech", "speech-model", train="all")
    graph.add_tower("text", "text-model", adapter=None)
    return graph


def test_json_round_trip(graph: mt.FusionGraph) -> None:
    graph.add_link("speech", "text", interleave=(1, 2), embeddings=True, projection="relu", gate="tanh")
    graph.add_link("text", "speech", interleave=2, heads=4, feed_forward=True)
    graph.add_link("text", "speech", taps=[(0, 1)], name="extra")
    again = mt.FusionGraph.from_json(graph.to_json())
    assert again == graph
    assert list(again.links) == ["speech->text", "text->speech", "extra"]


def test_a_graph_stored_before_links_were_relative_has_none_that_are(graph: mt.FusionGraph) -> None:
    graph.add_link("speech", "text", interleave=1, relative=False)
    stored = graph.to_dict()
    del stored["links"][0]["relative"]
    assert stored_graph(stored) == graph
    assert mt.FusionGraph.from_dict(stored).links["speech->text"].relative, "as add_link has it"


def test_networkx_sees_parallel_links(graph: mt.FusionGraph) -> None:
    graph.add_link("speech", "text", interleave=1)
    graph.add_link("speech", "text", taps=[(1, 1)], name="second")
    network = graph.to_networkx()
    assert sorted(network.nodes) == ["speech", "text"]
    assert sorted(key for *_, key in network.edges(keys=True)) == ["second", "speech->text"]


def test_parallel_links_need_a_name(graph: mt.FusionGraph) -> None:
    graph.add_link("speech", "text", interleave=1)
    with pytest.raises(mt.errors.GraphError, match="there is a link 'speech->text' already"):
        graph.add_link("speech", "text", interleave=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"source": "music", "target": "text", "interleave": 1},
            "no tower 'music'; towers so far: speech, text",
        ),
        ({"source": "text", "target": "text", "interleave": 1}, "cannot read itself"),
        ({"interleave": 0}, "positive whole number"),
        ({"interleave": (1, 2, 3)}, "pair"),
        ({"interleave": 1.5}, "positive whole number"),
        ({}, "give either interleave"),
        ({"interleave": 1, "taps": [(1, 1)]}, "give either interleave"),
        ({"taps": []}, "taps is empty"),
        ({"taps": [(-1, 1)]}, "counted from 1; 0 is what enters layer 1"),
        ({"taps": [(1, True)]}, "counted from 1; 0 is what enters layer 1"),
        ({"taps": [(1, 1)], "embeddings": True}, r"add \(0, 0\) to taps instead"),
        ({"interleave": 1, "embeddings": 1}, "embeddings=1 must be True or False"),
        ({"interleave": 1, "gate": "sigmoid"}, "gate='sigmoid' is unknown; choose one of 'tanh', None"),
        ({"taps": [(1, 1), (1, 1)]}, "twice"),
        ({"interleave": 1, "projection": "cubic"}, "choose one of 'mlp', 'linear', 'relu', 'none'"),
        ({"interleave": 1, "heads": 0}, "heads=0"),
        ({"interleave": 1, "position": "absolute"}, "choose one of 'rotary', 'segment', None"),
        ({"interleave": 1, "position": "segment", "pace": 0}, "pace=0 must be a positive number"),
        (
            {"interleave": 1, "position": "segment", "pace": float("nan")},
            "pace=nan must be a positive number",
        ),
        (
            {"interleave": 1, "position": "rotary", "pace": 7.5},
            "a pace needs position='segment', not 'rotary'",
        ),
        ({"interleave": 1, "window": 0}, "window=0 must be a positive whole number of tokens"),
        ({"interleave": 1, "feed_forward": 4}, "feed_forward=4 must be True or False"),
        ({"interleave": 1, "name": "a.b"}, "link name"),
        ({"interleave": 1, "name": "type"}, "attribute of torch modules"),
    ],
)
def test_bad_links_teach(graph: mt.FusionGraph, arguments: dict, message: str) -> None:
    before = graph.to_dict()
    with pytest.raises(mt.errors.GraphError, match=message):
        graph.add_link(**{"source": "speech", "target": "text", **arguments})
    assert graph.to_dict() == before


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("text", {"source": "x"}, "there is a tower 'text' already"),
        ("a.b", {"source": "x"}, "letters, digits"),
        ("keys", {"source": "x"}, "attribute of torch modules"),
        ("training", {"source": "x"}, "attribute of torch modules"),
        ("new", {"source": 3}, "expected a folder, a Hub id or a module, not int"),
        ("new", {"source": "x", "train": "some"}, "tower 'new': train='some' is unknown"),
        ("new", {"source": "x", "adapter": "big"}, "adapter='big' is unknown"),
    ],
)
def test_bad_towers_teach(graph: mt.FusionGraph, name: str, arguments: dict, message: str) -> None:
    with pytest.raises(mt.errors.GraphError, match=message):
        graph.add_tower(name, **arguments)
    assert list(graph.towers) == ["speech", "text"]


def test_empty_graph_does_not_compile() -> None:
    with pytest.raises(mt.errors.GraphError, match="no towers"):
        mt.FusionGraph().compile()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"towers": [{"nam": 1}], "links": []}', "not json"])
def test_damaged_json(text: str) -> None:
    with pytest.raises(mt.errors.GraphError, match="this is not"):
        mt.FusionGraph.from_json(text)


def test_layer_out_of_range() -> None:
    link = LinkSpec("speech", "text", name="speech->text", taps=((3, 1),))
    with pytest.raises(
        mt.errors.GraphError, match=r"tap \(3, 1\) names layer 3 of tower 'speech', which has layers 1 to 2"
    ):
        link.resolve(2, 2)


def test_interleave_that_leaves_no_tap() -> None:
    with pytest.raises(mt.errors.GraphError, match="leaves no tap"):
        LinkSpec("speech", "text", name="speech->text", interleave=(3, 1)).resolve(2, 2)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
def test_pair_interleave_is_the_papers(source_depth: int, target_depth: int, i: int, j: int) -> None:
    link = LinkSpec("a", "b", name="a->b", interleave=(i, j))
    expected = tuple((n * i, n * j) for n in range(1, 13) if n * i <= source_depth and n * j <= target_depth)
    if expected:
        assert link.resolve(source_depth, target_depth) == expected
    else:
        with pytest.raises(mt.errors.GraphError):
            link.resolve(source_depth, target_depth)
