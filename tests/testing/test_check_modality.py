"""Messages of check_modality about modalities that break a promise."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from broken import Breakage
from broken_modalities import BROKEN, SAMPLES, ChangesTheData, Cipher, EndsTwice, Tokens, built
from multitower.testing import MODALITY_PROMISES, check_modality, modality_report
from multitower.testing.modality.case import same
from test_check_modality_files import BROKEN as BROKEN_ON_DISK


def round_trip_of(kind: type[Cipher], **declared: Any) -> str:
    report = modality_report(built(kind), SAMPLES, promises=["round trip"], **declared)
    return report["round trip"]


def test_a_good_modality_keeps_every_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    check_modality(built(), SAMPLES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert not list(tmp_path.iterdir())
    assert Path.cwd() == tmp_path


def test_samples_are_left_as_they_were() -> None:
    samples = [b"two", bytearray(b"towers")]
    assert modality_report(built(ChangesTheData), samples, promises=["inputs"])["inputs"]
    assert samples[1] == b"towers"


@BROKEN.each()
def test_what_is_broken_is_named(broken: Breakage) -> None:
    with pytest.raises(AssertionError, match=broken.report):
        check_modality(built(broken.kind), SAMPLES, promises=[broken.promise])


def test_every_promise_can_be_broken() -> None:
    promises = {broken.promise for broken in [*BROKEN, *BROKEN_ON_DISK]}
    assert promises | {"attributes"} == set(MODALITY_PROMISES)


@BROKEN.each(alone=True)
def test_what_is_whole_is_not_blamed(broken: Breakage) -> None:
    report = modality_report(built(broken.kind), SAMPLES)
    assert {name for name, reason in report.items() if reason} == {broken.promise}


def report_of_attributes(modality: Any) -> str:
    return modality_report(modality, SAMPLES, promises=["attributes"])["attributes"]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "Cipher"}, "name must be an identifier in lower case, as 'text', not 'Cipher'"),
        ({"name": "two words"}, "name must be an identifier"),
        ({"name": None}, "name must be an identifier"),
        ({"accepts": bytes}, r"accepts must be a tuple of types, as \(str,\)"),
        ({"accepts": ("bytes",)}, "accepts must be a tuple of types"),
        ({"accepts": ()}, "accepts must be a tuple of types"),
        ({"accepts": (bytes,)}, "sample 2 is of type bytearray, which is not among accepts"),
        ({"vocab_size": 0}, "vocab_size must be a positive whole number, not 0"),
        ({"vocab_size": 258.0}, "vocab_size must be a positive whole number, not 258.0"),
        ({"begin": 258}, "begin: token 258 is beyond the vocabulary of 258"),
        ({"end": -1}, "end: token -1 is beyond the vocabulary"),
        ({"end": "</s>"}, "end must be a token id, not '</s>'"),
        ({"begin": True}, "begin must be a token id, not True"),
        ({"default_tower": 5}, "default_tower must be a str or None, not 5"),
    ],
)
def test_wrong_attributes_are_named(attributes: dict[str, Any], message: str) -> None:
    modality = built(type("Odd", (Cipher,), attributes))
    assert re.search(message, report_of_attributes(modality))


def test_a_pad_beyond_the_vocabulary_is_named() -> None:
    modality = built(type("Odd", (Cipher,), {"pad": 300}))
    assert report_of_attributes(modality) == "pad: token 300 is beyond the vocabulary of 258"


def test_what_is_no_modality_is_named() -> None:
    assert "str is no subclass of multitower.Modality" in report_of_attributes("text")


def test_tokens_that_are_the_data_are_named() -> None:
    report = modality_report(built(Tokens), [torch.tensor([256, 3, 257])], promises=["inputs"])
    assert report["inputs"] == "the tokens of sample 0 share its memory; give a copy"


def test_edges_inside_can_be_declared() -> None:
    check_modality(built(EndsTwice), SAMPLES, edges_inside=True)


class ForgetsASixteenth(Cipher):
    """A quantiser that keeps only the upper four bits of a byte."""

    def encode(self, raw: Any) -> Tensor:
        tokens = super().encode(raw)
        return super().encode(bytes(byte & 0xF0 for byte in raw)) if len(raw) else tokens


class Drifts(Cipher):
    """Decodes each byte to the next one."""

    def decode(self, tokens: Tensor) -> bytes:
        return bytes((byte + 1) % 256 for byte in super().decode(tokens))


def farthest(raw: bytes, again: bytes) -> int:
    return max((abs(a - b) for a, b in zip(raw, again, strict=True)), default=0)


def test_a_loss_can_be_declared() -> None:
    check_modality(built(ForgetsASixteenth), SAMPLES, round_trip=farthest, bound=15)
    lost = round_trip_of(ForgetsASixteenth, round_trip=farthest, bound=14)
    assert lost == "sample 1 comes back with a loss of 15, more than 14"
    nan = round_trip_of(Cipher, round_trip=lambda raw, again: float("nan"), bound=1.0)
    assert "a loss of nan, more than 1" in nan


def test_tokens_alone_can_make_the_round_trip() -> None:
    assert "comes back as" in round_trip_of(ForgetsASixteenth)
    check_modality(built(ForgetsASixteenth), SAMPLES, round_trip="tokens")
    drifted = round_trip_of(Drifts, round_trip="tokens")
    assert "sample 1 has other tokens after decode and encode" in drifted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": []}, "there are no samples"),
        ({"round_trip": "bytes"}, "round_trip='bytes': give 'data', 'tokens' or a function"),
        ({"round_trip": farthest}, "go together"),
        ({"bound": 0.5}, "go together"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_modality(built(), **{"samples": SAMPLES, **arguments})


@dataclass
class Note:
    pitch: np.ndarray


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), True),
        (np.zeros(2), np.zeros(2, np.float32), False),
        (np.zeros((1, 2)), np.zeros(2), False),
        (np.zeros(2), [0, 0], False),
        (torch.zeros(2), torch.zeros(2), True),
        (torch.zeros(2), torch.ones(2), False),
        ((np.zeros(2), 16_000), (np.zeros(2), 16_000), True),
        ((np.zeros(2), 16_000), (np.zeros(2), 8_000), False),
        ([1, 2], [1, 2, 3], False),
        ({"a": np.zeros(2)}, {"a": np.zeros(2)}, True),
        ({"a": 1}, {"b": 1}, False),
        (Note(np.zeros(2)), Note(np.zeros(2)), True),
        (Note(np.zeros(2)), Note(np.ones(2)), False),
        (Plain(np.zeros(2)), Plain(np.zeros(2)), True),
        (Plain(1), Plain(2), False),
        ("a", "a", True),
        ((bytes, str), (bytes, str), True),
        (bytes, str, False),
    ],
)
def test_what_counts_as_the_same(first: Any, second: Any, alike: bool) -> None:
    assert same(first, second) is alike
