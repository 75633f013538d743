from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import multitower as mt
from models import causal_lm, pair, segment
from multitower import plugins
from plugin import LETTERS, Offer

STEPS = {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 5.0}


class Letters(mt.Modality):
    name, accepts, vocab_size = "letters", (str,), 14

    def __init__(self, begin: int = 0, end: int = 1) -> None:
        self.begin, self.end = begin, end

    def encode(self, raw: str) -> Tensor:
        if not raw:
            raise ValueError("there is no letter")
        return torch.tensor([self.begin, *(ord(letter) - ord("a") + 2 for letter in raw), self.end])

    def decode(self, tokens: Tensor) -> str:
        edges = (self.begin, self.end)
        return "".join(chr(ord("a") + token - 2) for token in tokens.tolist() if token not in edges)


class Tune(Letters):
    name, accepts = "tune", (list, tuple)

    def encode(self, raw: list[int]) -> Tensor:
        return torch.tensor([self.begin, *raw, self.end])

    def decode(self, tokens: Tensor) -> list[int]:
        return [token for token in tokens.tolist() if token not in (self.begin, self.end)]


@pytest.fixture
def pipe() -> mt.Pipeline:
    return mt.Pipeline(pair(gates=True), {"speech": Tune(), "text": Letters()})


def decoded(pipe: mt.Pipeline, example: list, output: Any, **options: Any) -> Any:
    (row,) = pipe.model.generate([example], output, **STEPS, **options)
    return row


def test_raw_in_raw_out(pipe: mt.Pipeline) -> None:
    example = [segment("speech", 5, 6, 7), segment("text", 4, 5)]
    (expected,) = decoded(pipe, example, ["text"])
    given = [("speech", [5, 6, 7]), ("text", "cd")]
    assert len(Letters().decode(expected.tokens)) > 2
    assert pipe(given, output="text", **STEPS) == Letters().decode(expected.tokens)
    assert pipe([example[0], given[1]], output="text", **STEPS) == Letters().decode(expected.tokens)


def test_the_result_has_the_form_of_the_output(pipe: mt.Pipeline) -> None:
    given, example = [("speech", [5, 6])], [segment("speech", 5, 6)]
    text, speech = decoded(pipe, example, ["text", "speech"])
    letters, tune = Letters().decode(text.tokens), Tune().decode(speech.tokens)
    assert pipe(given, output=["text"], **STEPS) == [letters]
    assert pipe(given, output=["text", "speech"], **STEPS) == [letters, tune]
    ((text, speech),) = decoded(pipe, example, [("text", "speech")])
    together = (Letters().decode(text.tokens), Tune().decode(speech.tokens))
    assert pipe(given, output=("text", "speech"), **STEPS) == together
    assert pipe(given, output=[("text", "speech")], **STEPS) == [together]


def test_a_function_chooses_and_gets_what_can_be_appended(pipe: mt.Pipeline) -> None:
    def policy(row: mt.stream.Example) -> Any:
        return {1: "text", 2: ("text", "speech")}.get(len(row))

    given = [("speech", [5, 6])]
    first, (one, other) = pipe(given, policy, **STEPS)
    assert first == ("text", pipe(given, "text", **STEPS))
    assert [one[0], other[0]] == ["text", "speech"]
    assert pipe([*given, first], ("text", "speech"), **STEPS) == (one[1], other[1])


def test_a_batch_is_its_examples(pipe: mt.Pipeline) -> None:
    examples = [
        [("speech", [5, 6])],
        [("text", "abc"), ("speech", [9])],
        [(("text", "d"), ("speech", [3, 4, 5])), ("text", "e")],
        [],
    ]
    for output in ("text", ["speech", "text"]):
        alone = [pipe([example], output, **STEPS)[0] for example in examples]
        assert pipe(examples, output, **STEPS) == alone
    assert pipe(examples[0], "text", **STEPS) == pipe(examples, "text", **STEPS)[0]


def test_pairs_in_a_tuple_begin_at_the_same_time(pipe: mt.Pipeline) -> None:
    together = [(segment("text", 2, 3), segment("speech", 3, 4))]
    (expected,) = decoded(pipe, together, ["speech"])
    found = pipe([(("text", "ab"), ("speech", [3, 4]))], "speech", **STEPS)
    assert found == Tune().decode(expected.tokens)
    assert pipe([(("text", "ab"), together[0][1])], "speech", **STEPS) == found
    assert pipe([("text", "ab"), ("speech", [3, 4])], "speech", **STEPS) != found


def test_raw_data_may_be_a_tuple(pipe: mt.Pipeline) -> None:
    assert pipe([("speech", (5, 6))], "text", **STEPS) == pipe([("speech", [5, 6])], "text", **STEPS)


def test_several_returned_sequences_are_lists(pipe: mt.Pipeline) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4}
    examples = [[("speech", [5, 6])], [("speech", [9])]]
    several = pipe(examples, "text", **beams)
    assert [len(found) for found in several] == [3, 3]
    assert all(isinstance(text, str) for found in several for text in found)
    assert pipe(examples[1], "text", **beams) == several[1]
    assert pipe(examples[1], ["text"], **beams) == [[text] for text in several[1]]


@pytest.mark.parametrize(
    ("given", "output", "error", "reason"),
    [
        ([("smell", "x")], "text", ValueError, "example 0, entry 0: there is no tower 'smell'"),
        ([("speech", [5])], "smell", ValueError, "output: there is no tower 'smell'; the towers are speech"),
        (
            [[("text", "a")], [("speech", "x")]],
            "text",
            TypeError,
            "1, entry 0: tower 'speech' takes list or tuple",
        ),
        ([("text", "a"), (("text", 3),)], "text", TypeError, "0, entry 1: tower 'text' takes str, not int"),
        ("words", "text", TypeError, "example 0 is a str: give a list"),
        ([[("text", "a")], "words"], "text", TypeError, "example 1 is a str"),
        (["words"], "text", TypeError, "example 0, entry 0 holds a str: give a pair"),
        ([("text", "a", "b")], "text", TypeError, "example 0, entry 0 holds a str: give a pair"),
        ([], "text", ValueError, r"\[\[\]\] is one that is empty"),
        ([segment("text", 3, target=True)], "text", ValueError, "target"),
        ([("text", "a")], [], ValueError, "output must be a list of towers"),
        ([("text", "a")], [["text"]], ValueError, "there is no tower"),
    ],
)
def test_what_cannot_be_is_named(
    pipe: mt.Pipeline, given: Any, output: Any, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        pipe(given, output)


def test_a_tower_without_a_modality_takes_tokens_only() -> None:
    pipe = mt.Pipeline(pair(gates=True), {"text": Letters()})
    assert pipe([segment("speech", 5)], "text", **STEPS)
    with pytest.raises(ValueError, match=r"example 0, entry 0: tower 'speech' has no modality.* text"):
        pipe([("speech", [5])], "text")
    with pytest.raises(ValueError, match=r"output: tower 'speech' has no modality"):
        pipe([("text", "a")], "speech")


def test_what_a_modality_raises_says_where(pipe: mt.Pipeline) -> None:
    with pytest.raises(ValueError, match="no letter") as caught:
        pipe([("speech", [5]), ("text", "")], "text")
    assert caught.value.__notes__ == ["raised for tower 'text' in example 0, entry 1"]


def test_modalities_must_fit_their_towers() -> None:
    model = pair()
    with pytest.raises(ValueError, match="there is no tower 'smell'; the towers are speech, text"):
        mt.Pipeline(model, {"smell": Letters()})
    with pytest.raises(TypeError, match=r"tower 'text': expected a multitower.Modality, not str"):
        mt.Pipeline(model, {"text": "letters"})
    big = Letters()
    big.vocab_size = 15
    mt.Pipeline(model, {"text": big})
    with pytest.raises(
        ValueError, match="'speech' has a vocabulary of 14, but its modality 'letters' one of 15"
    ):
        mt.Pipeline(model, {"speech": big})


@pytest.fixture
def other_edges() -> mt.Pipeline:
    """Modalities that begin and end with other tokens than their towers; of speech only the end differs."""
    return mt.Pipeline(pair(gates=True), {"text": Letters(begin=12, end=13), "speech": Tune(begin=0, end=11)})


def test_segments_begin_and_end_as_their_modalities_say(other_edges: mt.Pipeline) -> None:
    pipe = other_edges
    given, edges = [("speech", [5, 6])], {"bos_token_id": 12, "eos_token_id": 13}
    example = [mt.Segment("speech", [0, 5, 6, 11])]
    (text,) = decoded(pipe, example, ["text"], **edges)
    assert text.tokens[0] == 12
    letters = Letters(12, 13).decode(text.tokens)
    assert pipe(given, "text", **STEPS) == letters
    (speech,) = decoded(pipe, [*example, text], ["speech"], eos_token_id=11)
    assert pipe(given, ["text", "speech"], **STEPS) == [letters, Tune(0, 11).decode(speech.tokens)]
    both = decoded(
        pipe,
        example,
        [("text", "speech")],
        bos_token_id={"text": 12},
        eos_token_id={"text": 13, "speech": 11},
    )
    ((text, speech),) = both
    together = (Letters(12, 13).decode(text.tokens), Tune(0, 11).decode(speech.tokens))
    assert pipe(given, ("text", "speech"), **STEPS) == together


def test_a_segment_ends_at_the_end_of_its_modality(other_edges: mt.Pipeline) -> None:
    always = {"sequence_bias": {(13,): 1e4}, "max_new_tokens": 6}
    assert other_edges([("speech", [5])], "text", **always) == ""
    never = {"sequence_bias": {(1,): 1e4}, "max_new_tokens": 6}
    assert len(other_edges([("speech", [5])], "text", **never)) == 6


def test_the_callers_edges_win(other_edges: mt.Pipeline) -> None:
    pipe, given, example = other_edges, [("speech", [5, 6])], [mt.Segment("speech", [0, 5, 6, 11])]
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


class Pieces(Letters):
    """Bytes that make spaces, lines, wide characters and broken ones; a leading space is dropped."""

    name, vocab_size = "pieces", 10
    TABLE = (b"", b"", b"a", b" ", b"\n", b"\xc3", b"\xa9", "你".encode(), b"\xe4\xbd", b" b")

    def decode(self, tokens: Tensor) -> str:
        raw = b"".join(self.TABLE[token] for token in tokens.tolist() if token < 10)
        return raw.decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_the_pieces_of_a_stream_are_the_text(kind: str) -> None:
    model = pair(gates=True) if kind == "plain" else pair(causal_lm("llama"), gates=True)
    pipe, given, several = mt.Pipeline(model, {"text": Pieces()}), [segment("speech", 5, 6)], 0
    likely = {(token,): 3.0 for token in range(2, 10)}
    options = {"do_sample": True, "max_new_tokens": 24, "sequence_bias": likely}
    for seed in range(12):
        torch.manual_seed(seed)
        whole = pipe(given, "text", **options)
        torch.manual_seed(seed)
        pieces = list(pipe.stream(given, "text", **options))
        assert "".join(pieces) == whole
        assert all(pieces)
        several += len(pieces) > 2
    assert several > 6


class Words(Letters):
    name = "words"

    def decode(self, tokens: Tensor) -> str:
        return "".join(f"w{token} " for token in tokens.tolist() if token > 1)


class Count(transformers.StoppingCriteria):
    def __init__(self, fail_at: int | None = None) -> None:
        self.steps, self.fail_at = 0, fail_at

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("out of memory")
        return torch.zeros(len(input_ids), dtype=torch.bool)


ENDLESS = {"do_sample": True, "eos_token_id": None, "max_new_tokens": 3000}


def test_a_stream_that_is_left_stops_decoding() -> None:
    pipe, count = mt.Pipeline(pair(gates=True), {"text": Words()}), Count()
    threads = threading.active_count()
    pieces = pipe.stream([segment("speech", 5)], "text", stopping_criteria=[count], **ENDLESS)
    assert next(pieces).startswith("w")
    pieces.close()
    steps = count.steps
    assert 1 <= steps < 3000
    assert threading.active_count() == threads
    assert not pipe.model.training
    assert count.steps == steps


def test_what_fails_in_the_thread_is_raised_where_the_text_is_read() -> None:
    pipe = mt.Pipeline(pair(gates=True), {"text": Words()})
    pieces = pipe.stream([segment("speech", 5)], "text", stopping_criteria=[Count(fail_at=9)], **ENDLESS)
    found = []
    with pytest.raises(RuntimeError, match="out of memory"):
        found.extend(pieces)
    assert found
    with pytest.raises(ValueError, match="num_beamz"):
        list(pipe.stream([segment("speech", 5)], "text", num_beamz=2))


def test_a_stream_of_other_edges(other_edges: mt.Pipeline) -> None:
    given = [("speech", [5, 6])]
    assert "".join(other_edges.stream(given, "text", **STEPS)) == other_edges(given, "text", **STEPS)


@pytest.mark.parametrize(
    ("output", "options", "error", "reason"),
    [
        ("speech", {}, ValueError, "tower 'speech' gives list, not text"),
        (["text"], {}, TypeError, "give its name as output"),
        ("smell", {}, ValueError, "there is no tower 'smell'"),
        ("text", {"streamer": object()}, ValueError, "stream has a streamer of its own"),
    ],
)
def test_a_stream_that_cannot_be_is_refused_at_once(
    pipe: mt.Pipeline, output: Any, options: dict, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        pipe.stream([("speech", [5])], output, **options)


@pytest.fixture
def model(tmp_path: Path) -> mt.FusedModel:
    return pair(causal_lm("llama"), causal_lm("gpt2", depth=4, vocab_size=14), gates=True)


@pytest.fixture
def letters(offer: Offer) -> type[mt.Modality]:
    offer("multitower-letters", "plugged_letters", LETTERS, version="2.1", letters="plugged_letters:Letters")
    return plugins.modality_class("letters")


def test_a_pipeline_is_saved_and_loaded(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path
) -> None:
    pipe = mt.Pipeline(model, {"text": letters("c"), "speech": letters()})
    pipe.save_pretrained(tmp_path / "fused")
    record = {"modality": "letters", "package": "multitower-letters", "version": "2.1"}
    document = json.loads((tmp_path / "fused/fusion.json").read_text())
    assert document["modalities"] == {"text": record, "speech": record}
    again = mt.Pipeline.from_pretrained(tmp_path / "fused")
    assert again.modalities["text"].first == "c"
    given = [("speech", "abc"), ("text", "cde")]
    assert again(given, ["text", "speech"], **STEPS) == pipe(given, ["text", "speech"], **STEPS)


def test_a_missing_plugin_is_named_and_the_model_loads_without(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "fused"
    model.save_pretrained(folder, modalities={"speech": letters()})
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    monkeypatch.setattr(plugins, "version", _not_installed)
    reason = (
        r"tower 'speech': modality 'letters' is not installed: pip install multitower-letters.*\{'speech'"
    )
    with pytest.raises(mt.PluginError, match=reason):
        mt.Pipeline.from_pretrained(folder)
    assert mt.FusedModel.from_pretrained(folder).graph == model.graph
    pipe = mt.Pipeline.from_pretrained(folder, modalities={"speech": Tune(), "text": Letters()})
    assert pipe([("speech", [5])], "text", **STEPS)


def _not_installed(package: str) -> str:
    raise plugins.PackageNotFoundError(package)


def test_a_modality_of_no_package_is_given_again(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused", modalities={"text": Letters()})
    with pytest.raises(mt.PluginError, match=r"tower 'text': no installed package offers .*'letters'.*give"):
        mt.Pipeline.from_pretrained(tmp_path / "fused")
    own = Letters.from_pretrained(tmp_path / "fused/modalities/text")
    assert mt.Pipeline.from_pretrained(tmp_path / "fused", modalities={"text": own}).modalities["text"] is own


@pytest.mark.parametrize("modalities", [{"smell": Letters()}, {"text": "letters"}])
def test_unfit_modalities_are_refused_before_anything_is_written(
    model: mt.FusedModel, tmp_path: Path, modalities: Any
) -> None:
    with pytest.raises((ValueError, TypeError), match="tower"):
        model.save_pretrained(tmp_path / "fused", modalities=modalities)
    assert list(tmp_path.iterdir()) == []


def test_saving_again_keeps_the_modalities_of_towers_that_are_still_there(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path
) -> None:
    folder = tmp_path / "fused"
    model.save_pretrained(folder, modalities={"speech": letters("b"), "text": letters("c")})
    (folder / "modalities/README.md").write_text("mine")
    (folder / "modalities/speech/old").write_text("of the old one")
    model.save_pretrained(folder, modalities={"speech": letters("d")})
    pipe = mt.Pipeline.from_pretrained(folder)
    assert {name: modality.first for name, modality in pipe.modalities.items()} == {
        "speech": "d",
        "text": "c",
    }
    assert not (folder / "modalities/speech/old").exists()
    model.drop("speech").save_pretrained(folder)
    assert list(mt.Pipeline.from_pretrained(folder).modalities) == ["text"]
    assert sorted(path.name for path in (folder / "modalities").iterdir()) == ["README.md", "text"]


@pytest.mark.parametrize(
    "damage",
    [
        [],
        {"text": "letters"},
        {"text": {"modality": "letters"}},
        {"text": {"modality": None, "package": None, "version": None}},
        {"text": {"modality": "letters", "package": 3, "version": None}},
        {"../text": {"modality": "letters", "package": None, "version": None}},
    ],
)
def test_damaged_records_are_named(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path, damage: Any
) -> None:
    model.save_pretrained(tmp_path / "fused", modalities={"text": letters()})
    file = tmp_path / "fused/fusion.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modalities": damage}))
    with pytest.raises(mt.CheckpointError, match=r"fusion\.json is damaged"):
        mt.Pipeline.from_pretrained(tmp_path / "fused")


def test_a_missing_modality_folder_is_named(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "fused", modalities={"text": letters()})
    shutil.rmtree(tmp_path / "fused/modalities/text")
    with pytest.raises(mt.CheckpointError, match=r"modalities/text/modality\.json is missing"):
        mt.Pipeline.from_pretrained(tmp_path / "fused")


def test_a_checkpoint_without_modalities_makes_a_pipeline_of_tokens(
    model: mt.FusedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "fused")
    file = tmp_path / "fused/fusion.json"
    document = json.loads(file.read_text())
    assert document.pop("modalities") == {}
    file.write_text(json.dumps(document))
    assert mt.Pipeline.from_pretrained(tmp_path / "fused").modalities == {}
