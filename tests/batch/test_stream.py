from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import multitower as mt
from models import EXAMPLES, pair, segment


def test_streams_keep_order_and_time() -> None:
    streams = mt.collate(EXAMPLES)["streams"]
    text, speech = streams["text"], streams["speech"]
    assert text["tokens"].tolist()[1] == [1, 4, 5, 6, 7, 8, 2, 1, 2, 2]
    assert text["times"].tolist()[1] == [0, 1, 2, 3, 4, 5, 6, 12, 13, 14]
    assert speech["times"].tolist()[1] == [7, 8, 9, 10, 11, -1]
    assert speech["labels"].tolist()[1] == [-100, 9, 3, 2, 2, -100]
    assert text["labels"].tolist()[0][:4] == [-100, 9, 3, 2]
    assert not speech["mask"][2].any()
    assert {stream[key].dtype for stream in streams.values() for key in ("tokens", "times", "labels")} == {
        torch.int64
    }


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "the batch is empty"),
        ([[]], "example 0 has no segments"),
        ([segment("text", 1)], "example 0 must be a list"),
        ([[segment("text")], ["text"]], "example 1 must be a list"),
        ([[mt.Segment("text", [])]], "example 0, segment of tower 'text': tokens must be a row"),
        ([[mt.Segment("text", [[1, 2]])]], r"not \(1, 2\)"),
        ([[mt.Segment("text", [0.5])]], "whole numbers"),
    ],
)
def test_bad_examples_teach(examples: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mt.collate(examples)


def test_stream_without_a_tower() -> None:
    with pytest.raises(ValueError, match="a stream for 'music', but the towers are speech, text"):
        pair()(**mt.collate([[segment("music", 3)]]))


@pytest.mark.parametrize("token", [20, -1])
def test_token_beyond_the_vocabulary(token: int) -> None:
    with pytest.raises(ValueError, match=rf"stream 'text' contains token {token}, .* vocabulary of 20"):
        pair()(**mt.collate([[mt.Segment("text", [1, token])]]))


def test_malformed_streams_teach() -> None:
    model = pair()
    streams = mt.collate(EXAMPLES)["streams"]
    with pytest.raises(ValueError, match="no streams"):
        model(streams={})
    with pytest.raises(ValueError, match="lacks 'times'"):
        model(streams={"text": {key: streams["text"][key] for key in ("tokens", "mask")}})
    with pytest.raises(ValueError, match=r"times has shape \(3, 4\)"):
        model(streams={"text": {**streams["text"], "times": streams["text"]["times"][:, :4]}})
    with pytest.raises(ValueError, match="same number of rows"):
        model(streams={**streams, "text": {key: value[:2] for key, value in streams["text"].items()}})
    with pytest.raises(ValueError, match="padded on the right"):
        model(streams={"text": {**streams["text"], "mask": streams["text"]["mask"].flip(1)}})


def test_segments_in_a_tuple_begin_at_the_same_time() -> None:
    duet = (mt.Segment("music", [1, 2]), mt.Segment("dance", [5, 6, 7], target=True))
    streams = mt.collate([[mt.Segment("text", [3, 4]), duet, mt.Segment("text", [8])], [duet]])["streams"]
    assert streams["text"]["times"].tolist() == [[0, 1, 5], [-1, -1, -1]]
    assert streams["music"]["times"].tolist() == [[2, 3], [0, 1]]
    assert streams["dance"]["times"].tolist() == [[2, 3, 4], [0, 1, 2]]
    assert streams["dance"]["labels"].tolist() == [[-100, 6, 7], [-100, 6, 7]]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((mt.Segment("text", [1]), mt.Segment("text", [2])), "must be of different towers, not text, text"),
        ((), "must be of different towers, not none"),
        ("text", "list of multitower.Segment, or of tuples of them"),
    ],
)
def test_entries_that_cannot_run_at_the_same_time(entry: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"example 1.*{message}"):
        mt.collate([[mt.Segment("text", [1])], [entry]])


@pytest.mark.parametrize("call", [mt.collate, lambda rows: pair().generate(rows, output=["text"])])
@pytest.mark.parametrize(
    ("entry", "kind"),
    [(segment("text", 3), "Segment"), ([("text",)], "str"), (["text"], "str"), ("text", "str"), ([3], "int")],
)
def test_what_is_no_list_of_segments_is_named(call: Callable, entry: object, kind: str) -> None:
    with pytest.raises(ValueError, match=f"example 1 must be a list of multitower.Segment.* a {kind}$"):
        call([[segment("text", 3)], entry])
