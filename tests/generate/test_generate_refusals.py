"""Options that generate does not support raise an error with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers

from decoding import GIVEN, Kept, Stop, decode, fused, letter_tokenizer
from models import causal_lm, pair

SCORES = r"score them with model\(\*\*multitower.collate"
REFUSED = [
    ({"return_dict_in_generate": True}, SCORES),
    ({"output_scores": True}, SCORES),
    ({"output_logits": True}, SCORES),
    ({"generation_config": transformers.GenerationConfig(return_dict_in_generate=True)}, SCORES),
    ({"output_attentions": True}, "attention of the links"),
    ({"output_hidden_states": True}, "model.run gives the states"),
    ({"guidance_scale": 1.5}, "a prompt of its own"),
    ({"negative_prompt_ids": torch.tensor([[2]])}, "a prompt of its own"),
    ({"token_healing": True, "tokenizer": letter_tokenizer()}, "heal the tokens before"),
    ({"assistant_early_exit": 1}, "take prompt_lookup_num_tokens or assistant_model"),
    ({"cache_implementation": "paged"}, "take 'dynamic' or 'static'"),
    ({"position_ids": torch.tensor([[0]])}, "comes from the examples"),
    ({"streamer": Kept()}, "one example at a time"),
    ({"bos_token_id": 20}, "begin token 20 is outside the vocabulary of 20"),
    (
        {"num_return_sequences": 2, "do_sample": True, "stopping_criteria": [Stop()]},
        "nothing says where each of them stopped",
    ),
    ({"prefix_allowed_tokens_fn": len, "no_repeat_ngram_size": 2}, "call generate once for each"),
]
REFUSED_OF_TWO = [
    ({"eos_token_id": 5}, "eos_token_id means tokens of one tower; decode text and speech"),
    ({"bad_words_ids": [[5]]}, "bad_words_ids means tokens of one tower"),
    ({"generation_config": transformers.GenerationConfig(suppress_tokens=[5])}, "suppress_tokens means"),
    ({"num_return_sequences": 2, "num_beams": 2}, "single output tower"),
    (
        {"generation_config": transformers.GenerationConfig(num_return_sequences=2, num_beams=2)},
        "single output tower",
    ),
]
REFUSED_BY_TRANSFORMERS = [
    ({"num_beamz": 2}, r"not used by the model: \['num_beamz'\]"),
    ({"num_return_sequences": 2, "do_sample": False}, "Greedy methods"),
    ({"prompt_lookup_num_tokens": 2}, "batch_size = 1"),
    ({"num_beams": 2, "low_memory": True}, "low_memory"),
    ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, "trust_remote_code"),
    ({"penalty_alpha": 0.5, "top_k": 4}, "trust_remote_code"),
    ({"dola_layers": "low"}, "trust_remote_code"),
    ({"num_beams": 2, "force_words_ids": [[5]]}, "trust_remote_code"),
    ({"stop_strings": ["f"]}, "pass the model's tokenizer"),
    ({"use_mtp": True}, "batch_size = 1|mtp"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(fused("llama", gates=True), GIVEN, **options)


@pytest.mark.parametrize("output", [["text"], [("text", "speech")]])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("guidance_scale", 1.5, "a prompt of its own"),
        ("assistant_early_exit", 1, "take prompt_lookup_num_tokens or assistant_model"),
        ("token_healing", True, "heal the tokens before"),
    ],
)
def test_what_cannot_work_is_refused_of_the_tower_itself(
    key: str, value: object, message: str, output: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair(causal_lm("llama"))
    monkeypatch.setattr(model.unimodal("text").generation_config, key, value)
    with pytest.raises(ValueError, match=message):
        model.generate(GIVEN, output, max_new_tokens=2)


def test_a_paged_cache_of_the_tower_itself_is_refused_where_it_would_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pair(causal_lm("llama"))
    monkeypatch.setattr(model.unimodal("text").generation_config, "cache_implementation", "paged")
    with pytest.raises(ValueError, match="take 'dynamic' or 'static'"):
        decode(model, GIVEN, max_new_tokens=2)
    assert decode(model, GIVEN, max_new_tokens=2, cache_implementation=None)
    assert model.generate(GIVEN, [("text", "speech")], max_new_tokens=2)


def test_what_is_off_is_not_refused() -> None:
    model = pair(causal_lm("llama"))
    plain = decode(model, GIVEN, max_new_tokens=2)
    assert decode(model, GIVEN, max_new_tokens=2, guidance_scale=1, output_scores=False) == plain
    model.unimodal("text").generation_config.guidance_scale = 1.5
    assert decode(model, GIVEN, max_new_tokens=2, guidance_scale=1) == plain


@pytest.mark.parametrize(("options", "message"), REFUSED_OF_TWO)
def test_what_means_one_tower_is_refused_for_two(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused("llama", gates=True).generate(GIVEN, output=["text", "speech"], **options)


@pytest.mark.parametrize(("options", "message"), REFUSED_BY_TRANSFORMERS)
def test_what_transformers_refuses_it_says_itself(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(fused("llama", gates=True), GIVEN, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": True}, "decodes without a cache"),
        ({"generation_config": transformers.GenerationConfig(use_cache=True)}, "decodes without a cache"),
        ({"prefill_chunk_size": 2}, "without a cache"),
        ({"prompt_lookup_num_tokens": 2}, "requires `use_cache=True`"),
        ({"num_beamz": 2}, "not used by the model"),
    ],
)
def test_what_needs_a_cache_is_refused_where_there_is_none(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(pair(gates=True), GIVEN[:1], **options)
