from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import multitower as mt
from letters import STEPS, Letters, Tune, decoded, simple_pipe
from models import pair, segment


@pytest.fixture
def pipe() -> mt.Pipeline:
    return simple_pipe()


def test_raw_in_raw_out(pipe: mt.Pipeline) -> None:
    example = [segment("speech", 5, 6, 7), segment("text", 4, 5)]
    (expected,) = decoded(pipe, example, ["text"])
    given = [("speech", [5, 6, 7]), ("text", "bc")]
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
    def policy(row: mt.batch.Example) -> Any:
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
    together = [(segment("text", 3, 4), segment("speech", 8, 8, 8))]
    (expected,) = decoded(pipe, together, ["speech"])
    found = pipe([(("text", "ab"), ("speech", [8, 8, 8]))], "speech", **STEPS)
    assert found == Tune().decode(expected.tokens)
    assert pipe([(("text", "ab"), together[0][1])], "speech", **STEPS) == found
    assert pipe([("text", "ab"), ("speech", [8, 8, 8])], "speech", **STEPS) != found


def tokens_of(result: Any) -> Any:
    if isinstance(result, mt.Segment):
        return result.tower, list(result.tokens)
    return type(result)(map(tokens_of, result))


class Lossy(Letters):
    """Encodes only the first letter, so tokens are not restored from decoded text."""

    def encode(self, raw: str) -> Tensor:
        return super().encode(raw[:1])


def test_segments_come_back_and_are_given_as_they_are() -> None:
    pipe = mt.Pipeline(pair(gates=True), {"text": Lossy()})
    given: list[Any] = [("text", "a")]
    example = [segment("text", 2)]
    answer = pipe(given, "text", return_segments=True, **STEPS)
    assert len(answer.tokens) > 3
    assert tokens_of([answer]) == tokens_of(decoded(pipe, example, ["text"]))
    again = pipe([*given, answer, ("text", "b")], "text", return_segments=True, **STEPS)
    expected = decoded(pipe, [*example, answer, segment("text", 3)], ["text"])
    assert tokens_of([again]) == tokens_of(expected)
    assert pipe.decode(answer) == pipe(given, "text", **STEPS)
    pipe(given, "speech", return_segments=True, **STEPS)  # needs no modality


@pytest.mark.parametrize(
    "output", ["text", ["text", "speech"], ("text", "speech"), [("text", "speech"), "text"]]
)
def test_segments_have_the_form_of_raw_data(pipe: mt.Pipeline, output: Any) -> None:
    examples = [[("speech", [5, 6])], [("text", "abc")]]
    for given in (examples, examples[0]):
        assert pipe.decode(pipe(given, output, return_segments=True, **STEPS)) == pipe(given, output, **STEPS)


def test_a_function_gets_segments_to_append(pipe: mt.Pipeline) -> None:
    def policy(row: mt.batch.Example) -> Any:
        return {1: "text", 2: ("text", "speech")}.get(len(row))

    given = [("speech", [5, 6])]
    first, both = pipe(given, policy, return_segments=True, **STEPS)
    raw_first, raw_both = pipe(given, policy, **STEPS)
    assert (first.tower, pipe.decode(first)) == raw_first
    assert pipe.decode(both) == tuple(raw for _, raw in raw_both)
    again = pipe([*given, first, both], "text", return_segments=True, **STEPS)
    assert tokens_of([again]) == tokens_of(decoded(pipe, [segment("speech", 5, 6), first, both], ["text"]))


def test_only_segments_are_decoded(pipe: mt.Pipeline) -> None:
    with pytest.raises(TypeError, match=r"decode takes multitower.Segment, not str"):
        pipe.decode(["words"])
    with pytest.raises(ValueError, match="no tower 'smell'"):
        pipe.decode(segment("smell", 3))


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
        (["words"], "text", TypeError, "example 0, entry 0 contains a str: give a pair"),
        ([("text", "a", "b")], "text", TypeError, "example 0, entry 0 contains a str: give a pair"),
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
