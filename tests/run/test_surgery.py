"""Remove and exchange towers and links of trained models without changing the rest."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import multitower as mt
from grown import WITH_MUSIC, assert_same, music, steps, trained_pair, with_music, without
from models import EXAMPLES, causal_lm, pair, segment
from multitower.testing import open_links, tiny_tower


@pytest.fixture
def trained() -> mt.FusedModel:
    return trained_pair()


@given(st.data())
def test_dropping_is_the_inverse_of_adding(data: st.DataObject) -> None:
    """Add a tower with random links, then drop it; the logits stay equal, bit for bit."""
    names = "abc"[: data.draw(st.integers(1, 3))]
    graph = mt.FusionGraph()
    for number, name in enumerate(names):
        graph.add_tower(name, tiny_tower(number, depth=data.draw(st.integers(1, 3)), vocab_size=12))
    for source, target in ((a, b) for a in names for b in names if a != b):
        if data.draw(st.booleans()):
            graph.add_link(source, target, interleave=1)
    model = open_links(graph.compile().eval(), seed=1)
    graph = model.graph
    graph.add_tower("new", tiny_tower(9, depth=2, width=4, vocab_size=12))
    for name in names:
        if data.draw(st.booleans()):
            graph.add_link("new", name, interleave=1)
        if data.draw(st.booleans()):
            graph.add_link(name, "new", interleave=1)
    bigger = model.extend(graph)
    tokens = st.lists(st.integers(0, 11), min_size=1, max_size=3)
    piece = st.builds(mt.Segment, st.sampled_from([*names, "new"]), tokens)
    examples = data.draw(st.lists(st.lists(piece, min_size=1, max_size=4), min_size=1, max_size=2))
    rest = without(examples, "new")
    assume(rest)
    expected = model(streams=rest).logits
    assert_same(bigger(**mt.collate(examples)).logits, expected)
    smaller = open_links(bigger, seed=2).drop("new")
    assert smaller.graph == model.graph
    assert_same(smaller(streams=rest).logits, model(streams=rest).logits)
    assert_same(bigger(streams=rest).logits, model(streams=rest).logits)


def test_what_is_dropped_takes_its_links_along_and_the_rest_stays(trained: mt.FusedModel) -> None:
    bigger = open_links(with_music(trained))
    smaller = bigger.drop("music")
    assert smaller.graph == trained.graph
    assert set(smaller.state_dict()) == set(trained.state_dict())
    assert_same(smaller(**mt.collate(EXAMPLES)).logits, bigger(**mt.collate(EXAMPLES)).logits)
    single = bigger.drop("speech->text", "music")
    assert set(single.links) == {"text->speech"}
    only_text = without(EXAMPLES, "speech")
    assert_same(single(streams=only_text).logits, bigger(streams=only_text).logits)


def test_what_cannot_be_dropped_is_named(trained: mt.FusedModel) -> None:
    with pytest.raises(KeyError, match=r"no tower or link 'music'; the towers are speech, text, the links"):
        trained.drop("music")
    with pytest.raises(mt.errors.GraphError, match="without speech, text the model has no tower"):
        trained.drop("speech", "text")


def test_a_dropped_tower_is_freed() -> None:
    model = with_music(pair())
    gone = weakref.ref(model.tower("music").table.weight)
    model = model.drop("music")
    assert gone() is None


# peft 0.21 uses a deprecated attribute of transformers 5.23.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_tower_that_is_taken_out_is_an_ordinary_model_again(tmp_path: Path) -> None:
    text = causal_lm("llama")
    plain = causal_lm("llama")
    model = open_links(pair(text, train="all"))
    steps(model.train())
    taken, model = model.unimodal("text"), model.drop("text")
    assert taken is text
    modules = zip(taken.modules(), plain.modules(), strict=True)
    for ours, theirs in modules:
        assert type(ours) is type(theirs)
        assert set(vars(ours)) == set(vars(theirs))
        assert not ours._forward_hooks
        assert not ours._forward_pre_hooks
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in taken.state_dict().items())
    taken.save_pretrained(tmp_path / "text")
    again = type(plain).from_pretrained(tmp_path / "text")
    tokens = torch.tensor([[1, 5, 6, 2]])
    assert torch.equal(again(tokens).logits, taken(tokens).logits)
    assert not any(parameter.requires_grad for parameter in taken.parameters())
    taken.requires_grad_().train()
    taken(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in taken.parameters())
    assert taken.generate(tokens, max_new_tokens=2, pad_token_id=1).shape[1] <= 6
    adapted = peft.get_peft_model(taken, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert adapted(tokens).logits.shape == (1, 4, 20)


def test_a_plain_tower_with_adapters_goes_on_learning_in_another_fusion() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", tiny_tower(), train=peft.LoraConfig(target_modules=["attention"]))
    taken = graph.compile().unimodal("text")
    graph = mt.FusionGraph()
    graph.add_tower("words", taken, train="lora")
    graph.add_tower("music", music())
    graph.add_link("music", "words", interleave=1)
    second = graph.compile().train()
    assert second.unimodal("words") is taken
    weights = [weight for name, weight in taken.named_parameters() if "lora_B" in name]
    steps(second, 1, [[segment("music", 3), segment("words", 5, 6, target=True)]])
    assert all(weight.any() for weight in weights)


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_trained_tower_is_used_again_in_another_fusion(train: str) -> None:
    text = causal_lm("llama")
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(1, depth=4, width=12, vocab_size=14))
    graph.add_tower("text", text, train=train)
    graph.add_link("speech", "text", interleave=1)
    first = open_links(graph.compile())
    before = first.unimodal("text")(torch.tensor([[0, 5, 6]])).logits.detach()
    steps(first.train())
    taken = first.eval().unimodal("text")
    logits = taken(torch.tensor([[0, 5, 6]])).logits.detach()
    assert not torch.equal(logits, before)
    graph = mt.FusionGraph()
    graph.add_tower("words", taken, train="none")
    graph.add_tower("music", music(), train="all")
    graph.add_link("words", "music", interleave=1)
    graph.add_link("music", "words", interleave=1)
    second = graph.compile().train()
    assert second.unimodal("words") is taken
    examples = [[segment("words", 5, 6), segment("music", 3, target=True)]]
    steps(second, 3, examples)
    assert torch.equal(taken(torch.tensor([[0, 5, 6]])).logits, logits)


def test_another_tower_takes_the_place_of_one(trained: mt.FusedModel) -> None:
    later = copy.deepcopy(trained.unimodal("text"))
    with torch.no_grad():
        later.table.weight.add_(0.1)
    with pytest.warns(
        UserWarning, match=r"speech->text, text->speech, the input adapter of text learnt"
    ) as caught:
        swapped = trained.swap("text", later)
    assert caught[0].filename == __file__
    assert swapped.unimodal("text") is later
    assert list(swapped.towers) == ["speech", "text"]
    assert swapped.graph == trained.graph
    for tap in trained.schedule.taps:
        assert swapped.tap(tap) is trained.tap(tap)
    assert swapped.adapters["text"] is trained.adapters["text"]
    assert not any(parameter.requires_grad for parameter in later.parameters())
    only_speech = without(EXAMPLES, "text")
    assert_same(swapped(streams=only_speech).logits, trained(streams=only_speech).logits)
    with torch.no_grad():
        later.table.weight.copy_(trained.tower("text").table.weight)
    assert_same(swapped(**mt.collate(EXAMPLES)).logits, trained(**mt.collate(EXAMPLES)).logits)


def test_the_new_tower_may_have_other_words_other_depth_and_learn(tmp_path: Path) -> None:
    causal_lm("qwen3", width=8, depth=5, vocab_size=40).save_pretrained(tmp_path / "other")
    model = pair()
    swapped = model.swap("text", tmp_path / "other", train="lora")
    assert swapped.tower("text").vocab_size == 40
    spec = swapped.graph.towers["text"]
    assert (spec.source, spec.train) == (str(tmp_path / "other"), "lora")
    assert swapped.graph.links["speech->text"].taps == ((2, 1), (4, 2))
    assert [tap.key for tap in swapped.schedule.taps] == [tap.key for tap in model.schedule.taps]
    examples = [[segment("speech", 5, 6), segment("text", 33, target=True)]]
    steps(swapped.train(), 3, examples)
    swapped.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(
        tmp_path / "fused", towers={"speech": tiny_tower(depth=4, width=12, vocab_size=14)}
    )
    assert again.graph == swapped.graph
    assert_same(again(**mt.collate(examples)).logits, swapped.eval()(**mt.collate(examples)).logits)


def test_adapters_of_peft_are_made_anew_for_the_new_tower() -> None:
    graph = mt.FusionGraph()
    config = peft.LoraConfig(r=2, target_modules=["attention"])
    graph.add_tower("text", tiny_tower(), train=config)
    model = graph.compile()
    swapped = model.swap("text", tiny_tower(3))
    assert swapped.graph == model.graph
    assert swapped.unimodal("text").peft_config["default"].r == 2
    other = swapped.swap("text", peft.get_peft_model(tiny_tower(4), config), train="lora")
    assert other.graph.towers["text"].peft is None


def test_a_tower_that_does_not_fit_is_refused() -> None:
    model = pair()
    with pytest.raises(
        mt.errors.GraphError, match=r"tower 'text' has width 8, and speech->text, text->speech, text"
    ):
        model.swap("text", tiny_tower(width=12))
    with pytest.raises(mt.errors.GraphError, match=r"tap \(4, 2\) names layer 4 of tower 'speech'"):
        model.swap("speech", tiny_tower(width=12, depth=3))
    with pytest.raises(KeyError, match="no tower 'music'"):
        model.swap("music", tiny_tower())
    with pytest.raises(mt.errors.GraphError, match="tower 'text': expected a folder"):
        model.swap("text", 3)


def test_the_modes_of_what_stays_are_kept() -> None:
    """Dropout may be switched off in one trained tower alone."""
    model = trained_pair().train()
    model.towers["speech"].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    grown = with_music(model)
    grown.drop("text->speech")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert grown.training
    assert grown.links.training
    assert not grown.towers["speech"].training


@pytest.mark.parametrize("surgery", ["extend", "drop", "swap"])
def test_changed_models_are_saved_and_loaded(trained: mt.FusedModel, surgery: str, tmp_path: Path) -> None:
    fresh = {
        "speech": tiny_tower(8, depth=4, width=12, vocab_size=14),
        "text": tiny_tower(9, depth=2, width=8, vocab_size=20),
        "music": music(seed=10),
    }
    examples = EXAMPLES
    if surgery == "extend":
        trained.save_pretrained(tmp_path / "old")
        old = {name: fresh[name] for name in trained.towers}
        changed = with_music(mt.FusedModel.from_pretrained(tmp_path / "old", towers=old))
        assert_same(changed(**mt.collate(EXAMPLES)).logits, trained(**mt.collate(EXAMPLES)).logits)
        open_links(changed)
        examples = WITH_MUSIC
        fresh["speech"], fresh["text"] = copy.deepcopy(fresh["speech"]), copy.deepcopy(fresh["text"])
    elif surgery == "drop":
        changed = with_music(trained).drop("text")
        examples = [[segment("music", 3), segment("speech", 4)]]
    else:
        with pytest.warns(UserWarning, match="learnt with the old tower"):
            changed = trained.swap("speech", tiny_tower(6, depth=4, width=12, vocab_size=14))
    changed.save_pretrained(tmp_path / "fused")
    document = json.loads((tmp_path / "fused/fusion.json").read_text())
    assert mt.FusionGraph.from_dict(document["graph"]) == changed.graph
    assert list(document["towers"]) == list(changed.towers)
    again = mt.FusedModel.from_pretrained(
        tmp_path / "fused", towers={name: fresh[name] for name in changed.towers}
    )
    assert_same(again(**mt.collate(examples)).logits, changed(**mt.collate(examples)).logits)
    assert set(again.state_dict()) == set(changed.state_dict())
