"""Two towers may share a model, whose weights exist only once."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import multitower as mt
from fake_hub import Download
from models import causal_lm, segment
from multitower.testing import open_links, tiny_tower
from tampering import rewrite_manifest

DIALOGUE = [
    [segment("ask", 5, 6, 7), segment("answer", 4, 9, target=True)],
    [segment("answer", 2, 3), segment("ask", 4, 5, 8), segment("answer", 9, target=True)],
]


def dialogue(ask: str | nn.Module, answer: str | nn.Module, train: object = "none") -> mt.FusedModel:
    graph = mt.FusionGraph()
    graph.add_tower("ask", ask, train=train)
    graph.add_tower("answer", answer, train=train)
    graph.add_link("ask", "answer", interleave=(1, 2))
    graph.add_link("answer", "ask", interleave=(1, 2))
    torch.manual_seed(5)
    return graph.compile()


def logits(model: mt.FusedModel) -> dict[str, Tensor]:
    return model.eval()(**mt.collate(DIALOGUE)).logits


def assert_same(model: mt.FusedModel, again: mt.FusedModel) -> None:
    expected = logits(model)
    for name, values in logits(again).items():
        assert torch.equal(values, expected[name])


def assert_shared(model: mt.FusedModel) -> None:
    ask, answer = (dict(model.tower(name).named_parameters()) for name in ("ask", "answer"))
    assert ask
    assert all(answer[name] is parameter for name, parameter in ask.items())


def steps(model: mt.FusedModel, count: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.train().parameter_groups(lr=1e-2))
    for _ in range(count):
        optimizer.zero_grad()
        model(**mt.collate(DIALOGUE)).loss.backward()
        optimizer.step()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    causal_lm("llama", depth=4).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("family", ["llama", "gpt2", "tiny"])
def test_closed_gates_leave_both_towers_as_the_model_is(family: str) -> None:
    module = tiny_tower(vocab_size=20) if family == "tiny" else causal_lm(family)
    model = dialogue(module, module)
    assert_shared(model)
    batch = mt.collate(DIALOGUE)
    for name, values in logits(model).items():
        native = module(batch["streams"][name]["tokens"])
        assert torch.equal(values, native if isinstance(native, Tensor) else native.logits)


@pytest.mark.parametrize("output", [["answer", "ask"], [("ask", "answer")]])
@pytest.mark.parametrize("family", ["llama", "tiny"])
def test_a_shared_model_gives_what_two_copies_give(family: str, output: list) -> None:
    module = tiny_tower(depth=4, vocab_size=20) if family == "tiny" else causal_lm("llama", depth=4)
    shared, apart = dialogue(module, module), dialogue(copy.deepcopy(module), copy.deepcopy(module))
    open_links(shared, 3), open_links(apart, 3)
    assert_same(shared, apart)
    given = [[segment("ask", 5, 6)], [segment("answer", 3), segment("ask", 4)]]
    decoded = []
    for model in (shared, apart):
        rows = model.generate(given, output, max_new_tokens=4)
        parts = [
            part
            for row in rows
            for entry in row
            for part in (entry if isinstance(entry, list | tuple) else [entry])
        ]
        decoded.append([(part.tower, part.tokens.tolist()) for part in parts])
    assert decoded[0] == decoded[1]


@pytest.mark.parametrize("train", ["none", "all", "lora"])
def test_a_shared_model_is_counted_once_and_learns_as_one(train: str) -> None:
    module = causal_lm("llama")
    model = dialogue(module, module, train)
    assert_shared(model)
    parameters = list(model.tower("ask").parameters())
    assert sum(any(each is one for one in parameters) for each in model.parameters()) == len(parameters)
    groups = model.parameter_groups(lr=1e-3)
    listed = [id(each) for group in groups for each in group["params"]]
    assert len(listed) == len(set(listed)) == sum(each.requires_grad for each in model.parameters())
    assert model.train().tower("answer").training == (train != "none")
    before = [each.detach().clone() for each in parameters]
    steps(model)
    changed = [not torch.equal(*each) for each in zip(before, parameters, strict=True)]
    assert any(changed) == (train != "none")
    assert_shared(model)
    assert model.unimodal("ask") is model.unimodal("answer")


def test_gradients_of_both_towers_add_up() -> None:
    module = causal_lm("llama")
    model = dialogue(module, module, "all").eval()
    apart = dialogue(copy.deepcopy(module), copy.deepcopy(module), "all").eval()
    for each in (model, apart):
        each(**mt.collate(DIALOGUE)).loss.backward()
    ask, answer = (dict(apart.tower(name).named_parameters()) for name in ("ask", "answer"))
    for name, parameter in model.tower("ask").named_parameters():
        torch.testing.assert_close(parameter.grad, ask[name].grad + answer[name].grad)


def test_towers_that_share_must_be_trained_alike() -> None:
    module = tiny_tower()

    def declare(first: object, second: object) -> mt.FusionGraph:
        graph = mt.FusionGraph()
        graph.add_tower("ask", module, train=first)
        graph.add_tower("answer", module, train=second)
        return graph

    def lora(rank: int) -> peft.LoraConfig:
        return peft.LoraConfig(r=rank, target_modules=["attention"])

    with pytest.raises(
        mt.errors.GraphError, match=r"towers 'ask' and 'answer' share .* train='none' and train='all'"
    ):
        declare("none", "all").compile()
    with pytest.raises(
        mt.errors.GraphError, match=r"towers 'ask' and 'answer' share .* train='none' and train='lora'"
    ):
        declare("none", lora(2)).compile()
    with pytest.raises(mt.errors.GraphError, match=r"'answer' share .* unlike peft configs and train='lora'"):
        declare(lora(2), lora(4)).compile()


def test_a_frozen_parameter_may_not_learn_in_another_tower() -> None:
    one, other = tiny_tower(0), tiny_tower(1)
    other.table = one.table
    graph = mt.FusionGraph()
    graph.add_tower("ask", one)
    graph.add_tower("answer", other, train="all")
    with pytest.raises(mt.errors.GraphError, match="towers 'ask' and 'answer' share their weights"):
        graph.compile()


@pytest.mark.parametrize(("train", "shared"), [("none", True), ("all", False), ("lora", False)])
def test_one_path_is_loaded_once_for_towers_that_stay_frozen(folder: str, train: str, shared: bool) -> None:
    model = dialogue(folder, folder, train)
    assert (model.unimodal("ask") is model.unimodal("answer")) == shared


def test_a_frozen_and_a_trained_tower_of_one_path_are_apart(folder: str) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("ask", folder)
    graph.add_tower("answer", folder, train="all")
    model = graph.compile()
    assert model.unimodal("ask") is not model.unimodal("answer")


@pytest.mark.parametrize("kind", ["referred", "embedded", "trained", "lora", "plain"])
def test_a_shared_model_is_stored_once_and_shared_when_loaded(
    downloaded: Download, tmp_path: Path, kind: str
) -> None:
    if kind in ("referred", "embedded"):
        downloaded("org/model", causal_lm("llama", depth=4))
        model = dialogue("org/model", "org/model")
    else:
        module = tiny_tower(depth=4, vocab_size=20) if kind == "plain" else causal_lm("llama", depth=4)
        model = dialogue(module, module, "lora" if kind == "lora" else "all")
        steps(model)
    open_links(model)
    model.save_pretrained(tmp_path / "fused", embed_towers=kind == "embedded")
    records = json.loads((tmp_path / "fused/fusion.json").read_text())["towers"]
    assert records["answer"] == {"shared_with": "ask"}
    stored = [path.name for path in (tmp_path / "fused").glob("towers/*")]
    assert stored == ([] if kind == "referred" else ["ask"])
    given = {"answer": tiny_tower(9, depth=4, vocab_size=20)} if kind == "plain" else None
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers=given)
    assert_shared(again)
    assert_same(model, again)
    again.save_pretrained(tmp_path / "second", embed_towers=True)
    given = {"ask": tiny_tower(8, depth=4, vocab_size=20)} if kind == "plain" else None
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "second", towers=given))


def test_a_given_tower_is_taken_for_all_that_share(folder: str, tmp_path: Path) -> None:
    model = open_links(dialogue(folder, folder))
    model.save_pretrained(tmp_path / "fused")
    moved = str(Path(folder).rename(tmp_path / "moved"))
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"answer": moved})
    assert [spec.source for spec in again.graph.towers.values()] == [moved, moved]
    assert_shared(again)
    assert_same(model, again)
    both = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"ask": moved, "answer": moved})
    assert_shared(both)
    with pytest.raises(
        mt.errors.CheckpointError, match="'ask' and 'answer' share one model in this checkpoint"
    ):
        mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"ask": moved, "answer": "elsewhere"})


def test_a_checkpoint_from_before_loads_without_sharing(downloaded: Download, tmp_path: Path) -> None:
    downloaded("org/model", causal_lm("llama", depth=4))
    model = open_links(dialogue("org/model", "org/model"))
    model.save_pretrained(tmp_path / "fused")
    rewrite_manifest(tmp_path / "fused", lambda saved: saved["towers"].update(answer=saved["towers"]["ask"]))
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused"))


@pytest.mark.parametrize("first", ["answer", "nobody", 3])
def test_a_damaged_record_is_named(folder: str, tmp_path: Path, first: object) -> None:
    dialogue(folder, folder).save_pretrained(tmp_path / "fused")
    rewrite_manifest(tmp_path / "fused", lambda saved: saved["towers"]["answer"].update(shared_with=first))
    with pytest.raises(mt.errors.CheckpointError, match=r"fusion\.json is damaged"):
        mt.FusedModel.from_pretrained(tmp_path / "fused")


def test_towers_that_share_are_merged_together(tmp_path: Path) -> None:
    module = causal_lm("llama", depth=4)
    model = dialogue(module, module, "lora")
    steps(model)
    before = logits(model)
    merged = model.merge_and_unload("answer")
    assert model.unimodal("ask") is model.unimodal("answer") is merged
    assert {spec.train for spec in model.graph.towers.values()} == {"none"}
    for name, values in logits(model).items():
        torch.testing.assert_close(values, before[name], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "fused")
    assert_shared(mt.FusedModel.from_pretrained(tmp_path / "fused"))


def test_a_model_can_be_extended_by_a_tower_that_shares(folder: str) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("ask", folder)
    model = graph.compile()
    graph = model.graph
    graph.add_tower("answer", folder)
    assert_shared(model.extend(graph))
    graph = model.graph
    graph.add_tower("answer", model.unimodal("ask"))
    assert_shared(model.extend(graph))
    graph = model.graph
    graph.add_tower("answer", model.unimodal("ask"), train="all")
    with pytest.raises(mt.errors.GraphError, match="towers 'ask' and 'answer' share their weights"):
        model.extend(graph)
    assert not any(parameter.requires_grad for parameter in model.tower("ask").parameters())


def test_of_towers_that_share_one_can_be_dropped_or_exchanged(tmp_path: Path) -> None:
    module = causal_lm("llama", depth=4)
    model = dialogue(module, module, "all")
    alone = model.drop("ask")
    assert alone.unimodal("answer") is module
    alone.save_pretrained(tmp_path / "alone")
    again = mt.FusedModel.from_pretrained(tmp_path / "alone")
    assert torch.equal(*(m.unimodal("answer").lm_head.weight for m in (alone, again)))
    swapped = model.swap("ask", causal_lm("llama", depth=4, seed=3), train="none")
    assert swapped.unimodal("answer") is module
    assert swapped.unimodal("ask") is not module
    assert all(parameter.requires_grad for parameter in module.parameters())
