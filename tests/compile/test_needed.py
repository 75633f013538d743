"""Only steps whose results are needed are run."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import multitower as mt
from models import causal_lm, segment
from multitower.batch.collate import make_streams
from multitower.compile.schedule import make_schedule
from multitower.declare.spec import LinkSpec
from multitower.generate.tap_cache import TapCache
from multitower.testing import open_links, tiny_tower


def chain() -> mt.FusedModel:
    """Link image to speech and speech to text, at layers below the last."""
    graph = mt.FusionGraph()
    for seed, name in enumerate(("image", "speech", "text")):
        graph.add_tower(name, tiny_tower(seed, depth=4), train="all", adapter=None)
    graph.add_link("image", "speech", taps=[(1, 1), (3, 3)])
    graph.add_link("speech", "text", taps=[(2, 2)])
    return open_links(graph.compile().eval())


def counted(model: mt.FusedModel) -> Counter[str]:
    """Count how often each layer, head and tap runs from now on."""
    ran: Counter[str] = Counter()
    for name, tower in model.towers.items():
        for index, layer in enumerate(tower.layers, 1):
            layer.register_forward_hook(lambda *_, what=f"{name} {index}": ran.update([what]))
        tower.norm.register_forward_hook(lambda *_, what=f"{name} head": ran.update([what]))
    for tap in model.schedule.taps:
        what = f"{tap.link} {tap.key}"
        model.tap(tap).register_forward_hook(lambda *_, what=what: ran.update([what]))
    return ran


def batch(*targets: str) -> dict:
    return mt.collate([[segment(name, 3, target=name in targets) for name in ("image", "speech", "text")]])


def test_without_logits_only_what_a_label_needs_is_run() -> None:
    model = chain()
    ran = counted(model)
    out = model(**batch("text"), logits=False)
    assert out.logits == {}
    assert out.losses["image"] == 0
    text = {f"text {index}": 1 for index in range(1, 5)} | {"text head": 1, "speech->text 2-2": 1}
    below = {"speech 1": 1, "speech 2": 1, "image 1": 1, "image->speech 1-1": 1}
    assert ran == text | below


def test_with_logits_everything_is_run_once() -> None:
    model = chain()
    ran = counted(model)
    assert set(model(**batch("text")).logits) == {"image", "speech", "text"}
    assert len(ran) == 3 * 5 + 3
    assert set(ran.values()) == {1}


def test_without_any_label_there_is_a_loss_of_zero_to_go_back_from() -> None:
    out = chain()(**batch(), logits=False)
    out.loss.backward()
    assert out.loss == 0


def test_without_streams_that_have_labels_nothing_is_run() -> None:
    model = chain()
    ran = counted(model)
    streams = batch()["streams"]
    for stream in streams.values():
        del stream["labels"]
    out = model(streams, logits=False)
    assert out.loss is None
    assert not ran


def test_decoding_runs_sources_up_to_the_last_layer_that_is_read() -> None:
    model = chain()
    ran = counted(model)
    streams = make_streams([[segment("image", 3), segment("speech", 3)]])
    with torch.no_grad():
        assert len(TapCache.fill(model, streams, ["text"]).entries) == 1
    assert ran == {"speech 1": 1, "speech 2": 1, "image 1": 1, "image->speech 1-1": 1}


def test_a_link_that_sees_nothing_makes_its_source_needless() -> None:
    model = chain()
    ran = counted(model)
    example = [segment("text", 3, target=True), segment("speech", 3), segment("image", 3)]
    model(**mt.collate([example]), logits=False)
    assert {what.split()[0] for what in ran} == {"text"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"voice": 1}, "layer 1 of 'voice' is wanted, but the batch has streams for text, speech alone"),
        ({"image": 1}, "layer 1 of 'image' is wanted, but"),
        ({"text": 6}, "layer 6 of 'text' is wanted, which has the layers 1 to 4 .* 5 the state that enters"),
        ({"text": -1}, "layer -1 of 'text' is wanted"),
    ],
)
def test_layers_that_are_not_there_cannot_be_wanted(wanted: dict[str, int], message: str) -> None:
    batch = mt.collate([[segment("text", 3), segment("speech", 3)]])
    with pytest.raises(ValueError, match=message):
        chain().run(batch["streams"], wanted=wanted)


@pytest.mark.parametrize("wanted", [{"a": 1}, {"a": 4}, {"b": 2}, {"b": 3}, {"a": 2, "b": 1}])
def test_what_is_needed_is_what_a_search_backwards_finds(wanted: dict[str, int]) -> None:
    links = [
        LinkSpec("a", "b", name="a->b", taps=((1, 1), (3, 2))),
        LinkSpec("b", "a", name="b->a", taps=((1, 1), (2, 3))),
    ]
    schedule = make_schedule({"a": 3, "b": 2}, links)
    runs, reads = set(), set()

    def given(name: str, layer: int) -> None:
        if layer:
            updated(name, layer - 1)
        if layer <= dict(schedule.depths)[name]:
            runs.add((name, layer))

    def updated(name: str, layer: int) -> None:
        given(name, layer)
        for tap in schedule.taps:
            if (tap.target, tap.target_layer) == (name, layer):
                reads.add(tap)
                given(tap.source, tap.source_layer)

    for name, layer in wanted.items():
        given(name, layer)
    steps = schedule.needed(wanted, ["a->b", "b->a"])
    assert {(step.tower, step.layer) for step in steps if not step.taps} == runs
    assert {tap for step in steps for tap in step.taps} == reads
    assert [step for step in schedule.steps if step in steps] == list(steps)


@pytest.mark.parametrize("train", ["none", "lora"])
def test_heads_run_only_where_some_row_has_a_label(train: str) -> None:
    if train == "lora":
        pytest.importorskip("peft", reason="adapters need the lora extra")
    decoder = causal_lm("llama")
    graph = mt.FusionGraph()
    graph.add_tower("text", decoder, train=train, adapter=None)
    graph.add_tower("speech", tiny_tower(1), train="all", adapter=None)
    graph.add_link("speech", "text", interleave=1)
    model = graph.compile()
    seen: list[torch.Size] = []
    decoder.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.shape[:2]))
    example = [
        mt.Segment("text", [1, 4, 5, 2]),
        segment("speech", 3),
        mt.Segment("text", [1, 3, 2], target=True),
    ]
    model(**mt.collate([example, example]), logits=False)
    model(**mt.collate([example, example[1:]]), logits=False)
    assert seen == [(2, 2), (2, 4)]
