"""Training modes of transformers models, as towers: activation checkpointing, dropout, dropped layers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from packaging import version
from torch import nn

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.testing import open_links, tiny_tower

BATCH = mt.collate(EXAMPLES)
TEXT = BATCH["streams"]["text"]["tokens"]
FAMILIES = ("llama", "gpt2", "opt", "bloom", "gemma3_text", "mamba", "zaya")


def fuse(text: nn.Module, train: str = "all") -> mt.FusedModel:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(1, depth=4, width=12, vocab_size=14))
    graph.add_tower("text", text, train=train)
    graph.add_link("speech", "text", interleave=1)
    graph.add_link("text", "speech", interleave=1)
    torch.manual_seed(3)
    return open_links(graph.compile())


def gradients(model: mt.FusedModel) -> dict[str, torch.Tensor]:
    model(**BATCH).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def checkpoint(model: nn.Module, options: dict[str, bool] | None = None) -> None:
    """Enable activation checkpointing, by its name in this version of transformers."""
    older = "gradient_checkpointing_enable"
    getattr(model, "activation_checkpointing_enable", getattr(model, older))(options)


def runs_of_layers(tower: mt.TransformersTower) -> Counter[int]:
    """Count, from now on, how often the first module inside each layer runs."""
    counted: Counter[int] = Counter()
    for index, layer in enumerate(tower.native.get_submodule(tower._layers.path)):
        inner = next(layer.children())
        inner.register_forward_pre_hook(lambda *_, index=index: counted.update([index]))
    return counted


@pytest.mark.parametrize(
    ("family", "before", "reentrant"),
    [
        *((family, False, False) for family in FAMILIES),
        ("llama", True, False),
        ("llama", True, True),
        ("gpt2", False, True),
    ],
)
def test_checkpointed_layers_are_run_twice_and_give_the_same_gradients(
    family: str, before: bool, reentrant: bool
) -> None:
    expected = gradients(fuse(causal_lm(family, depth=3)))
    model = causal_lm(family, depth=3)
    if before:
        checkpoint(model, {"use_reentrant": reentrant})
    fused = fuse(model)
    if not before:
        checkpoint(model, {"use_reentrant": reentrant})
    counted = runs_of_layers(fused.tower("text"))
    found = gradients(fused)
    assert counted == {0: 2, 1: 2, 2: 2}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")  # it is what is tested
def test_the_older_name_of_activation_checkpointing() -> None:
    model = causal_lm("llama", depth=3)
    model.gradient_checkpointing_enable()
    fused = fuse(model)
    counted = runs_of_layers(fused.tower("text"))
    gradients(fused)
    assert counted == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_checkpointing_a_frozen_tower_changes_nothing(family: str) -> None:
    expected = gradients(fuse(causal_lm(family, depth=3), train="none"))
    model = causal_lm(family, depth=3)
    checkpoint(model)
    fused = fuse(model, train="none")
    counted = runs_of_layers(fused.tower("text"))
    found = gradients(fused)
    assert counted == {0: 1, 1: 1, 2: 1}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name])


def test_a_frozen_tower_stays_without_autograd_when_checkpointed() -> None:
    model = causal_lm("llama")
    checkpoint(model)
    graph = mt.FusionGraph()
    graph.add_tower("text", model, adapter=None)
    fused = graph.compile()
    assert not fused.run({"text": BATCH["streams"]["text"]}).hidden["text"].requires_grad


def test_generating_with_checkpointed_layers() -> None:
    given, options = [[EXAMPLES[0][0]]], {"max_new_tokens": 5, "min_new_tokens": 5}
    ((expected,),) = pair(causal_lm("llama"), gates=True).generate(given, ["text"], **options)
    model = causal_lm("llama")
    checkpoint(model)
    ((found,),) = pair(model, gates=True).train().generate(given, ["text"], **options)
    assert found.tokens.tolist() == expected.tokens.tolist()


DROPOUTS = {
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
    "biogpt": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "activation_dropout": 0.5},
    "gpt2": {"embd_pdrop": 0.5, "attn_pdrop": 0.5, "resid_pdrop": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("family", DROPOUTS)
def test_dropout_is_the_models_own(family: str) -> None:
    config = causal_lm(family).config
    for key, value in DROPOUTS[family].items():
        assert hasattr(config, key)
        setattr(config, key, value)
    if family in ("opt", "biogpt") and version.parse(transformers.__version__) < version.parse("5.22"):
        pytest.skip("the loop around its layers draws random numbers, too, in another order than a tower")
    model = type(causal_lm(family))(config).eval()
    tower = mt.TransformersTower(model)
    seen = []
    for mode in (True, False, True):
        tower.train(mode)
        torch.manual_seed(1)
        expected = model(TEXT, use_cache=False).logits
        torch.manual_seed(1)
        assert torch.equal(tower(TEXT), expected)
        seen.append(expected)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_a_frozen_tower_does_not_drop_out() -> None:
    config = causal_lm("opt").config
    config.dropout = 0.5
    model = type(causal_lm("opt"))(config).eval()
    expected = model(TEXT, use_cache=False).logits
    fused = pair(model).train()
    assert torch.equal(fused(**BATCH).logits["text"], expected)


@pytest.mark.parametrize("family", ["opt", "biogpt", "xglm"])
def test_layers_that_are_dropped_in_training_are_refused(family: str) -> None:
    config = causal_lm(family).config
    config.layerdrop = 0.1
    fused = fuse(type(causal_lm(family))(config))
    for _ in range(20):
        with pytest.raises(mt.errors.TowerError, match="drops layers at random in training"):
            fused(**BATCH)
    expected = fused.unimodal("text").eval()(TEXT, use_cache=False).logits
    assert torch.equal(fused.tower("text").eval()(TEXT), expected)


def test_layers_of_a_frozen_tower_are_not_dropped() -> None:
    config = causal_lm("opt").config
    config.layerdrop = 0.9
    fuse(type(causal_lm("opt"))(config), train="none").train()(**BATCH).loss.backward()


def test_layers_may_be_told_to_stay() -> None:
    config = causal_lm("bart").config
    config.decoder_layerdrop = 0.9
    dropping = type(causal_lm("bart"))(config)
    with pytest.raises(mt.errors.TowerError, match=r"decoder_layerdrop=0"):
        fuse(dropping)(**BATCH)
    config.decoder_layerdrop = 0.0
    assert fuse(type(dropping)(config))(**BATCH).loss.isfinite()
