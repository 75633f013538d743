"""Each check of models fails if its promise is broken."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import multitower as mt
from models import causal_lm, segment
from multitower.compile.schedule import Schedule, Step, Tap
from multitower.generate import tap_cache as cache
from multitower.generate.advance import Keeping
from multitower.link.attention import Visibility
from multitower.link.cross_attention import GatedCrossAttention
from multitower.run import fusion, tables
from multitower.run.fusion import Fusion
from multitower.run.output import States
from multitower.testing import (
    MODEL_PROMISES,
    TinyTower,
    check_gradients,
    check_model,
    model_report,
    open_links,
    tiny_tower,
)

EXAMPLES = [
    [segment("speech", 5, 6), segment("text", 9, 3, target=True), segment("speech", 4)],
    [segment("text", 4), (segment("speech", 9, 3, 2), segment("text", 2)), segment("music", 7)],
    [segment("text", 11), segment("text", 6)],
]


def make_model(text: torch.nn.Module | None = None) -> mt.FusedModel:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(0, depth=3, width=12), train="all", adapter="residual")
    graph.add_tower("text", text or tiny_tower(1))
    graph.add_tower("music", tiny_tower(2, depth=1), adapter="paper")
    graph.add_link("speech", "text", interleave=1, embeddings=True, window=2, feed_forward=True)
    graph.add_link(
        "text", "speech", interleave=1, position="rotary", gate="tanh", projection="mlp", feed_forward=True
    )
    graph.add_link("text", "music", taps=[(2, 1)])
    graph.add_link("speech", "music", taps=[(1, 1), (2, 1)], name="again")
    torch.manual_seed(5)
    return graph.compile()


def patched(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, change: Callable) -> None:
    """Patch a function with ``change``, which receives the original function as its first argument."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: object, **kwargs: object) -> object:
        return change(original, *args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)


def sees_the_present(original: Callable, query_times: torch.Tensor, *args: object) -> Visibility:
    return original(query_times + 1, *args)


def sees_padding(
    original: Callable, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, *args: object
) -> Visibility:
    return original(query, key, torch.ones_like(mask), *args)


def sees_always(original: Callable, *args: object) -> Visibility:
    seen = original(*args)
    return Visibility(seen.mask, None)


def forgets_examples(original: Callable, stream: dict) -> Tensor:
    return stream["times"]


def without_a_window(original: Callable, *args: object) -> Visibility:
    return original(*args[:3], None, *args[4:])


def one_after_the_other(
    original: Callable, model: Fusion, taps: tuple, states: States, *args: object
) -> torch.Tensor:
    for tap in taps:
        states.hidden[tap.target] = original(model, (tap,), states, *args)
    return states.hidden[taps[0].target]


def reads_before_the_adapter(
    original: Callable, model: Fusion, taps: tuple, states: States, *args: object
) -> torch.Tensor:
    table = model.tower("speech").table.weight
    embedded = states.given.get(("speech", 0))
    if embedded is None:
        return original(model, taps, states, *args)
    bare = table[torch.cdist(embedded.detach(), table).argmin(-1)]
    given = {**states.given, ("speech", 0): bare}
    return original(model, taps, states._replace(given=given), *args)


def forgets_a_tap(original: Callable, self: object, *args: object) -> None:
    original(self, *args)
    if self.reads:
        self.reads[min(self.reads)].pop()


def forgets_to_note_a_tap(original: Callable, self: Keeping, name: str) -> list[Tap]:
    return original(self, name)[1:]


def grows_once(original: Callable, self: cache.TapCache, tap: Tap, states: Tensor, *args: object) -> None:
    if args[-1] + states.shape[1] < 3:
        original(self, tap, states, *args)


def wakes_frozen_towers(original: Callable, self: mt.FusedModel, mode: bool = True) -> mt.FusedModel:
    return torch.nn.Module.train(self, mode)


def adapts(original: Callable, self: mt.FusedModel, name: str) -> torch.nn.Module:
    twin = copy.copy(self.tower(name))
    embed = twin.embed
    twin.embed = lambda tokens: (self.adapt(name, embed(tokens)[0]), embed(tokens)[1])
    return twin


def forgets_what_it_read(
    original: Callable, self: GatedCrossAttention, source: torch.Tensor, *args: object
) -> object:
    return original(self, source.detach(), *args)


def leaks_when_closed(
    original: Callable, self: GatedCrossAttention, x: torch.Tensor, *args: object
) -> torch.Tensor:
    return original(self, x, *args) + 1e-6


def loads_closed_gates(original: Callable, *args: object, **options: object) -> mt.FusedModel:
    return open_links(original(*args, **options), scale=0.0)


def trains_all(original: Callable, self: mt.FusedModel, *args: object) -> None:
    original(self, *args)
    self.requires_grad_(True)


def forgets_a_label(original: Callable, streams: dict) -> list[str]:
    return list(original(streams))[1:]


def forgets_needed_taps(
    original: Callable, self: Schedule, wanted: dict[str, int], *args: object
) -> tuple[Step, ...]:
    steps = original(self, wanted, *args)
    return steps if len(wanted) > 1 else tuple(step for step in steps if not step.taps)


BREAKAGES = {
    "sees the present": ((tables, "visibility", sees_the_present), {"causality", "definition", "sight"}),
    "sees padding": ((tables, "visibility", sees_padding), {"padding", "definition", "rows"}),
    "blind tokens get a feed-forward": ((tables, "visibility", sees_always), {"sight", "definition"}),
    "no window": ((tables, "visibility", without_a_window), {"definition"}),
    "no window in decoding": ((cache, "visibility", without_a_window), {"decoding"}),
    "links in sequence": ((Fusion, "_tapped", one_after_the_other), {"order", "definition"}),
    "embeddings are read before the adapter": ((Fusion, "_tapped", reads_before_the_adapter), {"definition"}),
    "a tap forgotten in decoding": ((cache.TapReader, "__init__", forgets_a_tap), {"decoding"}),
    "a tap not kept between outputs": (
        (Keeping, "readers", forgets_to_note_a_tap),
        {"decoding", "session"},
    ),
    "a tap that stops growing": ((cache.TapCache, "grow", grows_once), {"decoding"}),
    "frozen towers train": ((mt.FusedModel, "train", wakes_frozen_towers), {"frozen"}),
    "a loss is forgotten": ((fusion, "with_labels", forgets_a_label), {"losses"}),
    "taps that a loss needs are forgotten": ((Schedule, "needed", forgets_needed_taps), {"losses"}),
    "everything is trained": ((mt.FusedModel, "__init__", trains_all), {"frozen"}),
    "unimodal adapts": ((mt.FusedModel, "unimodal", adapts), {"unimodal"}),
    "sources are detached": ((GatedCrossAttention, "read", forgets_what_it_read), {"gradients"}),
    "closed gates leak": ((GatedCrossAttention, "forward", leaks_when_closed), {"identity", "sight"}),
    "packed examples see each other": ((tables, "moments", forgets_examples), {"packing"}),
    "gates are lost on disk": ((mt.FusedModel, "from_pretrained", loads_closed_gates), {"saved"}),
}


def test_a_good_model_keeps_every_promise() -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_model(model, EXAMPLES)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("seed", [7, 10, 69])
def test_rounding_in_half_precision_breaks_no_promise(seed: int) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(0))
    graph.add_tower("text", tiny_tower(1, depth=4, width=11).to(torch.bfloat16))
    graph.add_tower("music", tiny_tower(2))
    graph.add_link("speech", "text", interleave=1, position=None)
    graph.add_link("text", "music", interleave=1)
    torch.manual_seed(seed)
    rows = [
        [mt.Segment("speech", [5, 6]), mt.Segment("text", [9, 3]), mt.Segment("speech", [4])],
        [
            mt.Segment("text", [4]),
            (mt.Segment("speech", [9, 3, 2]), mt.Segment("text", [2])),
            mt.Segment("music", [7]),
        ],
        [mt.Segment("text", [11]), mt.Segment("text", [6])],
    ]
    check_gradients(graph.compile(), rows)


def test_models_with_peft_adapters_keep_every_promise() -> None:
    peft = pytest.importorskip("peft", reason="adapters need the lora extra")
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(0), train=peft.LoraConfig(target_modules=["attention"]))
    graph.add_tower("text", causal_lm("llama"), train="lora")
    graph.add_tower("music", tiny_tower(1))
    for source, target in (("speech", "text"), ("text", "speech"), ("speech", "music")):
        graph.add_link(source, target, interleave=1)
    check_model(graph.compile(), EXAMPLES)


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_is_broken_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (owner, attribute, change), promises = BREAKAGES[name]
    patched(monkeypatch, owner, attribute, change)
    report = model_report(make_model(), EXAMPLES, promises=promises)
    assert {name for name, reason in report.items() if reason} == promises


def test_a_prompt_that_is_read_otherwise_in_chunks_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def always_from_the_start(
        original: Callable, self: object, layer: int, x: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        return original(self, layer, x, positions - positions[0] if len(positions) > 1 else positions)

    graph = mt.FusionGraph()  # no tower reads text; otherwise its prompt would run for the reader
    graph.add_tower("speech", tiny_tower(0))
    graph.add_tower("text", causal_lm("llama", width=8))
    graph.add_link("speech", "text", interleave=1, position="rotary")
    model = graph.compile()
    examples = [[segment("text", 4, 5, 6), segment("speech", 5, 6, 7), segment("text", 4, 5, 6)]]
    assert not model_report(model, examples, promises=["prefill"])["prefill"]
    patched(monkeypatch, cache.TapReader, "__call__", always_from_the_start)
    assert "in chunks of" in model_report(model, examples, promises=["prefill"])["prefill"]


def test_every_promise_can_be_broken() -> None:
    assert set().union(*(promises for _, promises in BREAKAGES.values()), {"schedule", "prefill"}) == set(
        MODEL_PROMISES
    )


class Peeking(TinyTower):
    def layer(self, index: int, hidden: torch.Tensor, context: None) -> torch.Tensor:
        return super().layer(index, hidden, context) + hidden.mean(1, keepdim=True)


def test_a_tower_that_breaks_promises_is_named_with_the_reasons() -> None:
    with pytest.raises(AssertionError, match="the model breaks 2 of 3 promises") as caught:
        check_model(
            make_model(Peeking(2, 8, 16).eval()), EXAMPLES, promises=["identity", "causality", "rows"]
        )
    message = str(caught.value)
    assert "\n  causality: example 0: the token of 'text' at time" in message
    assert "\n  rows: tower 'speech': row" in message


def test_what_a_tower_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(original: Callable, *args: object) -> None:
        raise RuntimeError("out of paper")

    patched(monkeypatch, TinyTower, "head", fails)
    assert (
        model_report(make_model(), EXAMPLES, promises=["causality"])["causality"]
        == "RuntimeError: out of paper"
    )


def test_a_promise_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no promise 'sigth', only schedule, identity, "):
        model_report(make_model(), EXAMPLES, promises=["sigth"])
