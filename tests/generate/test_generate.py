from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

import multitower as mt
from models import BEGIN, END, causal_lm, pair, segment

SOURCES = [
    [segment("speech", 5, 6, 7, 8)],
    [segment("text", 4, 5), segment("speech", 9, 3)],
    [segment("text", 4)],
    [segment("text", 4), (segment("text", 4, 5), segment("speech", 9, 3, 2)), segment("speech", 5)],
]


def towers(kind: str, position: str | None = None, window: int | None = None) -> mt.FusedModel:
    if kind == "plain":
        return pair(gates=True, position=position, window=window)
    speech = causal_lm("llama", depth=4, vocab_size=14, seed=1)
    return pair(causal_lm(kind), speech, gates=True, position=position, window=window)


def greedy_by_hand(model: mt.FusedModel, example: list[mt.Segment], name: str, steps: int) -> list[int]:
    tokens = [BEGIN]
    for _ in range(steps):
        logits = model(**mt.collate([[*example, mt.Segment(name, tokens)]])).logits[name]
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == END:
            break
    return tokens


def lists(decoded: list[list[mt.Segment]]) -> list[list[list[int]]]:
    return [[segment.tokens.tolist() for segment in row] for row in decoded]


@pytest.mark.parametrize(
    ("kind", "position", "window"),
    [
        *((kind, "segment", None) for kind in ("plain", "llama", "gpt2", "qwen3", "gemma3_text", "bloom")),
        *((kind, *how) for kind in ("plain", "llama") for how in ((None, None), ("rotary", 3))),
    ],
)
def test_cached_batched_decoding_equals_uncached_row_by_row(
    kind: str, position: str | None, window: int | None
) -> None:
    model = towers(kind, position, window)
    for name in ("text", "speech"):
        decoded = model.generate(SOURCES, output=[name], max_new_tokens=7, do_sample=False)
        by_hand = [[greedy_by_hand(model, example, name, 7)] for example in SOURCES]
        assert lists(decoded) == by_hand
    assert len({str(row) for row in by_hand}) > 1


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_several_outputs_follow_each_other(kind: str) -> None:
    model = towers(kind)
    decoded = model.generate(SOURCES, output=["text", "speech"], max_new_tokens=5)
    for example, (text, speech) in zip(SOURCES, decoded, strict=True):
        assert (text.tower, speech.tower) == ("text", "speech")
        assert text.tokens.tolist() == greedy_by_hand(model, example, "text", 5)
        assert speech.tokens.tolist() == greedy_by_hand(model, [*example, text], "speech", 5)


def test_segments_stop_at_their_own_end_token() -> None:
    model = towers("llama")
    ends = {greedy_by_hand(model, example, "text", 7)[1] for example in SOURCES}
    model.unimodal("text").generation_config.eos_token_id = sorted(ends)
    for (decoded,) in model.generate(SOURCES, output=["text"], max_new_tokens=7):
        assert len(decoded.tokens) == 2


def test_decoding_from_nothing() -> None:
    model = towers("llama")
    (row,) = model.generate([[]], output=["text"], max_new_tokens=3)
    assert row[0].tokens.tolist() == greedy_by_hand(model, [], "text", 3)


def test_generate_restores_the_mode() -> None:
    model = towers("llama").train()
    model.generate([SOURCES[0]], output=["text"], max_new_tokens=1)
    assert model.training
    assert not model.tower("text").training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": []}, "list of towers"),
        ({"output": "text"}, "list of towers"),
        ({"output": ["music"]}, "no tower 'music'; the towers are speech, text"),
        ({"examples": []}, "no examples"),
        ({"examples": [[segment("music", 3)]]}, "no tower 'music'"),
        ({"examples": [[segment("text", 3, target=True)]]}, "example 0 contains a target"),
        ({"attention_mask": 1}, "comes from the examples"),
        ({"return_dict_in_generate": True}, "not supported"),
        ({"output": ["text", "speech"], "num_return_sequences": 2, "do_sample": True}, "single output"),
        ({"examples": [[mt.Segment("text", [1, 99])]]}, "vocabulary of 20"),
    ],
)
def test_bad_calls_teach(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair().generate(**{"examples": SOURCES, "output": ["text"], **arguments})


def test_a_tower_without_a_begin_token_says_what_to_set() -> None:
    text = causal_lm("llama")
    text.generation_config.bos_token_id = text.config.bos_token_id = None
    with pytest.raises(ValueError, match="tower 'text' has no begin token"):
        pair(text).generate(SOURCES, output=["text"])


def test_only_the_tower_that_got_new_tokens_runs_again() -> None:
    model = towers("llama")
    ran = {"speech": 0, "text": 0}
    for name in ran:
        first = model.unimodal(name).model.layers[0]
        first.register_forward_hook(
            lambda module, args, output, name=name: ran.update({name: ran[name] + output.shape[1]})
        )
    given = [[segment("speech", 5, 6, 7, 8)]]
    once = model.generate(given, output=["text"], max_new_tokens=4, eos_token_id=None)
    speech = ran["speech"]
    assert speech == 6
    again = model.generate(given, output=["text", "text"], max_new_tokens=4, eos_token_id=None)
    assert ran["speech"] == 2 * speech
    assert torch.equal(once[0][0].tokens, again[0][0].tokens)


def spoiled(tower: str, when: Callable[[int, torch.Tensor | None], bool]) -> torch.nn.Module:
    """Return a model whose logits are wrong for some cache lengths and masks."""
    model = causal_lm(tower)
    native = type(model).forward

    def forward(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        output = native(self, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None and when(cache.get_seq_length(), kwargs.get("attention_mask")):
            output.logits[..., 3] += 9
        return output

    forward.__signature__ = inspect.signature(native)
    model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})
    return model


def test_a_family_that_cannot_begin_from_one_token_decodes_without_its_cache() -> None:
    model = pair(spoiled("llama", lambda length, mask: length < 4), gates=True)
    with pytest.warns(UserWarning, match="decodes without its cache"):
        (row,) = model.generate([[]], output=["text"], max_new_tokens=5)
    assert row[0].tokens.tolist() == greedy_by_hand(model, [], "text", 5)


def test_a_family_that_mistakes_a_lone_token_after_padding_decodes_by_length() -> None:
    def lone(length: int, mask: torch.Tensor | None) -> bool:
        return mask is not None and bool((mask == 0).any()) and int(mask.sum(1).min()) < 4

    text = spoiled("llama", lone)
    model = pair(text, gates=True)
    assert model.tower("text").decodes_cached
    assert not model.tower("text").pads_left
    decoded = model.generate(SOURCES, output=["text"], max_new_tokens=5)
    assert lists(decoded) == [[greedy_by_hand(model, example, "text", 5)] for example in SOURCES]


@pytest.mark.parametrize("compiled_by", ["generate", "the user"])
def test_a_model_that_was_compiled_for_itself_still_decodes_with_its_links(compiled_by: str) -> None:
    from transformers import CompileConfig

    torch._dynamo.reset()
    model = towers("llama")
    native, options = model.unimodal("text"), {"max_new_tokens": 6, "cache_implementation": "static"}
    expected = lists(model.generate([SOURCES[0]], ["text"], **options))
    if compiled_by == "the user":
        native.forward = torch.compile(native.forward, backend="eager")
    else:
        options["compile_config"] = CompileConfig(backend="eager", mode=None)
        options["compile_config"]._compile_all_devices = True
    alone = native.generate(torch.tensor([[BEGIN]]), attention_mask=torch.tensor([[1]]), **options)
    assert lists(model.generate([SOURCES[0]], ["text"], **options)) == expected != [alone.tolist()]
