"""Decode with a fused model, with the native model alone and by a plain loop, to compare them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import multitower as mt
from models import BEGIN, END, causal_lm, pair, segment
from multitower.testing import open_links

STEPS = 7
FAMILIES = {
    "llama": {},
    "gpt2": {},
    "bloom": {},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mamba": {},
}
GIVEN = [
    [segment("speech", 5, 6, 7, 8)],
    [segment("text", 16, 18), segment("speech", 9, 3)],
    [segment("text", 4)],
    [segment("text", 4, 5, 6, 7, 8, 9, 10)],
]
EVEN = [
    [segment("text", 4, 5, 6)],
    [segment("speech", 5, 6), segment("text", 7, 8, 9)],
    [segment("text", 9, 9, 9), segment("speech", 3)],
]


@functools.cache
def text_model(family: str) -> nn.Module:
    """Return a decoder with weights so large that its output changes at every step."""
    model = causal_lm(family, seed=5, config={**FAMILIES[family], "tie_word_embeddings": False})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2 if family == "gemma3_text" and "embed" in name else 20)
    return model


def fused(family: str, *, gates: bool) -> mt.FusedModel:
    model = pair(text_model(family), causal_lm("llama", depth=4, vocab_size=14, seed=1))
    if not model.tower("text").decodes_cached:
        pytest.skip(f"transformers {transformers.__version__} decodes {family} otherwise than its forward")
    return open_links(model, seed=7, scale=3.0) if gates else model


def prompt(example: list[mt.Segment]) -> list[int]:
    return [token for each in example if each.tower == "text" for token in each.tokens] + [BEGIN]


def decode(model: mt.FusedModel, examples: list[list[mt.Segment]], **options: object) -> list[list[int]]:
    torch.manual_seed(11)
    return [row[0].tokens.tolist() for row in model.generate(examples, output=["text"], **options)]


def decode_alone(
    model: nn.Module, examples: list[list[mt.Segment]], *, ends: tuple[int, ...] = (END,), **options: object
) -> list[list[int]]:
    """Decode prompts of equal length with the native model; return each row from begin to end token."""
    torch.manual_seed(11)
    prompts = torch.tensor([prompt(example) for example in examples])
    mask = torch.ones_like(prompts)
    sequences = model.generate(prompts, attention_mask=mask, **{"pad_token_id": 0, **options})
    return [cut(sequence[prompts.shape[1] - 1 :].tolist(), ends) for sequence in sequences]


def cut(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    place = next((place for place, token in enumerate(tokens) if place and token in ends), len(tokens))
    return tokens[: place + 1]


def greedy(
    model: mt.FusedModel,
    example: list[mt.Segment],
    change: Callable[[Tensor, Tensor], Tensor] = lambda tokens, scores: scores,
    ends: tuple[int, ...] = (END,),
) -> list[int]:
    """Decode greedily without a cache, padding or ``generate``."""
    before, tokens = prompt(example)[:-1], [BEGIN]
    for _ in range(STEPS):
        logits = model(**mt.collate([[*example, mt.Segment("text", tokens)]])).logits["text"][:, -1]
        tokens.append(int(change(torch.tensor([before + tokens]), logits.detach().clone()).argmax()))
        if tokens[-1] in ends:
            break
    return tokens


class Stop(transformers.StoppingCriteria):
    """Stops a row at an even token, except directly after the begin token."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **unused: object) -> Tensor:
        return (input_ids[:, -1] % 2 == 0) & (input_ids[:, -2] != BEGIN)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


LETTERS = "abcdefghijklmnopqrst"


def letter_tokenizer() -> transformers.PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate(LETTERS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
