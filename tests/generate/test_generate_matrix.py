"""Compare options of transformers' generate in a fused model with the native model."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import multitower as mt
from decoding import (
    EVEN,
    FAMILIES,
    GIVEN,
    STEPS,
    cut,
    decode,
    decode_alone,
    fused,
    greedy,
    prompt,
    text_model,
)
from models import BEGIN, END, causal_lm, pair, segment
from multitower.testing import open_links, tiny_tower

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def skip_unless_offered(family: str, options: dict) -> None:
    """Skip options that are broken in this version of transformers; in that of constraints.txt, none is."""
    pinned = f"transformers=={transformers.__version__}" in CONSTRAINTS.read_text().splitlines()
    model = text_model(family)
    for example in GIVEN:
        right = decode_alone(model, [example], max_new_tokens=STEPS, use_cache=False)
        try:
            found = decode_alone(model, [example], max_new_tokens=STEPS, **options)
        except Exception as error:
            if pinned:
                raise
            pytest.skip(f"transformers {transformers.__version__}: {error}")
        assert found == right or not pinned
        if found != right:
            pytest.skip(f"transformers {transformers.__version__} decodes {family} otherwise with {options}")


class Halve(transformers.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.where(torch.arange(scores.shape[-1]) % 2 == input_ids[:, -1:] % 2, scores / 2, scores)


GREEDY = {
    "nothing": {},
    "use_cache": {"use_cache": False},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "max_time": {"max_time": 600.0},
    "beams": {"num_beams": 3},
    "long beams": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    "short beams": {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never"},
    "several beams": {"num_beams": 4, "num_return_sequences": 3},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [END, 16, 18]},
    "min_length": {"min_length": 8, "eos_token_id": [END, 16, 18]},
    "forced_bos_token_id": {"forced_bos_token_id": 6},
    "forced_eos_token_id": {"forced_eos_token_id": 3},
    "suppress_tokens": {"suppress_tokens": [16, 18, 8]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [16, 18, 8]},
    "bad_words_ids": {"bad_words_ids": [[16], [18, 16], [BEGIN, 8]]},
    "sequence_bias": {"sequence_bias": {(7,): 300.0, (7, 7): -900.0}},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 40.0)},
    "renormalize_logits": {"renormalize_logits": True, "remove_invalid_values": True},
    "watermarking": {"watermarking_config": transformers.WatermarkingConfig(bias=300.0)},
    "no end": {"eos_token_id": None},
    "other ends": {"eos_token_id": [16, 9]},
}
SAMPLED = {
    "sampling": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 30.0, "top_k": 5},
    "top_p": {"do_sample": True, "temperature": 30.0, "top_p": 0.8},
    "min_p": {"do_sample": True, "temperature": 30.0, "min_p": 0.1, "top_k": 0},
    "typical_p": {"do_sample": True, "temperature": 30.0, "typical_p": 0.7},
    "cutoffs": {"do_sample": True, "temperature": 30.0, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
    "top_h": {"do_sample": True, "temperature": 30.0, "top_h": 0.6},
    "num_return_sequences": {"do_sample": True, "temperature": 30.0, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "temperature": 30.0, "num_beams": 3, "num_return_sequences": 2},
    "logits_processor": {"logits_processor": [Halve()]},
    "prefix_allowed": {"prefix_allowed_tokens_fn": lambda row, tokens: [row + 2, 5, 7, len(tokens) % 20]},
    "generation_config": {
        "generation_config": transformers.GenerationConfig(
            do_sample=True, temperature=30.0, top_k=7, max_new_tokens=5, eos_token_id=[END, 16]
        ),
        "max_new_tokens": 5,
    },
}
EVERYWHERE = ("several beams", "temperature")


CASES = [
    (family, name)
    for family, name in itertools.product(FAMILIES, [*GREEDY, *SAMPLED])
    if family == "llama" or name in EVERYWHERE
]


def _ends(options: dict) -> tuple[int, ...]:
    ends = options.get("eos_token_id", getattr(options.get("generation_config"), "eos_token_id", None) or END)
    return (ends,) if isinstance(ends, int) else tuple(ends or ())


@pytest.mark.parametrize(("family", "name"), CASES)
def test_closed_gates_decode_as_the_native_model(family: str, name: str) -> None:
    model, alone = fused(family, gates=False), text_model(family)
    options = {"max_new_tokens": STEPS, **{**GREEDY, **SAMPLED}[name]}
    native = decode_alone(alone, EVEN, ends=_ends(options), **options)
    assert decode(model, EVEN, **options) == native
    assert len({tuple(tokens) for tokens in native}) > 1
    if name in GREEDY:
        rows = [decode_alone(alone, [example], ends=_ends(options), **options) for example in GIVEN]
        assert decode(model, GIVEN, **options) == [tokens for row in rows for tokens in row]


@pytest.mark.parametrize("name", [name for name in GREEDY if name not in ("nothing", "dynamic cache")])
def test_options_change_something(name: str) -> None:
    """Otherwise the comparison above would not test the option."""
    same = ("use_cache", "max_time", "renormalize_logits", "no end")
    model = text_model("llama")
    options = {"max_new_tokens": STEPS, **GREEDY[name]}
    plain = {
        "max_new_tokens": STEPS,
        "eos_token_id": options.get("eos_token_id", END) if "min" in name else END,
    }
    found = [decode_alone(model, [example], ends=_ends(options), **options) for example in GIVEN]
    without = [decode_alone(model, [example], ends=_ends(plain), **plain) for example in GIVEN]
    assert (found == without) == (name in same)


OTHERS = [token for token in range(20) if token not in (0, BEGIN, 4)]
SEE_PADDING = [
    {"bad_words_ids": [[0, BEGIN, 14]]},
    {"sequence_bias": {(0, BEGIN, 14): -900.0}},
    {"no_repeat_ngram_size": 2, "suppress_tokens": OTHERS},
    {"encoder_no_repeat_ngram_size": 2, "suppress_tokens": OTHERS},
    {"watermarking_config": transformers.WatermarkingConfig(bias=300.0, context_width=2)},
    {"forced_bos_token_id": 6},
    {"forced_bos_token_id": 0},
    {"min_length": 8, "eos_token_id": [END, 16, 18]},
    {"max_length": 12, "max_new_tokens": None},
]


@pytest.mark.parametrize("options", SEE_PADDING)
def test_padding_is_no_part_of_a_row(options: dict) -> None:
    options = {"max_new_tokens": STEPS, **options}
    text, ends, length = text_model("llama"), _ends(options), len(prompt(GIVEN[3]))
    alone = [tokens for example in GIVEN for tokens in decode_alone(text, [example], ends=ends, **options)]
    prompts = torch.tensor([[0] * (length - len(prompt(each))) + prompt(each) for each in GIVEN])
    mask = torch.tensor([[0] * (length - len(prompt(each))) + [1] * len(prompt(each)) for each in GIVEN])
    padded = text.generate(prompts, attention_mask=mask, pad_token_id=0, **options)
    assert [cut(row[length - 1 :].tolist(), ends) for row in padded] != alone
    assert decode(fused("llama", gates=False), GIVEN, **options) == alone


SAME_AS_GREEDY = {
    "one call": {},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunks of 2": {"prefill_chunk_size": 2},
    "chunks of 3": {"prefill_chunk_size": 3},
    "chunks into a static cache": {"cache_implementation": "static", "prefill_chunk_size": 2},
    "not synced": {"synced_gpus": False},
}

QUICK = {
    *(("llama", name) for name in ("one call", "static cache", "chunks of 2")),
    ("gemma3_text", "chunks of 2"),
    ("mamba", "one call"),
}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, name) in QUICK else pytest.mark.slow)
        for family, name in itertools.product(FAMILIES, SAME_AS_GREEDY)
        if family == "llama"
        or name in ("one call", "static cache")
        or (name == "chunks of 2" and family != "mamba")
    ],
)
def test_open_gates_decode_as_by_hand(family: str, name: str) -> None:
    model, options = fused(family, gates=True), SAME_AS_GREEDY[name]
    skip_unless_offered(family, options)
    by_hand = [greedy(model, example) for example in GIVEN]
    assert by_hand != [greedy(fused(family, gates=False), example) for example in GIVEN]
    assert decode(model, GIVEN, max_new_tokens=STEPS, **options) == by_hand


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk_size": 2}, "prefill chunking without a cache"),
        ({"prompt_lookup_num_tokens": 2}, "not supported with stateful models"),
    ],
)
def test_what_a_family_cannot_do_it_says_itself(options: dict, message: str) -> None:
    model = fused("mamba", gates=True)
    with pytest.raises(ValueError, match=message):
        decode_alone(text_model("mamba"), GIVEN[:1], max_new_tokens=STEPS, **options)
    with pytest.raises(ValueError, match=message):
        decode(model, GIVEN[:1], max_new_tokens=STEPS, **options)


ASSISTED = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "good assistant": {"assistant_model": "itself"},
    "bad assistant": {"assistant_model": "another"},
}


@pytest.mark.parametrize("name", ASSISTED)
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(each, marks=pytest.mark.slow) for each in ("gpt2", "mistral", "gemma3_text"))],
)
def test_assisted_decoding_is_greedy(family: str, name: str) -> None:
    model, options = fused(family, gates=True), dict(ASSISTED[name])
    assistants = {"itself": copy.deepcopy(text_model(family)), "another": causal_lm("llama", seed=9)}
    if "assistant_model" in options:
        options["assistant_model"] = assistants[options["assistant_model"]]
    skip_unless_offered(family, options)
    for example in GIVEN:
        found = decode(model, [example], max_new_tokens=STEPS, do_sample=False, **options)
        assert found == [greedy(model, example)]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"repetition_penalty": 1.8}, transformers.RepetitionPenaltyLogitsProcessor(1.8)),
        ({"no_repeat_ngram_size": 1}, transformers.NoRepeatNGramLogitsProcessor(1)),
        ({"no_repeat_ngram_size": 2}, transformers.NoRepeatNGramLogitsProcessor(2)),
        ({"suppress_tokens": [16, 18]}, transformers.SuppressTokensLogitsProcessor([16, 18])),
        ({"logits_processor": [Halve()]}, Halve()),
        (
            {"bad_words_ids": [[END, BEGIN, 18], [BEGIN, 16], [18]]},
            transformers.NoBadWordsLogitsProcessor(
                [[END, BEGIN, 18], [BEGIN, 16], [18]], torch.tensor([END])
            ),
        ),
    ],
)
def test_open_gates_with_processors_by_hand(
    options: dict, change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model = fused("llama", gates=True)
    by_hand = [greedy(model, example, change) for example in GIVEN]
    assert by_hand != [greedy(model, example) for example in GIVEN]
    assert decode(model, GIVEN, max_new_tokens=STEPS, **options) == by_hand


def test_open_gates_sample_from_their_own_distribution() -> None:
    model = fused("llama", gates=True)
    tokens = [BEGIN]
    torch.manual_seed(11)
    for _ in range(STEPS):
        logits = model(**mt.collate([[*GIVEN[1], mt.Segment("text", tokens)]])).logits["text"][0, -1]
        best, ids = (logits / 30).topk(6)
        chosen = torch.full_like(logits, -math.inf).scatter(0, ids, best).softmax(-1)
        tokens.append(int(chosen.multinomial(1)))
        if tokens[-1] == END:
            break
    options = {"do_sample": True, "temperature": 30.0, "top_k": 6, "max_new_tokens": STEPS}
    assert decode(model, [GIVEN[1]], **options) == [tokens]


@pytest.mark.parametrize("tower", ["plain", "llama"])
@pytest.mark.parametrize("copies", [1, 4])
def test_wide_beams_find_the_best_of_all_sequences(tower: str, copies: int) -> None:
    size, steps = 6, 3
    plain = tiny_tower(3, vocab_size=size)
    text = plain if tower == "plain" else causal_lm(tower, vocab_size=size, seed=5)
    model = open_links(pair(text), seed=7, scale=3.0)
    examples = [[segment("speech", 5, 6, 7, 8)], [segment("text", 4, 5, 2), segment("speech", 9, 3)]]
    options = {"max_new_tokens": steps, "eos_token_id": None, "num_beams": size**2}
    found = decode(model, examples, **options, num_return_sequences=copies)
    for number, example in enumerate(examples):
        every = [[BEGIN, *tokens] for tokens in itertools.product(range(size), repeat=steps)]
        batch = mt.collate([[*example, mt.Segment("text", tokens)] for tokens in every])
        scores = model(**batch).logits["text"][:, -steps - 1 : -1].log_softmax(-1)
        total = scores.gather(2, torch.tensor(every)[:, 1:, None]).sum((1, 2))
        best = [every[place] for place in total.topk(copies).indices]
        assert found[number * copies : (number + 1) * copies] == best


def test_rows_keep_their_order_when_beams_and_lengths_differ() -> None:
    model = fused("llama", gates=True)
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": STEPS, "no_repeat_ngram_size": 2}
    alone = [decode(model, [example], **options) for example in GIVEN]
    assert decode(model, GIVEN, **options) == [tokens for row in alone for tokens in row]
