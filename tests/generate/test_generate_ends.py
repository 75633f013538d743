"""Ends of decoding, streamers, and settings of the tower or of a generation config."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from decoding import (
    EVEN,
    GIVEN,
    LETTERS,
    STEPS,
    Kept,
    Stop,
    decode,
    decode_alone,
    fused,
    greedy,
    letter_tokenizer,
    prompt,
    text_model,
)
from families import tiny
from models import BEGIN, END, causal_lm, pair, segment
from multitower.testing import tiny_tower


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("ends", [(END,), (), (BEGIN, END)])
def test_stopping_criteria_end_each_row_where_it_would_end_alone(family: str, ends: tuple[int, ...]) -> None:
    model = fused(family, gates=True)
    options = {
        "stopping_criteria": [Stop()],
        "max_new_tokens": STEPS,
        "eos_token_id": list(ends) or None,
    }
    expected = []
    for example in GIVEN:
        tokens = greedy(model, example, ends=ends)
        stops = (k for k, token in enumerate(tokens) if k > 1 and token % 2 == 0 and tokens[k - 1] != BEGIN)
        expected.append(tokens[: next(stops, STEPS) + 1])
    assert len({len(tokens) for tokens in expected}) > 1
    assert decode(model, GIVEN, **options) == expected


def test_stop_strings_end_each_row() -> None:
    model = fused("llama", gates=True)
    by_hand = ["".join(LETTERS[token] for token in greedy(model, example)) for example in GIVEN]
    stop = by_hand[1][3:5]
    options = {"stop_strings": [stop], "tokenizer": letter_tokenizer(), "max_new_tokens": STEPS}
    found = ["".join(LETTERS[token] for token in tokens) for tokens in decode(model, GIVEN, **options)]
    assert found == [text[: text.index(stop) + 2] if stop in text else text for text in by_hand]
    assert len(found[1]) == 5 < max(map(len, found))


@pytest.mark.parametrize("kind", ["plain", "llama"])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 9.0}])
def test_a_streamer_gets_the_prompt_and_each_new_token(kind: str, options: dict) -> None:
    model = fused("llama", gates=True) if kind == "llama" else pair(gates=True)
    streamer = Kept()
    (found,) = decode(model, [GIVEN[1]], streamer=streamer, max_new_tokens=STEPS, **options)
    assert streamer.tokens == prompt(GIVEN[1]) + found[1:]
    assert streamer.ended == 1


def test_a_streamer_of_texts_needs_nothing_else() -> None:
    streamer = transformers.TextIteratorStreamer(letter_tokenizer(), skip_prompt=True)
    model = fused("llama", gates=True)
    (found,) = decode(model, [GIVEN[1]], streamer=streamer, max_new_tokens=STEPS)
    assert "".join(streamer) == "".join(LETTERS[token] for token in found[1:])


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_what_the_tower_has_set_for_itself_holds(family: str) -> None:
    fused(family, gates=False)
    text = copy.deepcopy(text_model(family))
    text.generation_config.update(repetition_penalty=1.8, max_new_tokens=4, return_dict_in_generate=True)
    native = [decode_alone(text_model(family), [e], repetition_penalty=1.8, max_new_tokens=4) for e in GIVEN]
    assert decode(pair(text), GIVEN) == [tokens for row in native for tokens in row]
    text.generation_config.update(max_new_tokens=None, max_length=12, return_dict_in_generate=False)
    native = [decode_alone(text, [example]) for example in GIVEN]
    assert decode(pair(text), GIVEN) == [tokens for row in native for tokens in row]
    text.generation_config.update(num_return_sequences=2, num_beams=2)
    native = [decode_alone(text, [example]) for example in GIVEN]
    assert decode(pair(text), GIVEN) == [tokens for row in native for tokens in row]


def test_what_a_tower_has_set_for_itself_does_not_make_it_decode_without_a_cache() -> None:
    text = causal_lm("llama", seed=5)
    expected = [decode(pair(text), [example], max_new_tokens=STEPS) for example in GIVEN]
    text.generation_config.update(prompt_lookup_num_tokens=3)
    model = pair(text)
    assert [decode(model, [example], max_new_tokens=STEPS) for example in GIVEN] == expected
    with pytest.raises(ValueError, match="batch_size = 1"):
        decode(model, GIVEN, max_new_tokens=STEPS)
    model.tower("text").__dict__["_unfaithful"] = "for a test"
    with pytest.warns(UserWarning, match="for a test"):
        assert decode(model, GIVEN[:1], max_new_tokens=STEPS) == expected[0]
    text.generation_config.update(prompt_lookup_num_tokens=None, stop_strings=["a"], guidance_scale=1.5)
    assert pair(text).tower("text").decodes_cached


def test_a_tower_that_decodes_without_a_cache_keeps_its_settings() -> None:
    text = copy.deepcopy(text_model("llama"))
    text.generation_config.update(repetition_penalty=1.8, max_new_tokens=4)
    model = pair(text)
    expected = decode(model, GIVEN)
    model.tower("text").__dict__["_unfaithful"] = "for a test"
    with pytest.warns(UserWarning, match="for a test"):
        assert decode(model, GIVEN) == expected


def test_a_generation_config_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multitower.generate.options.MAX_NEW_TOKENS", 30)
    config = transformers.GenerationConfig(num_beams=2)
    before = config.to_dict()
    model = fused("llama", gates=True)
    given = decode(model, GIVEN, generation_config=config)
    assert config.to_dict() == before
    assert given == decode(model, GIVEN, num_beams=2)
    assert max(map(len, given)) == 31  # transformers' own limit is 20 with the prompt


def test_a_begin_token_in_a_generation_config_opens_the_segment() -> None:
    model = fused("llama", gates=True)
    config = transformers.GenerationConfig(bos_token_id=7, max_new_tokens=3)
    found = decode(model, GIVEN, generation_config=config)
    assert found == decode(model, GIVEN, bos_token_id=7, max_new_tokens=3)
    assert {tokens[0] for tokens in found} == {7}


def test_rows_that_grow_to_the_last_position_stop_there() -> None:
    class Short(type(tiny_tower())):
        max_length = 6

        def embed(self, tokens: Tensor) -> tuple[Tensor, None]:
            assert tokens.shape[1] <= 6
            return super().embed(tokens)

    torch.manual_seed(0)
    model = pair(Short(2, 8, 20), gates=True)
    found = decode(model, [[segment("text", 4)], []], eos_token_id=None)
    assert [len(tokens) for tokens in found] == [3, 6]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [({}, [17, 10]), ({"max_length": 12}, [9, 2]), ({"max_new_tokens": 4}, [5, 5])],
)
def test_a_limit_is_that_of_a_row_alone(
    setting: dict, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, speech = (causal_lm("gpt2", vocab_size=size, config={"n_positions": 20}) for size in (20, 14))
    text.generation_config.eos_token_id = text.config.eos_token_id = None
    speech.generation_config.eos_token_id = speech.config.eos_token_id = None
    for key, value in setting.items():
        monkeypatch.setattr(text.generation_config, key, value)
    model = pair(text, speech, gates=True)
    given = [[segment("text", 4)], [segment("text", *range(2, 10))]]
    for output in (["text"], [("text", "speech")]):
        lengths = [
            len(part.tokens)
            for rows in (given, given[:1], given[1:])
            for (entry,) in model.generate(rows, output=output)
            for part in (entry if isinstance(entry, tuple) else (entry,))
            if part.tower == "text"
        ]
        assert lengths[:2] == lengths[2:] == expected


@pytest.mark.parametrize("output", [["text"], [("text", "speech")]])
@pytest.mark.parametrize("limit", [0, -1])
def test_a_segment_without_new_tokens_is_refused(output: list, limit: int) -> None:
    with pytest.raises(ValueError, match=rf"max_new_tokens.*{limit}|{limit} new tokens .*1 or more"):
        pair(causal_lm("llama")).generate(GIVEN, output, max_new_tokens=limit)


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
@pytest.mark.parametrize("output", [["text"], [("text", "speech")]])
def test_token_ids_may_be_integers_of_any_kind(output: list, kind: Callable[[int], Any]) -> None:
    model = fused("llama", gates=True)
    (plain,) = model.generate(GIVEN[:1], output, max_new_tokens=STEPS, bos_token_id={"text": 7})
    text = plain[0][0] if isinstance(plain[0], tuple) else plain[0]
    end = int(text.tokens[3])
    options = {"bos_token_id": {"text": kind(7)}, "max_new_tokens": STEPS}
    for value in (kind(end), [kind(end), kind(19)]):
        (row,) = model.generate(GIVEN[:1], output, eos_token_id={"text": value}, **options)
        found = row[0][0] if isinstance(row[0], tuple) else row[0]
        first = text.tokens.tolist()[1:].index(end) + 2
        assert found.tokens.tolist() == text.tokens.tolist()[:first]


def test_a_row_that_is_too_long_already_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = causal_lm("llama")
    monkeypatch.setattr(text.generation_config, "max_length", 4)
    with pytest.raises(ValueError, match=r"'text' has max_length=4, and 7 tokens already"):
        pair(text).generate([[segment("text", 4, 5, 6, 7)]], output=[("text", "speech")])


# docs/coverage.md documents this warning; only the limit is tested here.
@pytest.mark.filterwarnings("ignore:XLNetLMHeadModel decodes without its cache")
def test_a_family_that_says_it_has_no_last_position_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multitower.generate.options.MAX_NEW_TOKENS", 5)
    xlnet = tiny("xlnet")
    assert xlnet.config.max_position_embeddings == -1
    model = pair(xlnet)
    assert model.tower("text").max_length is None
    assert len(decode(model, GIVEN[:1], eos_token_id=None)[0]) == 6


@pytest.mark.parametrize(
    ("rows", "prepared", "message"),
    [
        (3, 3, ""),
        (3, 1, "prepare_inputs_for_generation before each forward"),
        (1, 3, "1 rows are decoded where 3 were prepared"),
    ],
)
def test_a_decoding_loop_of_the_caller(rows: int, prepared: int, message: str) -> None:
    def loop(model: nn.Module, input_ids: Tensor, **unused: object) -> Tensor:
        tokens = input_ids[:rows]
        for step in range(3):
            inputs = {"input_ids": tokens}
            if step < prepared:
                inputs = model.prepare_inputs_for_generation(tokens, use_cache=False)
            tokens = torch.cat([tokens, model(**inputs).logits[:, -1:].argmax(-1)], dim=1)
        return tokens

    model = fused("llama", gates=True)
    if message:
        with pytest.raises(ValueError, match=message):
            decode(model, EVEN, custom_generate=loop, eos_token_id=None)
    else:
        found = decode(model, EVEN, custom_generate=loop, eos_token_id=None)
        assert found == [greedy(model, example, ends=())[:4] for example in EVEN]
