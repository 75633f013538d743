"""Initial values, contributions and learning rates of links and input adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.link import cross_attention as link
from multitower.testing import open_links, tiny_model, tiny_tower
from multitower.testing.model.case import remembered
from multitower.testing.strategies import Case, cases


def two(**options: Any) -> mt.FusedModel:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(1, depth=3, width=12), train="all")
    graph.add_tower("text", tiny_tower(2))
    graph.add_link("speech", "text", **{"interleave": 1, **options})
    torch.manual_seed(5)
    return graph.compile().eval()


BATCH = mt.collate([[mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 7, 8, 2], target=True)]])


@given(cases())
def test_a_new_model_is_its_towers(case: Case) -> None:
    streams = mt.collate(case.examples)["streams"]
    for name, logits in case.model(streams).logits.items():
        spec, tokens = case.model.graph.towers[name], streams[name]["tokens"]
        if spec.adapter == "paper":
            continue
        if spec.memory == "all":
            assert torch.equal(logits, case.model.unimodal(name)(tokens))
        for part in remembered(case.model, name, streams[name]):
            torch.testing.assert_close(logits[part], case.model.unimodal(name)(tokens[part]))


def test_last_projections_that_begin_elsewhere_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_set_to_zero", lambda parameters: None)
    model = two()
    assert model.is_open("speech->text")
    assert not torch.equal(
        model(**BATCH).logits["text"], model.unimodal("text")(torch.tensor([[1, 7, 8, 2]]))
    )


@pytest.mark.parametrize("gate", ["tanh", None])
@pytest.mark.parametrize("feed_forward", [True, False])
def test_only_what_is_zero_has_a_gradient_at_first(gate: str | None, feed_forward: bool) -> None:
    model = two(gate=gate, feed_forward=feed_forward)
    model(**BATCH).loss.backward()
    for taps in model.links.values():
        for tap in taps.values():
            zero = {id(parameter) for parameter in tap.zero_at_start()}
            for name, parameter in tap.named_parameters():
                assert bool(parameter.grad.any()) == (id(parameter) in zero), name


@pytest.mark.parametrize(
    ("gate", "adapter", "gates"),
    [
        ("tanh", "gated", ["text adapter", "speech->text 1-1 attention", "speech->text 1-1 feed-forward"]),
        (None, "residual", []),
    ],
)
def test_gates_are_those_that_there_are(gate: str | None, adapter: str, gates: list[str]) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(1))
    graph.add_tower("text", tiny_tower(2), adapter=adapter)
    graph.add_link("speech", "text", taps=[(1, 1)], gate=gate, feed_forward=True)
    model = graph.compile()
    assert model.gates() == dict.fromkeys(gates, 0.0)
    assert not model.is_open("speech->text")
    assert not model.is_open("text")
    open_links(model)
    assert model.is_open("speech->text")
    assert model.is_open("text")
    assert not model.is_open("speech")
    with pytest.raises(KeyError, match="there is no tower 'music'"):
        model.is_open("music")


def test_contributions_are_those_of_the_definition() -> None:
    model = open_links(two(embeddings=True, position=None), seed=3)
    states = model.run(BATCH["streams"]).given
    found = model.contributions(**BATCH)
    assert list(found) == ["speech->text 0-0", "speech->text 1-1", "speech->text 3-2"]
    assert all(value > 0 for value in found.values())
    module = model.links["speech->text"]["0-0"]
    everything = link.Visibility(None, None)
    x = model.tower("text").embed(BATCH["streams"]["text"]["tokens"])[0]
    update = module(x, module.read(states["speech", 0]), everything)
    ratios = update[0].norm(dim=-1) / x[0].norm(dim=-1)
    assert found["speech->text 0-0"] == pytest.approx(ratios.median().item(), rel=1e-5)


def test_the_contribution_is_not_that_of_an_attention_sink_alone() -> None:
    found = []
    for size in (1.0, 1e4):
        model = open_links(two(embeddings=True, position=None), seed=3)
        with torch.no_grad():
            model.unimodal("text").table.weight[1] *= size
        found.append(model.contributions(**BATCH)["speech->text 0-0"])
    assert found[1] == pytest.approx(found[0], rel=0.5)


def test_contributions_leave_out_what_sees_nothing_and_padding() -> None:
    model = open_links(pair(), seed=3)
    alone = model.contributions(**mt.collate(EXAMPLES[:1]))
    assert not any("text->speech" in name for name in alone)
    padded = model.contributions(**mt.collate([EXAMPLES[0], [mt.Segment("text", [0] * 40)]]))
    for name, value in alone.items():
        if name.startswith("speech"):
            assert padded[name] == pytest.approx(value, rel=1e-4)


def test_each_part_has_its_rate() -> None:
    model = pair(causal_lm("llama"), train="all")
    groups = model.parameter_groups(
        1.0, towers={"speech": 2.0}, links={"text->speech": 3.0}, adapters=4.0, gates=5.0
    )
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {named[id(each)]: group["lr"] for group in groups for each in group["params"]}
    assert rates.keys() == {name for name, each in model.named_parameters() if each.requires_grad}
    for name, rate in rates.items():
        kind, part = name.split(".")[:2]
        expected = {"towers": 2.0, "adapters": 4.0}.get(kind, 3.0 if part == "text->speech" else 1.0)
        assert rate == (5.0 if name.endswith("gate") else expected), name
    decaying = {
        named[id(each)] for group in groups if "weight_decay" not in group for each in group["params"]
    }
    norms = {f"{path}.weight" for path, module in model.named_modules() if "Norm" in type(module).__name__}
    assert all((name in norms or name.endswith(("bias", "gate"))) != (name in decaying) for name in rates)


def test_adapters_of_peft_take_the_rate_of_their_tower() -> None:
    peft = pytest.importorskip("peft", reason="adapters need the lora extra")
    graph = mt.FusionGraph()
    graph.add_tower("text", tiny_tower(1), train=peft.LoraConfig(target_modules=["attention"]))
    (group,) = graph.compile().parameter_groups(1.0, towers={"text": 2.0})
    assert group["lr"] == 2.0
    assert len(group["params"]) == 4


@pytest.mark.parametrize("rates", [{"towers": {"text": 1.0}}, {"links": {"speech": 1.0}}])
def test_a_rate_for_what_does_not_learn_is_refused(rates: dict) -> None:
    with pytest.raises(ValueError, match="no trained parameters"):
        tiny_model().parameter_groups(1.0, **rates)


def test_gates_learn_ten_times_as_fast() -> None:
    groups = two(gate="tanh").parameter_groups(1.0)
    assert {group["lr"] for group in groups} == {1.0, 10.0}


def test_every_even_width_has_a_default_number_of_heads() -> None:
    for width in range(2, 2000, 2):
        assert width // link.default_heads(width, even=True) % 2 == 0


def test_relative_updates_grow_with_the_state() -> None:
    plain, relative = (link.GatedCrossAttention(6, 8, relative=each) for each in (False, True))
    torch.nn.init.normal_(plain.out.weight)
    relative.load_state_dict(plain.state_dict())
    x, everything = torch.randn(2, 3, 8), link.Visibility(None, None)
    x[0, 0] *= 1000.0
    source = plain.read(torch.randn(2, 4, 6))
    size = x.square().mean(-1, keepdim=True).sqrt()
    expected = plain(x, source, everything) * size
    torch.testing.assert_close(relative(x, source, everything), expected)
    silent = torch.zeros(1, 3, 8, requires_grad=True)
    relative(silent, relative.read(torch.randn(1, 4, 6)), everything).sum().backward()
    assert silent.grad.isfinite().all()
