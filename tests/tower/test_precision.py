"""Attention implementations and dtypes of transformers models, as towers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.testing import open_links

BATCH = mt.collate(EXAMPLES)
TEXT = BATCH["streams"]["text"]["tokens"]
SPEECH = BATCH["streams"]["speech"]["tokens"]

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled flex_attention needs a GPU")


def native(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt"])
def test_attention_implementations(family: str, implementation: str) -> None:
    model = causal_lm(family)
    model.set_attn_implementation(implementation)
    tower = mt.TransformersTower(model)
    assert torch.equal(tower(TEXT), native(model, TEXT))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt"])
def test_attention_may_be_switched_on_a_fused_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = causal_lm(family)
    model.set_attn_implementation("sdpa")
    fused = pair(model)
    used = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(*args: object, **kwargs: object) -> object:
        used.append(True)
        return sdpa(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", watched)
    fused(**BATCH)
    assert used
    used.clear()
    model.set_attn_implementation("eager")
    assert torch.equal(fused(**BATCH).logits["text"], native(model, TEXT))
    assert not used


@cuda
def test_flex_attention() -> None:
    model = causal_lm("llama", width=64).cuda()
    model.set_attn_implementation("flex_attention")
    tokens = TEXT.cuda()
    assert torch.equal(mt.TransformersTower(model)(tokens), native(model, tokens))
    fused = open_links(pair(model))
    streams = {name: {k: v.cuda() for k, v in part.items()} for name, part in BATCH["streams"].items()}
    fused.tower("speech").cuda()
    fused.links.cuda()
    fused(streams).loss.backward()


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("family", "text_dtype", "speech_dtype"),
    [
        *(("llama", *both) for both in itertools.product(DTYPES, DTYPES)),
        *((family, *both) for family in ("mamba", "zaya") for both in itertools.permutations(DTYPES[:2])),
    ],
)
def test_towers_of_any_two_dtypes(family: str, text_dtype: torch.dtype, speech_dtype: torch.dtype) -> None:
    text = causal_lm(family).to(text_dtype)
    speech = causal_lm("gpt2", width=24, depth=4, vocab_size=14).to(speech_dtype)
    fused = pair(text, speech)
    logits = fused(**BATCH).logits
    assert torch.equal(logits["text"], native(text, TEXT))
    assert torch.equal(logits["speech"], native(speech, SPEECH))
    alone = fused.run(BATCH["streams"]).hidden
    open_links(fused)
    together = fused.run(BATCH["streams"]).hidden
    for name, states in alone.items():
        assert states.dtype == together[name].dtype
        assert not torch.equal(states, together[name])
    fused(**BATCH, output_attentions=True).loss.backward()
    for name, parameter in fused.named_parameters():
        if name.startswith(("links.", "adapters.")):
            assert parameter.dtype == torch.float32, "half precision leaves most weights where they are"
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("text_dtype", [torch.float32, torch.bfloat16])
def test_generating_reads_a_source_of_another_dtype(text_dtype: torch.dtype) -> None:
    other = torch.bfloat16 if text_dtype == torch.float32 else torch.float32
    fused = pair(causal_lm("llama").to(text_dtype), causal_lm("gpt2", depth=4, vocab_size=14).to(other))
    ((closed,),) = fused.generate([[EXAMPLES[0][0]]], ["text"], max_new_tokens=6, min_new_tokens=6)
    ((opened,),) = open_links(fused, scale=3).generate(
        [[EXAMPLES[0][0]]], ["text"], max_new_tokens=6, min_new_tokens=6
    )
    assert len(closed.tokens) == len(opened.tokens) == 7
    assert closed.tokens.tolist() != opened.tokens.tolist()


def test_residual_streams_wider_than_the_weights() -> None:
    text = causal_lm("mamba").to(torch.bfloat16)
    assert text.config.residual_in_fp32
    fused = pair(text, gates=True)
    assert fused.run(BATCH["streams"]).hidden["text"].dtype == torch.float32
    assert {parameter.dtype for parameter in text.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_training_under_autocast(family: str) -> None:
    fused = pair(causal_lm(family), causal_lm("gpt2", depth=4, vocab_size=14), gates=True)
    optimizer = torch.optim.AdamW(fused.parameter_groups(lr=1e-2))
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = fused(**BATCH, output_attentions=True)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.float32}


def test_closed_gates_are_bit_equal_under_autocast() -> None:
    text = causal_lm("llama")
    fused = pair(text)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(fused(**BATCH).logits["text"], native(text, TEXT))


def test_softmax_in_float32_is_told_from_a_difference_in_float64() -> None:
    """Eager attention always takes it in float32, which is no reason to refuse packed batches."""
    model = causal_lm("gemma2").double()
    assert model.config._attn_implementation == "eager"
    assert mt.TransformersTower(model).packs


def test_training_in_half_precision_is_told_before_it_begins() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("llama", vocab_size=14).to(torch.bfloat16), train="all")
    graph.add_tower("text", causal_lm("llama").to(torch.bfloat16))
    graph.add_link("speech", "text", interleave=1)
    model = graph.compile()
    with pytest.warns(UserWarning, match=r"model\.towers\['speech'\] is trained in torch.bfloat16") as warned:
        model.parameter_groups(lr=1e-3)
    assert len(warned) == 1, "the frozen tower and the links need no warning"
    model.towers["speech"].float()
    model.parameter_groups(lr=1e-3)
    model(**mt.collate(EXAMPLES)).loss.backward()
