"""Graphs of every shape: compiled, trained for a step, decoded, saved and loaded."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import multitower as mt
from models import causal_lm
from multitower.compile.schedule import make_schedule
from multitower.declare.spec import PROJECTIONS, LinkSpec
from multitower.testing import open_links, tiny_tower

Shape = tuple[int, list[tuple[int, int]]]

SHAPES: dict[str, Shape] = {
    "one tower": (1, []),
    "no links": (3, []),
    "two components": (5, [(0, 1), (1, 0), (2, 3), (3, 4)]),
    "a tower apart": (3, [(0, 1)]),
    "towers nobody reads": (4, [(0, 1), (0, 2), (0, 3)]),
    "star inwards": (5, [(n, 0) for n in range(1, 5)]),
    "star both ways": (5, [pair for n in range(1, 5) for pair in ((0, n), (n, 0))]),
    "chain": (5, [(n, n + 1) for n in range(4)]),
    "ring": (6, [(n, (n + 1) % 6) for n in range(6)]),
    "ring both ways": (4, [pair for n in range(4) for pair in ((n, (n + 1) % 4), ((n + 1) % 4, n))]),
    "complete": (4, list(itertools.permutations(range(4), 2))),
    "sixteen in a ring": (16, [(n, (n + 1) % 16) for n in range(16)]),
    "sixteen, complete": (16, list(itertools.permutations(range(16), 2))),
}


def towers(shape: str, seed: int = 0) -> dict[str, torch.nn.Module]:
    """Return towers of different width and depth."""
    return {
        f"t{n}": tiny_tower(seed + n, depth=1 + n % 3, width=4 * (1 + n % 2), vocab_size=10 + n)
        for n in range(SHAPES[shape][0])
    }


def declare(shape: str) -> mt.FusionGraph:
    graph, chosen = mt.FusionGraph(), towers(shape)
    for n, (name, tower) in enumerate(chosen.items()):
        frozen = n % 3 == 0 and len(chosen) > 1
        graph.add_tower(name, tower, train="none" if frozen else "all")
    for source, target in SHAPES[shape][1]:
        graph.add_link(f"t{source}", f"t{target}", interleave=1)
    return graph


def examples(names: list[str]) -> list[list[mt.Segment]]:
    forth = [mt.Segment(name, [1, 5, 6, 2], target=True) for name in names]
    back = [mt.Segment(name, [1, 4, 2], target=True) for name in reversed(names)]
    return [forth, [*back, *forth[:1]]]


QUICK = ("one tower", "two components", "towers nobody reads", "star both ways", "complete")
"""Different kinds of graphs; the other shapes are larger, and hypothesis draws graphs of all kinds."""


@pytest.mark.parametrize(
    "shape", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in SHAPES]
)
def test_every_shape_lives_its_life(shape: str, tmp_path: Path) -> None:
    model = declare(shape).compile().eval()
    names = list(model.towers)
    batch = mt.collate(examples(names))
    for name, values in model(**batch).logits.items():
        assert torch.equal(values, model.unimodal(name)(batch["streams"][name]["tokens"]))
    optimizer = torch.optim.SGD(open_links(model).train().parameter_groups(lr=1e-2))
    out = model(**batch)
    out.loss.backward()
    for link in model.links.values():
        for tap in link.values():
            assert tap.out.weight.grad.isfinite().all()
            assert tap.out.weight.grad.any()
    optimizer.step()
    assert out.loss.isfinite()
    wanted = names[-2:]
    given = [[mt.Segment(names[0], [1, 5, 2])], [mt.Segment(name, [1, 3, 2]) for name in names[:3]]]
    decoded = model.generate(given, output=wanted, max_new_tokens=3)
    assert [[part.tower for part in row] for row in decoded] == [wanted, wanted]
    model.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers=towers(shape, seed=50))
    assert again.graph == model.graph
    assert again.schedule == model.schedule
    before = model.eval()(**batch).logits
    for name, values in again(**batch).logits.items():
        assert torch.equal(values, before[name])


@pytest.mark.parametrize("shape", ["no links", "two components", "a tower apart"])
def test_components_do_not_touch_each_other(shape: str) -> None:
    model = open_links(declare(shape).compile().eval())
    batch = mt.collate(examples(list(model.towers)))["streams"]
    together = model(streams=batch).logits
    neighbours = model.graph.to_networkx().to_undirected()
    for name in batch:
        own = {other: stream for other, stream in batch.items() if other in {name, *neighbours[name]}}
        if len(own) < len(batch) and all(set(neighbours[other]) < set(own) for other in own):
            assert torch.equal(model(streams=own).logits[name], together[name])


def test_several_links_between_a_pair_add_up(tmp_path: Path) -> None:
    def compiled(*links: str) -> mt.FusedModel:
        graph = mt.FusionGraph()
        graph.add_tower("speech", tiny_tower(1, depth=4, width=12), adapter=None)
        graph.add_tower("text", tiny_tower(2, depth=4), adapter=None)
        options = {
            "deep": {"taps": [(3, 2), (4, 4)]},
            "early": {"taps": [(1, 2), (1, 3), (2, 3)], "projection": "linear"},
            "near": {"interleave": (2, 2), "window": 2, "position": "rotary"},
        }
        for name in links:
            graph.add_link("speech", "text", name=name, **options[name])
        graph.add_link("text", "speech", taps=[(1, 4)])
        torch.manual_seed(0)
        return graph.compile().eval()

    model, turned = compiled("deep", "early", "near"), compiled("near", "early", "deep")
    open_links(model)
    turned.load_state_dict(model.state_dict())
    batch = mt.collate([[mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 3, 4, 2])]])
    logits = model(**batch, output_attentions=True)
    assert set(logits.attentions) == {"deep", "early", "near"}
    assert torch.equal(turned(**batch).logits["text"], logits.logits["text"])
    for name in ("deep", "early", "near"):
        assert not torch.equal(model.drop(name)(**batch).logits["text"], logits.logits["text"])
    model.save_pretrained(tmp_path / "fused")
    fresh = {"speech": tiny_tower(8, depth=4, width=12), "text": tiny_tower(9, depth=4)}
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers=fresh)
    assert torch.equal(again(**batch).logits["text"], logits.logits["text"])


def test_a_transformers_model_without_links_decodes_as_alone() -> None:
    model = causal_lm("llama")
    graph = mt.FusionGraph()
    graph.add_tower("text", model)
    graph.add_tower("apart", tiny_tower())
    fused = graph.compile()
    given = [[mt.Segment("apart", [1, 3, 2]), mt.Segment("text", [1, 5, 6])]]
    ((decoded,),) = fused.generate(given, output=["text"], max_new_tokens=5)
    alone = model.generate(torch.tensor([[1, 5, 6, 1]]), max_new_tokens=5, pad_token_id=0, do_sample=False)
    assert decoded.tokens.tolist() == alone[0, 3:].tolist()


def complete(towers: int) -> list[LinkSpec]:
    names = [f"tower{number}" for number in range(towers)]
    return [
        LinkSpec(source, target, name=f"{source}->{target}", interleave=1)
        for source, target in itertools.permutations(names, 2)
    ]


def fastest(work: Callable[[], object], tries: int = 3) -> float:
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def test_sixteen_deep_towers_are_scheduled_and_explained_in_little_time_and_space() -> None:
    depths = {f"tower{number}": 32 for number in range(16)}
    links = complete(16)
    assert fastest(lambda: make_schedule(depths, links)) < 2
    schedule = make_schedule(depths, links)
    assert repr(schedule) == "<Schedule of 16 towers: 512 layers and 7680 taps in 65 stages>"
    assert len(str(schedule).splitlines()) == 65
    assert len(str(schedule)) < 20_000
    words = schedule.explain()
    assert len(words.splitlines()) == 18
    assert len(words) < 5_000
    assert "tower3 reads tower0, tower1, tower10, tower11, ..., tower9 at 32 taps each" in words
    assert "1 to 1, 2 to 2, 3 to 3, 4 to 4, ..., 32 to 32." in words


def test_a_circle_among_many_towers_shows_only_what_closes_it() -> None:
    links = [*complete(8), LinkSpec("tower1", "tower2", name="late", taps=((4, 1),))]
    links.append(LinkSpec("tower2", "tower1", name="back", taps=((4, 1),)))
    with pytest.raises(mt.errors.GraphError) as caught:
        make_schedule({f"tower{number}": 4 for number in range(8)}, links)
    message = str(caught.value)
    assert "after tower2 layer 1, read tower1 layer 4\n" in message
    assert "after tower1 layer 1, read tower2 layer 4\n" in message
    assert len(message) < 1_000


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_keys_are_made_of_what_the_projection_gives(projection: str) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(1, depth=2, width=12))
    graph.add_tower("text", tiny_tower(2, depth=2, width=8))
    graph.add_link("speech", "text", interleave=2, projection=projection)
    model = graph.compile()
    (tap,) = (model.tap(each) for each in model.schedule.taps)
    assert tap.key.weight.shape == tap.value.weight.shape == (8, 12 if projection == "none" else 8)
    linear = 12 * 8 + 8
    expected = {"mlp": linear + 2 * (8 * 8 + 8), "linear": linear, "relu": linear, "none": 0}
    assert sum(parameter.numel() for parameter in tap.project.parameters()) == expected[projection]
