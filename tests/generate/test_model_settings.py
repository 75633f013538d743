"""Configs, generation defaults and vocabularies of transformers models, as towers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.testing import open_links, tiny_tower

BATCH = mt.collate(EXAMPLES)
TEXT = BATCH["streams"]["text"]["tokens"]
OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5}


def tied(family: str = "llama", seed: int = 0) -> nn.Module:
    config = causal_lm(family).config
    config.tie_word_embeddings = True
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def decoded(model: mt.FusedModel, **options: object) -> list[list[int]]:
    rows = model.generate([[EXAMPLES[0][0]]], ["text"], **(options or OPTIONS))
    return [segment.tokens.tolist() for (segment,) in rows]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_tied_embeddings_train_and_come_back_tied(family: str, tmp_path: Path) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(1, vocab_size=14))
    graph.add_tower("text", tied(family), train="all")
    graph.add_link("speech", "text", interleave=1)
    fused = open_links(graph.compile())
    groups = fused.parameter_groups(lr=1e-2)
    trained = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(trained) == len(set(trained))
    model = fused.unimodal("text")
    embedding = model.get_input_embeddings().weight
    assert trained.count(id(embedding)) == 1
    assert len(trained) == sum(parameter.requires_grad for parameter in fused.parameters())

    optimizer = torch.optim.SGD(groups)
    before = embedding.detach().clone()
    fused(**BATCH).loss.backward()
    optimizer.step()
    assert not torch.equal(embedding, before)
    assert model.get_output_embeddings().weight is embedding

    fused.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"speech": fused.tower("speech")})
    copy = again.unimodal("text")
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight
    assert torch.equal(again(**BATCH).logits["text"], fused.eval()(**BATCH).logits["text"])


def test_gradients_of_tied_embeddings_are_the_models_own() -> None:
    model = tied()
    model(TEXT).logits.square().sum().backward()
    expected = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    mt.TransformersTower(model)(TEXT).square().sum().backward()
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, expected)


@pytest.mark.parametrize("family", ["bloom", "mamba", "mpt"])
def test_models_that_return_tuples(family: str) -> None:
    expected = decoded(pair(causal_lm(family), gates=True))
    model = causal_lm(family)
    model.config.return_dict = False
    native = model(TEXT, use_cache=False)
    assert isinstance(native, tuple)
    assert torch.equal(mt.TransformersTower(model)(TEXT), native[0])
    assert decoded(pair(model, gates=True)) == expected


def eager(family: str) -> nn.Module:
    model = causal_lm(family)
    model.set_attn_implementation("eager")
    return model


RECORDED = [
    *itertools.product(
        ["llama", "gpt2", "opt", "qwen3_moe", "gpt_oss"], ["output_hidden_states", "output_attentions"]
    ),
    *itertools.product(["qwen3_moe", "gpt_oss"], ["output_router_logits"]),
]


@pytest.mark.parametrize(
    ("family", "flag", "before"),
    [*((*each, False) for each in RECORDED), *((*each, True) for each in RECORDED if "moe" in each[0])],
)
def test_models_that_record_their_layers(family: str, flag: str, before: bool) -> None:
    model, reference = (eager(family) for _ in range(2))
    expected = decoded(pair(eager(family), gates=True))
    setattr(reference.config, flag, True)
    wanted = reference(TEXT, use_cache=False)
    if before:
        setattr(model.config, flag, True)
    fused = pair(model)
    setattr(model.config, flag, True)
    assert torch.equal(fused(**BATCH).logits["text"], wanted.logits)
    assert decoded(open_links(fused, seed=7)) == expected
    fused(**BATCH).loss.backward()
    found = model(TEXT, use_cache=False)
    key = flag.removeprefix("output_")
    assert len(found[key]) == len(wanted[key])
    for one, other in zip(found[key], wanted[key], strict=True):
        assert torch.equal(one, other)


def test_defaults_of_generate_are_the_models_own() -> None:
    model = causal_lm("llama")
    fused = pair(model, gates=True)
    greedy = decoded(fused)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=0)
    torch.manual_seed(0)
    sampled = [decoded(fused) for _ in range(5)]
    assert any(row != greedy for row in sampled)
    torch.manual_seed(0)
    assert [decoded(fused) for _ in range(5)] == sampled
    assert decoded(fused, do_sample=False, **OPTIONS) == greedy


def test_beams_may_be_the_models_default() -> None:
    expected = decoded(pair(causal_lm("llama"), gates=True), num_beams=3, **OPTIONS)
    model = causal_lm("llama")
    model.generation_config.num_beams = 3
    assert decoded(pair(model, gates=True)) == expected


@pytest.mark.parametrize(
    "default",
    [
        {"return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
        {"use_cache": False},
        {"max_length": 3},
    ],
    ids=str,
)
def test_defaults_that_would_change_what_generate_returns(default: dict[str, object]) -> None:
    model = eager("llama")
    expected = decoded(pair(model, gates=True), **OPTIONS)
    model.generation_config.update(**default)
    assert decoded(pair(model, gates=True), **OPTIONS) == expected
    assert mt.TransformersTower(model)._unfaithful == ""


@pytest.mark.parametrize("weights_are_tied", [True, False])
def test_a_vocabulary_that_was_resized_before(weights_are_tied: bool, tmp_path: Path) -> None:
    model = tied() if weights_are_tied else causal_lm("llama")
    model.resize_token_embeddings(23, mean_resizing=False)
    fused = pair(model, gates=True)
    assert fused.tower("text").vocab_size == 23
    batch = mt.collate([[EXAMPLES[0][0], mt.Segment("text", [1, 21, 22, 2], target=True)]])
    fused(**batch).loss.backward()
    assert fused(**batch).logits["text"].shape[-1] == 23
    fused.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"speech": fused.tower("speech")})
    assert torch.equal(again(**batch).logits["text"], fused(**batch).logits["text"])
