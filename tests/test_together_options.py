"""What options of generate do to towers that are decoded at the same time, against one decoded alone."""

from __future__ import annotations

import pytest
import torch

import multitower as mt
from decoding import GIVEN, STEPS, decode, fused, text_model
from models import causal_lm, pair, segment
from multitower.generate.together import ONLY_ALONE, STEPWISE
from test_generate_matrix import GREEDY

ONE_BY_ONE = [name for name, options in GREEDY.items() if set(options) <= set(STEPWISE)]
CASES = [(name, own) for name in ONE_BY_ONE for own in (False, True) if (name, own) != ("no end", True)]


def set_own(model: torch.nn.Module, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in options.items():
        monkeypatch.setattr(model.generation_config, key, value)


@pytest.mark.parametrize(("name", "own"), CASES)
def test_options_mean_the_same_token_by_token(name: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under closed gates a tower decodes beside others as by itself, whoever set the option."""
    text, model = text_model("llama"), fused("llama", gates=False)
    options = {} if own else {key: {"text": value} for key, value in GREEDY[name].items()}
    if own:
        set_own(text, GREEDY[name], monkeypatch)
    alone = decode(model, GIVEN, max_new_tokens=STEPS, **options)
    together = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=STEPS, **options)
    assert [text.tokens.tolist() for ((text, _),) in together] == alone


def test_a_batch_is_its_rows_where_tokens_that_were_there_are_penalised() -> None:
    """Some of transformers' penalties take padding for tokens of the row."""
    begin, text, speech = 3, causal_lm("llama"), causal_lm("llama", depth=4, vocab_size=14)
    text.generation_config.bos_token_id = speech.generation_config.bos_token_id = begin
    text.lm_head.weight.data[0] *= 9  # token 0, with which nothing begins here, is likely
    model, seen = pair(text, speech, gates=True), []
    given = [[mt.Segment("text", [begin, 4, 5, 6, 7, 8, 9, 1])], [mt.Segment("text", [begin, 4, 1])], []]
    options = {"output": [("text", "speech")], "repetition_penalty": 1.8, "max_new_tokens": STEPS}

    def note(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return scores

    together = model.generate(given, **options, logits_processor=[note])
    for row, found in zip(given, together, strict=True):
        (alone,) = model.generate([row], **options)
        assert str(found) == str(alone)
    padding = (seen[0].shape[1] - torch.tensor([9, 4, 1])).tolist()
    assert [row[:count].unique().tolist() for row, count in zip(seen[0], padding, strict=True)] == [
        [],
        [begin],
        [begin],
    ]


ALONE_SETTINGS = {
    "num_beams": 3,
    "num_return_sequences": 2,
    "max_time": 1.0,
    "encoder_repetition_penalty": 1.8,
    "encoder_no_repeat_ngram_size": 1,
    "exponential_decay_length_penalty": (2, 40.0),
}


@pytest.mark.parametrize("key", ALONE_SETTINGS)
def test_what_has_no_meaning_token_by_token_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model = text_model("llama"), fused("llama", gates=False)
    set_own(text, {key: ALONE_SETTINGS[key], "do_sample": True}, monkeypatch)
    neutral = ONLY_ALONE[key]
    message = (
        "num_return_sequences > 1 needs a single output"
        if key == "num_return_sequences"
        else rf"'text' has {key}=.* set model.unimodal\('text'\).generation_config.{key} = {neutral}"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=STEPS)
    set_own(text, {key: neutral}, monkeypatch)
    model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=1)


@pytest.mark.parametrize("own", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
def test_what_is_for_speed_alone_changes_nothing(own: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model = text_model("llama"), fused("llama", gates=True)
    expected = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=STEPS)
    set_own(text, own, monkeypatch)
    found = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=STEPS)
    tokens = [[[part.tokens.tolist() for part in entry] for (entry,) in each] for each in (found, expected)]
    assert tokens[0] == tokens[1]


def test_what_is_suppressed_at_the_beginning_comes_after_a_forced_first_token() -> None:
    model, given = fused("llama", gates=False), [[segment("speech", 5, 6)], []]
    options = {"forced_bos_token_id": {"text": 6}, "max_new_tokens": STEPS}
    after = {tokens[2] for tokens in decode(model, given, **options)}
    options["begin_suppress_tokens"] = {"text": sorted(after)}
    alone = decode(model, given, **options)
    together = model.generate(given, output=[("text", "speech")], **options)
    assert [text.tokens.tolist() for ((text, _),) in together] == alone
    assert not after & {tokens[2] for tokens in alone}
