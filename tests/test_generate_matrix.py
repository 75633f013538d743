"""What the options of transformers' generate do in a fused model, against the same tower decoding alone."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import multitower as mt
from families import tiny
from models import causal_lm, pair, segment
from multitower.testing import open_gates, tiny_tower

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
    """A decoder whose weights are large enough for it to say something else at every step."""
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
    return open_gates(model, seed=7, scale=3.0) if gates else model


def prompt(example: list[mt.Segment]) -> list[int]:
    return [token for each in example if each.tower == "text" for token in each.tokens] + [0]


def decode(model: mt.FusedModel, examples: list[list[mt.Segment]], **options: object) -> list[list[int]]:
    torch.manual_seed(11)
    return [row[0].tokens.tolist() for row in model.generate(examples, output=["text"], **options)]


def decode_alone(
    model: nn.Module, examples: list[list[mt.Segment]], *, ends: tuple[int, ...] = (1,), **options: object
) -> list[list[int]]:
    """Decode prompts of one length by the tower itself, each from its begin to its end token."""
    torch.manual_seed(11)
    prompts = torch.tensor([prompt(example) for example in examples])
    mask = torch.ones_like(prompts)
    sequences = model.generate(prompts, attention_mask=mask, **{"pad_token_id": 1, **options})
    return [cut(sequence[prompts.shape[1] - 1 :].tolist(), ends) for sequence in sequences]


def cut(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    place = next((place for place, token in enumerate(tokens) if place and token in ends), len(tokens))
    return tokens[: place + 1]


def greedy(
    model: mt.FusedModel,
    example: list[mt.Segment],
    change: Callable[[Tensor, Tensor], Tensor] = lambda tokens, scores: scores,
    ends: tuple[int, ...] = (1,),
) -> list[int]:
    """Decode without a cache, padding or generate."""
    before, tokens = prompt(example)[:-1], [0]
    for _ in range(STEPS):
        logits = model(**mt.collate([[*example, mt.Segment("text", tokens)]])).logits["text"][:, -1]
        tokens.append(int(change(torch.tensor([before + tokens]), logits.detach().clone()).argmax()))
        if tokens[-1] in ends:
            break
    return tokens


def skip_unless_offered(family: str, options: dict) -> None:
    """Skip what this version of transformers does wrong; the one in constraints.txt does nothing wrong."""
    model = text_model(family)
    for example in GIVEN:
        right = decode_alone(model, [example], max_new_tokens=STEPS, use_cache=False)
        try:
            found = decode_alone(model, [example], max_new_tokens=STEPS, **options)
        except Exception as error:
            pytest.skip(f"transformers {transformers.__version__}: {error}")
        if found != right:
            pytest.skip(f"transformers {transformers.__version__} decodes {family} otherwise with {options}")


class Halve(transformers.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.where(torch.arange(scores.shape[-1]) % 2 == input_ids[:, -1:] % 2, scores / 2, scores)


class Stop(transformers.StoppingCriteria):
    """Stops a row that has an even token in the second place or later after its prompt."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **unused: object) -> Tensor:
        return (input_ids[:, -1] % 2 == 0) & (input_ids[:, -2] != 0)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


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
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [1, 16, 18]},
    "min_length": {"min_length": 8, "eos_token_id": [1, 16, 18]},
    "forced_bos_token_id": {"forced_bos_token_id": 6},
    "forced_eos_token_id": {"forced_eos_token_id": 3},
    "suppress_tokens": {"suppress_tokens": [16, 18, 8]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [16, 18, 8]},
    "bad_words_ids": {"bad_words_ids": [[16], [18, 16], [0, 8]]},
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
            do_sample=True, temperature=30.0, top_k=7, max_new_tokens=5, eos_token_id=[1, 16]
        ),
        "max_new_tokens": 5,
    },
}
EVERYWHERE = ("nothing", "use_cache", "several beams", "repetition_penalty", "other ends", "temperature")


CASES = [
    (family, name)
    for family, name in itertools.product(FAMILIES, [*GREEDY, *SAMPLED])
    if family == "llama" or name in EVERYWHERE
]


def _ends(options: dict) -> tuple[int, ...]:
    ends = options.get("eos_token_id", getattr(options.get("generation_config"), "eos_token_id", None) or 1)
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
    """Were this not so, the comparison above would say nothing about the option."""
    same = ("use_cache", "max_time", "renormalize_logits", "no end")
    model = text_model("llama")
    options = {"max_new_tokens": STEPS, **GREEDY[name]}
    plain = {"max_new_tokens": STEPS, "eos_token_id": options.get("eos_token_id", 1) if "min" in name else 1}
    found = [decode_alone(model, [example], ends=_ends(options), **options) for example in GIVEN]
    without = [decode_alone(model, [example], ends=_ends(plain), **plain) for example in GIVEN]
    assert (found == without) == (name in same)


OTHERS = [token for token in range(20) if token not in (0, 4)]
SEE_PADDING = [
    {"bad_words_ids": [[0, 0, 18]]},
    {"sequence_bias": {(0, 0, 18): -900.0}},
    {"no_repeat_ngram_size": 2, "suppress_tokens": OTHERS},
    {"encoder_no_repeat_ngram_size": 2, "suppress_tokens": OTHERS},
    {"watermarking_config": transformers.WatermarkingConfig(bias=300.0, context_width=2)},
    {"forced_bos_token_id": 6},
    {"min_length": 8, "eos_token_id": [1, 16, 18]},
    {"max_length": 12, "max_new_tokens": None},
]


@pytest.mark.parametrize("options", SEE_PADDING)
def test_padding_is_no_part_of_a_row(options: dict) -> None:
    options = {"max_new_tokens": STEPS, **options}
    text, ends, length = text_model("llama"), _ends(options), len(prompt(GIVEN[3]))
    alone = [tokens for example in GIVEN for tokens in decode_alone(text, [example], ends=ends, **options)]
    prompts = torch.tensor([[0] * (length - len(prompt(each))) + prompt(each) for each in GIVEN])
    mask = torch.tensor([[0] * (length - len(prompt(each))) + [1] * len(prompt(each)) for each in GIVEN])
    padded = text.generate(prompts, attention_mask=mask, pad_token_id=1, **options)
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


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family, name in itertools.product(FAMILIES, SAME_AS_GREEDY)
        if family != "mamba" or "prefill_chunk_size" not in SAME_AS_GREEDY[name]
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
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text"])
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
            {"bad_words_ids": [[0, 0, 18], [0, 16], [18]]},
            transformers.NoBadWordsLogitsProcessor([[0, 0, 18], [0, 16], [18]], torch.tensor([1])),
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
    tokens = [0]
    torch.manual_seed(11)
    for _ in range(STEPS):
        logits = model(**mt.collate([[*GIVEN[1], mt.Segment("text", tokens)]])).logits["text"][0, -1]
        best, ids = (logits / 30).topk(6)
        chosen = torch.full_like(logits, -math.inf).scatter(0, ids, best).softmax(-1)
        tokens.append(int(chosen.multinomial(1)))
        if tokens[-1] == 1:
            break
    options = {"do_sample": True, "temperature": 30.0, "top_k": 6, "max_new_tokens": STEPS}
    assert decode(model, [GIVEN[1]], **options) == [tokens]


@pytest.mark.parametrize("tower", ["plain", "llama"])
@pytest.mark.parametrize("copies", [1, 4])
def test_wide_beams_find_the_best_of_all_sequences(tower: str, copies: int) -> None:
    size, steps = 6, 3
    plain = tiny_tower(3, vocab_size=size)
    text = plain if tower == "plain" else causal_lm(tower, vocab_size=size, seed=5)
    model = open_gates(pair(text), seed=7, scale=3.0)
    examples = [[segment("speech", 5, 6, 7, 8)], [segment("text", 4, 5, 2), segment("speech", 9, 3)]]
    options = {"max_new_tokens": steps, "eos_token_id": None, "num_beams": size**2}
    found = decode(model, examples, **options, num_return_sequences=copies)
    for number, example in enumerate(examples):
        every = [[0, *tokens] for tokens in itertools.product(range(size), repeat=steps)]
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("ends", [(1,), (), (0, 1)])
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
        stops = (k for k, token in enumerate(tokens) if k > 1 and token % 2 == 0 and tokens[k - 1])
        expected.append(tokens[: next(stops, STEPS) + 1])
    assert len({len(tokens) for tokens in expected}) > 1
    assert decode(model, GIVEN, **options) == expected


LETTERS = "abcdefghijklmnopqrst"


def letter_tokenizer() -> transformers.PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate(LETTERS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings_end_each_row() -> None:
    model = fused("llama", gates=True)
    by_hand = ["".join(LETTERS[token] for token in greedy(model, example)) for example in GIVEN]
    stop = by_hand[0][3:5]
    options = {"stop_strings": [stop], "tokenizer": letter_tokenizer(), "max_new_tokens": STEPS}
    found = ["".join(LETTERS[token] for token in tokens) for tokens in decode(model, GIVEN, **options)]
    assert found == [text[: text.index(stop) + 2] if stop in text else text for text in by_hand]
    assert len(found[0]) == 5 < max(map(len, found))


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


def test_a_tower_that_decodes_without_a_cache_keeps_its_settings() -> None:
    text = copy.deepcopy(text_model("llama"))
    text.generation_config.update(repetition_penalty=1.8, max_new_tokens=4)
    model = pair(text)
    expected = decode(model, GIVEN)
    model.tower("text").__dict__["_unfaithful"] = "for a test"
    with pytest.warns(UserWarning, match="for a test"):
        assert decode(model, GIVEN) == expected


def test_a_generation_config_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multitower.generate.MAX_NEW_TOKENS", 30)
    config = transformers.GenerationConfig(num_beams=2)
    before = config.to_dict()
    model = fused("llama", gates=True)
    given = decode(model, GIVEN, generation_config=config)
    assert config.to_dict() == before
    assert given == decode(model, GIVEN, num_beams=2)
    assert max(map(len, given)) == 31  # where transformers' own limit is 20 with the prompt


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
    assert [len(tokens) for tokens in found] == [3, 3]
    assert len(decode(model, [[]], eos_token_id=None)[0]) == 6


@pytest.mark.filterwarnings("ignore:XLNetLMHeadModel decodes without its cache")
def test_a_family_that_says_it_has_no_last_position_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multitower.generate.MAX_NEW_TOKENS", 5)
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
