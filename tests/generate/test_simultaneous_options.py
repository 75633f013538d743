"""Compare options of generate for towers decoded at the same time with one decoded alone."""

from __future__ import annotations

import pytest
import torch

import multitower as mt
from decoding import EVEN, GIVEN, STEPS, Stop, decode, fused, text_model
from models import causal_lm, pair, segment
from test_generate_matrix import GREEDY, SAMPLED, Halve

ONE_BY_ONE = [name for name in GREEDY if "beams" not in name]
SET_BY_THE_TOWER = ("repetition_penalty", "min_new_tokens", "watermarking", "other ends")
QUICK = ("use_cache", "repetition_penalty", "no_repeat_ngram_size", "min_length", "forced_eos_token_id")
CASES = [
    *(pytest.param(name, False, marks=() if name in QUICK else pytest.mark.slow) for name in ONE_BY_ONE),
    *((name, True) for name in SET_BY_THE_TOWER),
]


def set_own(model: torch.nn.Module, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in options.items():
        monkeypatch.setattr(model.generation_config, key, value)


@pytest.mark.parametrize(("name", "own"), CASES)
def test_options_mean_the_same_token_by_token(name: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With closed gates, a tower decodes with others as alone, whether the call or the model sets options."""
    text, model = text_model("llama"), fused("llama", gates=False)
    options = {} if own else {key: {"text": value} for key, value in GREEDY[name].items()}
    if name == "watermarking" and not own:
        options = GREEDY[name]  # its value is a mapping, which cannot be by tower
    if own:
        set_own(text, GREEDY[name], monkeypatch)
    alone = decode(model, GIVEN, max_new_tokens=STEPS, **options)
    together = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=STEPS, **options)
    assert [text.tokens.tolist() for ((text, _),) in together] == alone


def test_a_batch_is_its_rows_where_tokens_that_were_there_are_penalised() -> None:
    """Some of transformers' penalties count padding as tokens of the row."""
    begin, text, speech = 3, causal_lm("llama"), causal_lm("llama", depth=4, vocab_size=14)
    text.generation_config.bos_token_id = speech.generation_config.bos_token_id = begin
    text.lm_head.weight.data[0] *= 9  # makes token 0 likely, which is not a begin token here
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


ONE_TOKEN = [
    name for name in SAMPLED if name not in ("num_return_sequences", "sampled beams", "prefix_allowed")
]


@pytest.mark.parametrize(
    ("family", "name"), [*(("llama", name) for name in ONE_TOKEN), ("mamba", "sampling"), ("mamba", "top_p")]
)
def test_a_tower_in_a_tuple_of_its_own_samples_as_it_does_alone(name: str, family: str) -> None:
    model, options = fused(family, gates=True), {"max_new_tokens": STEPS, **SAMPLED[name]}
    alone = decode(model, EVEN, **options)
    torch.manual_seed(11)
    together = model.generate(EVEN, output=[("text",)], **options)
    assert [text.tokens.tolist() for ((text,),) in together] == alone


def test_functions_of_the_caller_hold_at_the_same_time() -> None:
    model = fused("llama", gates=False)
    functions = {
        "logits_processor": [Halve()],
        "stopping_criteria": [Stop()],
        "prefix_allowed_tokens_fn": lambda row, tokens: [int(tokens[-1]) + 1, 7, 8, 16],
    }
    for key, function in functions.items():
        for example in GIVEN:
            alone = decode(model, [example], max_new_tokens=STEPS, **{key: function})
            options = {"max_new_tokens": STEPS, key: {"text": function}}
            ((together,),) = model.generate([example], [("text", "speech")], **options)
            assert [together[0].tokens.tolist()] == alone


NOT_BY_TOKEN = {
    "num_beams": (3, "beam_sample"),
    "stop_strings": (["a"], "stop_strings"),
    "dola_layers": ("low", "dola_generation"),
}


@pytest.mark.parametrize("key", NOT_BY_TOKEN)
def test_what_has_no_meaning_token_by_token_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model = text_model("llama"), fused("llama", gates=False)
    value, name = NOT_BY_TOKEN[key]
    set_own(text, {key: value, "do_sample": True}, monkeypatch)
    message = rf"{name}: towers .*or change it, in this call or in model.unimodal\('text'\).generation_config"
    with pytest.raises(ValueError, match=message):
        model.generate(GIVEN, output=[("text",)], max_new_tokens=STEPS)
    off = 1 if key.startswith("num") else None
    model.generate(GIVEN, output=[("text",)], max_new_tokens=1, **{key: off})


@pytest.mark.parametrize("key", ["streamer", "custom_generate", "num_beamz", "prefill_chunk_size"])
def test_what_no_step_looks_at_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: towers that are decoded at the same time"):
        fused("llama", gates=False).generate(GIVEN[:1], output=[("text",)], **{key: 1})


@pytest.mark.parametrize("own", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
def test_what_is_for_speed_alone_changes_nothing(own: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model = text_model("llama"), fused("llama", gates=True)
    expected = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=STEPS)
    set_own(text, own, monkeypatch)
    found = model.generate(GIVEN, output=[("text", "speech")], max_new_tokens=STEPS)
    tokens = [[[part.tokens.tolist() for part in entry] for (entry,) in each] for each in (found, expected)]
    assert tokens[0] == tokens[1]


def test_a_cache_of_another_kind_changes_nothing() -> None:
    model, given = fused("llama", gates=True), {"output": [("text", "speech")], "max_new_tokens": STEPS}
    static = model.generate(GIVEN, **given, cache_implementation="static")
    assert str(static) == str(model.generate(GIVEN, **given))
    with pytest.raises(ValueError, match="assisted_generation: towers that are decoded"):
        model.generate(GIVEN, **given, prompt_lookup_num_tokens=2)


def test_what_is_suppressed_at_the_beginning_comes_after_a_forced_first_token() -> None:
    model, given = fused("llama", gates=False), [[segment("speech", 5, 6)], []]
    options = {"forced_bos_token_id": {"text": 6}, "max_new_tokens": STEPS}
    after = {tokens[2] for tokens in decode(model, given, **options)}
    options["begin_suppress_tokens"] = {"text": sorted(after)}
    alone = decode(model, given, **options)
    together = model.generate(given, output=[("text", "speech")], **options)
    assert [text.tokens.tolist() for ((text, _),) in together] == alone
    assert not after & {tokens[2] for tokens in alone}
