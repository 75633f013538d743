from __future__ import annotations

import pytest
import torch
import transformers

import multitower as mt
from letters import STEPS, Letters, Tune, decoded, pipe_of_other_edges
from models import causal_lm, pair, segment
from multitower.generate.options import options_of


@pytest.fixture
def other_edges() -> mt.Pipeline:
    return pipe_of_other_edges()


def test_segments_begin_and_end_as_their_modalities_say(other_edges: mt.Pipeline) -> None:
    pipe = other_edges
    given, edges = [("speech", [5, 6])], {"bos_token_id": 12, "eos_token_id": 13}
    example = [mt.Segment("speech", [1, 5, 6, 11])]
    (text,) = decoded(pipe, example, ["text"], **edges)
    assert text.tokens[0] == 12
    letters = Letters(12, 13).decode(text.tokens)
    assert pipe(given, "text", **STEPS) == letters
    (speech,) = decoded(pipe, [*example, text], ["speech"], eos_token_id=11)
    assert pipe(given, ["text", "speech"], **STEPS) == [letters, Tune(1, 11).decode(speech.tokens)]
    both = decoded(
        pipe,
        example,
        [("text", "speech")],
        bos_token_id={"text": 12},
        eos_token_id={"text": 13, "speech": 11},
    )
    ((text, speech),) = both
    together = (Letters(12, 13).decode(text.tokens), Tune(1, 11).decode(speech.tokens))
    assert pipe(given, ("text", "speech"), **STEPS) == together


def test_a_segment_ends_at_the_end_of_its_modality(other_edges: mt.Pipeline) -> None:
    always = {"sequence_bias": {(13,): 1e4}, "max_new_tokens": 6}
    assert other_edges([("speech", [5])], "text", **always) == ""
    never = {"sequence_bias": {(2,): 1e4}, "max_new_tokens": 6}
    assert len(other_edges([("speech", [5])], "text", **never)) == 6


def test_the_callers_edges_win(other_edges: mt.Pipeline) -> None:
    pipe, given, example = other_edges, [("speech", [5, 6])], [mt.Segment("speech", [1, 5, 6, 11])]
    (text,) = decoded(pipe, example, ["text"], bos_token_id=7, eos_token_id=9)
    expected = Letters(12, 13).decode(text.tokens)
    assert pipe(given, "text", bos_token_id=7, eos_token_id=9, **STEPS) == expected
    assert pipe(given, "text", bos_token_id={"text": 7}, eos_token_id={"text": 9}, **STEPS) == expected
    config = transformers.GenerationConfig(bos_token_id=7, eos_token_id=9, **STEPS)
    assert pipe(given, "text", generation_config=config) == expected
    (text,) = decoded(pipe, example, ["text"], bos_token_id=12, eos_token_id=13)
    config = transformers.GenerationConfig(**STEPS)
    assert pipe(given, "text", generation_config=config) == Letters(12, 13).decode(text.tokens)
    assert config.bos_token_id is None
    with pytest.raises(ValueError, match=r"eos_token_id means tokens of one tower.*give each its own"):
        pipe(given, ["text", "speech"], eos_token_id=9)


def test_options_may_be_given_by_tower() -> None:
    model, example = pair(gates=True), [segment("speech", 5, 6)]
    limits = {"text": 2, "speech": 5}
    options = {"do_sample": False, "eos_token_id": {"text": None, "speech": None}}
    ((text, speech),) = model.generate([example], ["text", "speech"], max_new_tokens=limits, **options)
    assert (len(text.tokens), len(speech.tokens)) == (3, 6)
    with pytest.raises(ValueError, match=r"max_new_tokens=\{'txt': \.\.\.\}: there is no such tower"):
        model.generate([example], ["text"], max_new_tokens={"txt": 2})
    with pytest.raises(ValueError, match="share one limit; give a number"):
        model.generate([example], [("text", "speech")], max_new_tokens=limits)
    with pytest.raises(ValueError, match="output_scores is not supported"):
        model.generate([example], ["text"], output_scores={"text": True})


@pytest.mark.parametrize("output", [["text"], [("text", "speech")]])
def test_none_turns_off_what_a_tower_sets_for_itself(output: list) -> None:
    text = causal_lm("llama")
    model = pair(text, gates=True)
    none = {key: {"text": None} for key in ("eos_token_id", "suppress_tokens")}
    ((entry,),) = found = model.generate([[]], output, max_new_tokens=6, **none)
    plain, second = str(found), int((entry[0] if isinstance(entry, tuple) else entry).tokens[1])
    text.generation_config.update(eos_token_id=second, suppress_tokens=[second], max_new_tokens=6)
    assert str(model.generate([[]], output, max_new_tokens=6)) != plain
    assert str(model.generate([[]], output, max_new_tokens=6, **none)) == plain


def test_towers_decoded_together_end_each_by_its_own_token() -> None:
    model, example = pair(gates=True), [segment("speech", 5, 6)]
    ((text, speech),) = decoded(mt.Pipeline(model, {}), example, [("text", "speech")])
    ends = {"text": int(text.tokens[2]), "speech": int(speech.tokens[4])}
    ((one, other),) = decoded(mt.Pipeline(model, {}), example, [("text", "speech")], eos_token_id=ends)
    assert torch.equal(one.tokens, text.tokens[:3])
    assert torch.equal(other.tokens[:3], speech.tokens[:3])
    assert ends["speech"] not in other.tokens[1:-1]


def test_what_a_generation_config_sets_is_as_any_option_of_a_tower() -> None:
    config = transformers.GenerationConfig(num_beams=2, max_new_tokens=9)
    options = {"generation_config": config, "max_new_tokens": {"text": 4}, "streamer": {"text": "mine"}}
    assert options_of("text", options) == {"num_beams": 2, "max_new_tokens": 4, "streamer": "mine"}
    assert options_of("speech", options) == {"num_beams": 2, "max_new_tokens": 9}
    assert config.max_new_tokens == 9
