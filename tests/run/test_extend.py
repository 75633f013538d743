"""Add towers and links to trained models without changing what is there."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import multitower as mt
from grown import WITH_MUSIC, assert_same, music, steps, trained_pair, with_music, without
from models import EXAMPLES, causal_lm, segment
from multitower.testing import open_links, tiny_tower


@pytest.fixture
def trained() -> mt.FusedModel:
    return trained_pair()


def test_an_extended_model_gives_the_same_bits(trained: mt.FusedModel) -> None:
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    bigger = with_music(trained)
    assert list(bigger.towers) == ["speech", "text", "music"]
    assert len(bigger.links) == 6
    assert list(trained.towers) == list(trained.graph.towers) == ["speech", "text"]
    assert_same(bigger(**mt.collate(EXAMPLES)).logits, trained(**mt.collate(EXAMPLES)).logits)
    assert_same(bigger(**mt.collate(WITH_MUSIC)).logits, trained(streams=without(WITH_MUSIC, "music")).logits)
    given = [[segment("speech", 5, 6, 7), segment("text", 3)]]
    expected, decoded = (
        model.generate(given, output=["text", "speech"], max_new_tokens=5) for model in (trained, bigger)
    )
    assert [s.tokens.tolist() for s in decoded[0]] == [s.tokens.tolist() for s in expected[0]]
    assert all(torch.equal(bigger.state_dict()[key], value) for key, value in before.items())


def test_what_was_there_is_the_same_module(trained: mt.FusedModel) -> None:
    bigger = with_music(trained)
    old, new = dict(trained.named_parameters()), dict(bigger.named_parameters())
    assert all(new[name] is parameter for name, parameter in old.items())
    assert not any(bigger.is_open(link) for link in bigger.links if "music" in link)
    assert bigger.unimodal("text") is trained.unimodal("text")


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_requires_grad_stay(trained: mt.FusedModel, training: bool) -> None:
    trained.train(training)
    trained.tower("speech").table.weight.requires_grad_(False)
    bigger = with_music(trained, train="all")
    assert bigger.training == training
    assert bigger.links["music->text"].training == bigger.tower("music").training == training
    assert not bigger.tower("text").training
    assert not bigger.tower("speech").table.weight.requires_grad
    assert bigger.tower("music").table.weight.requires_grad


def test_adapters_that_were_frozen_by_hand_stay_frozen() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", causal_lm("llama"), train="lora")
    model = graph.compile()
    model.tower("text").requires_grad_(False)
    graph = model.graph
    graph.add_tower("music", music())
    assert not any(parameter.requires_grad for parameter in model.extend(graph).tower("text").parameters())


def test_an_extended_model_learns_and_leaves_the_frozen_tower(trained: mt.FusedModel) -> None:
    bigger = with_music(trained, train="all").train()
    text = copy.deepcopy(bigger.unimodal("text").state_dict())
    steps(bigger, 10, WITH_MUSIC)
    assert bigger.is_open("music->text")
    assert all(torch.equal(value, text[key]) for key, value in bigger.unimodal("text").state_dict().items())
    output = bigger.generate([[segment("text", 4)]], output=["music"], max_new_tokens=4)
    assert output[0][0].tower == "music"


def test_an_optimizer_goes_on_and_takes_new_parameters(trained: mt.FusedModel) -> None:
    optimizer = torch.optim.AdamW(trained.parameter_groups(lr=1e-3))
    trained(**mt.collate(EXAMPLES)).loss.backward()
    optimizer.step()
    bigger = with_music(trained)
    old = {id(parameter) for parameter in trained.parameters()}
    new = [each for each in bigger.parameters() if each.requires_grad and id(each) not in old]
    optimizer.add_param_group({"params": new})
    bigger(**mt.collate(WITH_MUSIC)).loss.backward()
    optimizer.step()
    assert bigger.is_open("music->text")


def test_a_link_alone_can_be_added(trained: mt.FusedModel) -> None:
    graph = trained.graph
    graph.add_link("speech", "text", taps=[(1, 1), (3, 2)], name="more", position="rotary", window=3)
    bigger = trained.extend(graph)
    assert set(bigger.links) == {"speech->text", "text->speech", "more"}
    assert_same(bigger(**mt.collate(EXAMPLES)).logits, trained(**mt.collate(EXAMPLES)).logits)
    open_links(bigger)
    assert not torch.equal(
        bigger(**mt.collate(EXAMPLES)).logits["text"],
        bigger.drop("more")(**mt.collate(EXAMPLES)).logits["text"],
    )


def test_the_graph_of_a_model_is_a_copy(trained: mt.FusedModel) -> None:
    graph = trained.graph
    graph.add_tower("music", music())
    assert "music" not in trained.graph.towers
    assert trained.graph == trained.graph != graph


def test_extending_is_refused_where_something_old_would_change(trained: mt.FusedModel) -> None:
    data = trained.graph.to_dict()

    def changed(kind: str, number: int, **changes: object) -> mt.FusionGraph:
        entries = copy.deepcopy(data)
        entries[kind][number].update(changes)
        return mt.FusionGraph.from_dict(entries)

    with pytest.raises(
        mt.errors.GraphError, match=r"tower 'text' is declared otherwise .* \(train='all' instead of"
    ):
        trained.extend(changed("towers", 1, train="all"))
    with pytest.raises(mt.errors.GraphError, match=r"link 'speech->text' .* \(heads=2 instead of None\)"):
        trained.extend(changed("links", 0, heads=2))
    fewer = mt.FusionGraph.from_dict({**data, "links": data["links"][:1]})
    with pytest.raises(mt.errors.GraphError, match="the graph lacks the link 'text->speech' of the model"):
        trained.extend(fewer)
    with pytest.raises(mt.errors.GraphError, match="the graph lacks the tower 'speech' of the model"):
        trained.extend(mt.FusionGraph())


def test_the_graph_that_was_compiled_can_be_extended_too() -> None:
    def declared(text: nn.Module) -> mt.FusionGraph:
        graph = mt.FusionGraph()
        graph.add_tower("text", text, train=peft.LoraConfig(target_modules=["attention"]))
        return graph

    text = tiny_tower()
    graph = declared(text)
    model = graph.compile()
    graph.add_tower("music", music())
    assert model.extend(graph).tower("text") is model.tower("text")
    with pytest.raises(
        mt.errors.GraphError, match="tower 'text' is declared with another module than the model has"
    ):
        model.extend(declared(tiny_tower(1)))
