"""Models with quantised weights, as frozen towers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.storage.fingerprint import fingerprint
from multitower.testing import open_links, tiny_tower

BATCH = mt.collate(EXAMPLES)
TEXT = BATCH["streams"]["text"]["tokens"]


def torchao() -> Any:
    """Import torchao's quantisation, or skip the test."""
    pytest.importorskip("torchao", reason="needs torchao")
    return importlib.import_module("torchao.quantization")


def quanto() -> Any:
    return pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")


def torchao_int8(folder: Path, family: str = "llama", seed: int = 0) -> nn.Module:
    ao, model = torchao(), causal_lm(family, width=32, seed=seed)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    return model


def torchao_int4(folder: Path, family: str = "llama", seed: int = 0) -> nn.Module:
    ao, model = torchao(), causal_lm(family, width=32, seed=seed)
    by_group = ao.granularity.PerGroup(16)
    ao.quantize_(model, ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=by_group))
    return model


def torchao_by_transformers(folder: Path, family: str = "llama", seed: int = 0) -> nn.Module:
    config = transformers.TorchAoConfig(torchao().Int8WeightOnlyConfig())
    return loaded(folder, family, seed, config)


def quanto_int8(folder: Path, family: str = "llama", seed: int = 0) -> nn.Module:
    library, model = quanto(), causal_lm(family, width=32, seed=seed)
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


def quanto_int4(folder: Path, family: str = "llama", seed: int = 0) -> nn.Module:
    library, model = quanto(), causal_lm(family, width=32, seed=seed)
    library.quantize(model, weights=library.qint4)
    library.freeze(model)
    return model


def quanto_by_transformers(folder: Path, family: str = "llama", seed: int = 0) -> nn.Module:
    quanto()
    return loaded(folder, family, seed, transformers.QuantoConfig(weights="int8"))


def loaded(folder: Path, family: str, seed: int, config: Any) -> nn.Module:
    plain = folder / f"plain-{family}-{seed}"
    causal_lm(family, width=32, seed=seed).save_pretrained(plain)
    return transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)


Quantise = Callable[..., nn.Module]
STORED: tuple[Quantise, ...] = (torchao_by_transformers,)
LEFT_OUT: tuple[Quantise, ...] = (
    torchao_int8,
    torchao_int4,
    quanto_int8,
    quanto_int4,
    quanto_by_transformers,
)
every = pytest.mark.parametrize("quantise", STORED + LEFT_OUT)


@pytest.mark.parametrize(
    ("family", "quantise"),
    [*(("llama", quantise) for quantise in STORED + LEFT_OUT), ("gemma3_text", torchao_by_transformers)],
)
def test_quantised_towers_are_bit_equal(quantise: Quantise, family: str, tmp_path: Path) -> None:
    model = quantise(tmp_path, family)
    expected = model(TEXT, use_cache=False).logits
    assert not torch.equal(expected, causal_lm(family, width=32)(TEXT, use_cache=False).logits)
    assert torch.equal(mt.TransformersTower(model)(TEXT), expected)
    assert torch.equal(pair(model)(**BATCH).logits["text"], expected)


@every
def test_links_train_through_a_quantised_tower(quantise: Quantise, tmp_path: Path) -> None:
    fused = pair(quantise(tmp_path), gates=True)
    optimizer = torch.optim.AdamW(fused.parameter_groups(lr=1e-2))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = fused(**BATCH).loss
        loss.backward()
        losses.append(loss.item())
        for name, parameter in fused.named_parameters():
            trained = name.startswith(("links.", "adapters."))
            assert (parameter.grad is not None) == trained, name
        optimizer.step()
    assert losses[-1] < losses[0]


@every
def test_gradients_are_those_of_the_weights_that_were_quantised(quantise: Quantise, tmp_path: Path) -> None:
    quantised = quantise(tmp_path)
    plain = causal_lm("llama", width=32)
    state = {name: weight for name, weight in dequantised(quantised) if name in plain.state_dict()}
    plain.load_state_dict(state, strict=False)
    torch.testing.assert_close(quantised(TEXT).logits, plain(TEXT).logits, rtol=1e-4, atol=1e-5)
    found, expected = pair(quantised, gates=True), pair(plain, gates=True)
    for fused in (found, expected):
        fused(**BATCH).loss.backward()
    for name, parameter in found.links.named_parameters():
        wanted = expected.links.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5)


def dequantised(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in model.named_parameters():
        packed = "Tensor" in type(weight).__name__
        yield name, weight.dequantize() if packed else weight


@every
def test_quantised_towers_generate(quantise: Quantise, tmp_path: Path) -> None:
    fused = pair(quantise(tmp_path), gates=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    rows = fused.generate([[EXAMPLES[0][0]], [EXAMPLES[1][0]]], ["text"], **options)
    tower = fused.tower("text")
    assert tower._unfaithful == ""
    for (segment,), given in zip(rows, (EXAMPLES[0][0], EXAMPLES[1][0]), strict=True):
        tokens = segment.tokens.tolist()
        for length in range(1, 5):
            batch = mt.collate([[given, mt.Segment("text", tokens[:length])]])
            scores = fused(**batch).logits["text"][0, -1]
            assert scores.where(torch.arange(20) != 1, -torch.inf).argmax() == tokens[length]


@every
def test_fingerprints_see_quantised_weights(quantise: Quantise, tmp_path: Path) -> None:
    prints = [fingerprint(quantise(tmp_path, seed=seed).state_dict()) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0] != fingerprint(causal_lm("llama", width=32).state_dict())


@pytest.mark.parametrize("quantise", STORED)
def test_stored_towers_come_back_as_they_were(quantise: Quantise, tmp_path: Path) -> None:
    fused = pair(quantise(tmp_path), gates=True)
    fused.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"speech": fused.tower("speech")})
    assert torch.equal(again(**BATCH).logits["text"], fused(**BATCH).logits["text"])
    kinds = [{type(each).__name__ for each in model.parameters()} for model in (fused, again)]
    assert kinds[0] == kinds[1] == {"Parameter", "Int8Tensor"}


@pytest.mark.parametrize("quantise", LEFT_OUT)
def test_towers_that_cannot_be_stored_are_given_again(quantise: Quantise, tmp_path: Path) -> None:
    fused, folder = pair(quantise(tmp_path), gates=True), tmp_path / "fused"
    with pytest.warns(UserWarning, match=r"tower 'text' is quantised .* towers=\{'text': module\}"):
        fused.save_pretrained(folder)
    assert not (folder / "towers" / "text").exists()
    speech = fused.tower("speech")
    with pytest.raises(
        mt.errors.CheckpointError, match=r"tower 'text' was declared with a module.*towers=\{'text'"
    ):
        mt.FusedModel.from_pretrained(folder, towers={"speech": speech})
    with pytest.raises(mt.errors.CheckpointError, match="tower 'text' from LlamaForCausalLM is not the one"):
        mt.FusedModel.from_pretrained(folder, towers={"speech": speech, "text": causal_lm("llama", width=32)})
    towers = {"speech": speech, "text": quantise(tmp_path)}
    again = mt.FusedModel.from_pretrained(folder, towers=towers)
    assert torch.equal(again(**BATCH).logits["text"], fused(**BATCH).logits["text"])


@pytest.mark.parametrize("quantise", LEFT_OUT)
def test_embedding_a_tower_that_cannot_be_stored_is_refused(quantise: Quantise, tmp_path: Path) -> None:
    fused = pair(quantise(tmp_path))
    with pytest.raises(mt.errors.CheckpointError, match="tower 'text' is quantised"):
        fused.save_pretrained(tmp_path / "fused", embed_towers=True)
    assert not (tmp_path / "fused").exists()


@every
def test_training_quantised_weights_is_refused(quantise: Quantise, tmp_path: Path) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", quantise(tmp_path), train="all")
    with pytest.raises(mt.errors.TowerError, match="tower 'text' is quantised"):
        graph.compile()


def test_any_tower_may_be_quantised(tmp_path: Path) -> None:
    ao, speech = torchao(), tiny_tower(1, depth=4, width=12, vocab_size=14)
    before = speech(BATCH["streams"]["speech"]["tokens"])
    ao.quantize_(speech, ao.Int8WeightOnlyConfig())
    fused = pair(speech=speech)
    logits = fused(**BATCH).logits["speech"]
    assert torch.equal(logits, speech(BATCH["streams"]["speech"]["tokens"]))
    assert not torch.equal(logits, before)
    with pytest.warns(UserWarning, match="tower 'speech' is quantised"):
        fused.save_pretrained(tmp_path / "fused")
    towers = {"speech": speech, "text": fused.tower("text")}
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers=towers)
    assert torch.equal(again(**BATCH).logits["speech"], logits)


def test_links_compute_in_no_dtype_that_only_stores() -> None:
    speech = tiny_tower(1, depth=4, width=12, vocab_size=14)
    speech.packed = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
    assert next(speech.parameters()) is speech.packed
    fused = pair(speech=speech)
    assert {parameter.dtype for parameter in fused.links.parameters()} == {torch.float32}
    with pytest.raises(mt.errors.TowerError, match=r"tower 'speech' is quantised \(float8_e4m3fn\)"):
        pair(speech=speech, train="all")


@pytest.mark.parametrize("with_head", [True, False])
def test_quantised_activations_pass_no_gradient(with_head: bool) -> None:
    ao, model = torchao(), causal_lm("llama", width=32)
    chosen = None if with_head else lambda module, name: isinstance(module, nn.Linear) and name != "lm_head"
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig(), filter_fn=chosen)
    expected = model(TEXT, use_cache=False).logits
    with pytest.warns(
        UserWarning, match=r"tower 'text' is quantised .*'model\.layers\.0.* passes no gradient"
    ):
        fused = pair(model)
    assert torch.equal(fused(**BATCH).logits["text"], expected)


def test_a_quantised_tower_that_nothing_feeds_may_quantise_activations() -> None:
    ao, model = torchao(), causal_lm("llama", width=32)
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())
    graph = mt.FusionGraph()
    graph.add_tower("text", model, adapter=None)
    graph.add_tower("speech", tiny_tower(1, vocab_size=14))
    graph.add_link("text", "speech", interleave=1)
    open_links(graph.compile())(**BATCH).losses["speech"].backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes needs a GPU")
def test_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = loaded(tmp_path, "llama", 0, config)
    tokens = TEXT.to(model.device)
    expected = model(tokens, use_cache=False).logits
    assert torch.equal(mt.TransformersTower(model)(tokens), expected)
    fused = pair(model, causal_lm("gpt2", depth=4, vocab_size=14).cuda(), gates=True)
    streams = {name: {k: v.cuda() for k, v in part.items()} for name, part in BATCH["streams"].items()}
    fused(streams).loss.backward()
    assert all(parameter.grad is not None for parameter in fused.links.parameters())
    graph = mt.FusionGraph()
    graph.add_tower("text", model, train="all")
    with pytest.raises(mt.errors.TowerError, match="tower 'text' is quantised"):
        graph.compile()
