"""Modalities that each break one promise, and what check_modality says to their authors."""

from __future__ import annotations

import json
import pickle
import random
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import multitower as mt
from multitower.modality import check_tokens
from multitower.testing import MODALITY_PROMISES, check_modality, modality_report
from multitower.testing.codec import same


class Cipher(mt.Modality):
    """Bytes, each written as another; the table of bytes is what is saved."""

    name, accepts = "cipher", (bytes, bytearray)
    vocab_size, begin, end = 258, 256, 257

    def __init__(self, table: Tensor, shift: int = 0) -> None:
        if table.shape != (256,):
            raise ValueError(f"the table has shape {tuple(table.shape)}, expected (256,)")
        self.table, self.shift = table, shift

    def encode(self, raw: Any) -> Tensor:
        if not isinstance(raw, self.accepts):
            raise TypeError(f"give bytes, not {type(raw).__name__}")
        ids = [int(self.table[(byte + self.shift) % 256]) for byte in raw]
        return torch.tensor([self.begin, *ids, self.end])

    def decode(self, tokens: Tensor) -> Any:
        places = self.table.argsort()
        ids = [token for token in check_tokens(tokens) if token < 256]
        return bytes((int(places[token]) - self.shift) % 256 for token in ids)

    def config(self) -> dict[str, Any]:
        return {"shift": self.shift}

    def tensors(self) -> dict[str, Tensor]:
        return {"table": self.table}


SAMPLES = [b"", b"two towers", bytearray(b"\x00\xff")]


def built(kind: type[Cipher] = Cipher) -> Cipher:
    return kind(torch.randperm(256, generator=torch.Generator().manual_seed(0)), 3)


class SaysInt32(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(raw).int()


class SaysAList(Cipher):
    def encode(self, raw: Any) -> Any:
        return super().encode(raw).tolist()


class SaysARow(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(raw)[None]


class HasNoBegin(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return torch.cat([torch.tensor([5]), super().encode(raw)])


class HasNoEnd(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return torch.cat([super().encode(raw), torch.tensor([5])])


class SaysNothing(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(raw)[:0]


class EndsTwice(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return torch.cat([super().encode(raw), torch.tensor([self.end])])


class IsBeyondItself(Cipher):
    def encode(self, raw: Any) -> Tensor:
        tokens = super().encode(raw)
        return torch.cat([tokens[:-1], torch.tensor([258]), tokens[-1:]])


class CannotEncodeMuch(Cipher):
    def encode(self, raw: Any) -> Tensor:
        if len(raw) > 5:
            raise KeyError("too much")
        return super().encode(raw)


class Shouts(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        return super().decode(tokens).upper()


class NeedsBegin(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        ids = check_tokens(tokens)
        data = super().decode(tokens)
        return data if (ids and ids[0] == self.begin) or len(ids) < 2 else data[1:]


class ReadsPadding(Cipher):
    @property
    def pad(self) -> int:
        return 0


class DrawsANumber(Cipher):
    def encode(self, raw: Any) -> Tensor:
        tokens = super().encode(raw)
        return tokens if not len(raw) else torch.cat([tokens[:-1], torch.randint(256, (1,)), tokens[-1:]])


class DecodesByChance(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        return super().decode(tokens) + bytes([np.random.randint(256)])


class CountsItsCalls(Cipher):
    calls = 0

    def decode(self, tokens: Tensor) -> bytes:
        self.calls += 1
        return super().decode(tokens) + bytes([self.calls % 256])


class Seeds(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        torch.manual_seed(0)
        return super().decode(tokens)


class Shuffles(Cipher):
    def encode(self, raw: Any) -> Tensor:
        random.random()
        return super().encode(raw)


class SortsItsBatches(Cipher):
    def encode_batch(self, raws: Any) -> list[Tensor]:
        return super().encode_batch(sorted(raws, key=len))


class DropsEmptyRows(Cipher):
    def decode_batch(self, rows: Any) -> list[bytes]:
        return super().decode_batch([row for row in rows if len(row)])


class PadsItsBatches(Cipher):
    def encode_batch(self, raws: Any) -> list[Tensor]:
        rows = super().encode_batch(raws)
        return list(torch.nn.utils.rnn.pad_sequence(rows, True, self.end)) if rows else []


class StacksItsBatches(Cipher):
    def encode_batch(self, raws: Any) -> Any:
        return tuple(super().encode_batch(raws))


class StopsItsBatches(Cipher):
    """Cuts the rows of a batch at the first end, which a row alone may go beyond."""

    def decode_batch(self, rows: Any) -> list[bytes]:
        return [self.decode(row[: [*row.tolist(), self.end].index(self.end)]) for row in rows]


class NeedsABatch(Cipher):
    def decode_batch(self, rows: Any) -> list[bytes]:
        return [rows[0].new_zeros(0).numpy().tobytes() + self.decode(row) for row in [rows[0], *rows[1:]]]


class ChangesTheData(Cipher):
    def encode(self, raw: Any) -> Tensor:
        tokens = super().encode(raw)
        if isinstance(raw, bytearray):
            raw.append(0)
        return tokens


class ChangesTheTokens(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        data = super().decode(tokens)
        tokens[tokens > 255] = 0
        return data


class ChangesTheBatch(Cipher):
    def decode_batch(self, rows: Any) -> list[bytes]:
        return [self.decode(rows.pop(0)) for _ in range(len(rows))]


class ChangesTheSamples(Cipher):
    def encode_batch(self, raws: Any) -> list[Tensor]:
        return [self.encode(raws.pop(0)) for _ in range(len(raws))]


class KeepsItsTokens(Cipher):
    def encode(self, raw: Any) -> Tensor:
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault(bytes(raw), super().encode(raw)) if raw is not None else super().encode(raw)


class Tokens(Cipher):
    """Data that are tokens already, given on as they are."""

    accepts = (torch.Tensor,)

    def encode(self, raw: Any) -> Tensor:
        if not isinstance(raw, torch.Tensor):
            raise TypeError("give a tensor")
        return raw

    def decode(self, tokens: Tensor) -> Any:
        return tokens


class TakesAnything(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(raw if isinstance(raw, self.accepts) else str(raw).encode())


class TripsOverStrangers(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(bytes.fromhex(raw.hex()))


class SaysValueError(Cipher):
    def encode(self, raw: Any) -> Tensor:
        if not isinstance(raw, self.accepts):
            raise ValueError("what is this?")
        return super().encode(raw)


class TripsOverNothing(Cipher):
    def encode(self, raw: Any) -> Tensor:
        raw[0] if isinstance(raw, self.accepts) else None
        return super().encode(raw)


class LooksUp(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        return bytes(int(self.table.argsort()[token]) for token in tokens if token not in (256, 257))


class NeedsTokens(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        return super().decode(tokens[:1]) + super().decode(tokens[1:]) if tokens[0] >= 0 else b""


class NeedsOneRow(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        return bytes(self.table.argsort()[tokens[(tokens >= 0) & (tokens < 256)].long()].tolist())


class ForgetsItsShift(Cipher):
    def config(self) -> dict[str, Any]:
        return {}


class ForgetsLater(Cipher):
    """Loads well, and what is loaded cannot be saved: its file stood in the folder."""

    source: Path | None = None

    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        loaded = super().from_pretrained(folder)
        loaded.source = Path(folder)
        return loaded

    def save_pretrained(self, folder: Any) -> None:
        if self.source is not None:
            (self.source / "modality.json").read_text()
        super().save_pretrained(folder)


class WritesBeside(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(f"{folder}.log").write_text("saved")


class WritesHere(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path("cipher.log").write_text("saved")


class WritesAPickle(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(folder, "table").write_bytes(pickle.dumps([1]))


class WritesForTorch(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        torch.save(self.table, Path(folder, "table.data"))


class WritesAModel(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(folder, "model.bin").write_bytes(b"")


class RemembersWhere(Cipher):
    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(folder, "place.json").write_text(json.dumps(str(folder)))

    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        file = Path(folder, "place.json")
        return super().from_pretrained(json.loads(file.read_text()) if file.exists() else folder)


class TakesAnyFolder(Cipher):
    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        try:
            return super().from_pretrained(folder)
        except mt.CheckpointError:
            return cls(torch.arange(256))


class ReadsByItself(Cipher):
    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        json.loads(Path(folder, "modality.json").read_text())
        return super().from_pretrained(folder)


class HasAFileOfItsOwn(Cipher):
    """Reads a file beside the others, and does without where it is missing or damaged."""

    harmless: tuple[type[Exception], ...] = (OSError, ValueError)

    def save_pretrained(self, folder: Any) -> None:
        super().save_pretrained(folder)
        Path(folder, "extra.json").write_text(json.dumps({"shift": self.shift}))

    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        loaded = super().from_pretrained(folder)
        try:
            loaded.shift = json.loads(Path(folder, "extra.json").read_text())["shift"]
        except cls.harmless:
            warnings.warn("a modality without its shift", stacklevel=2)
            loaded.shift = 0
        except OSError as error:
            raise mt.CheckpointError(str(error)) from error
        return loaded


class TakesHalves(HasAFileOfItsOwn):
    harmless = (ValueError,)


class ReadsTensorsByItself(Cipher):
    @classmethod
    def from_pretrained(cls, folder: Any) -> Self:
        config, file = cls.read_config(Path(folder)), Path(folder, "modality.safetensors")
        if not file.exists():
            raise mt.CheckpointError(f"{file} is missing")
        return cls.restore(config, load_file(file))


class IsAnyones(Cipher):
    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any]:
        try:
            return super().read_config(folder)
        except mt.CheckpointError as error:
            if "is that of modality" in str(error):
                return {}
            raise

    @classmethod
    def restore(cls, config: Any, tensors: Any) -> Self:
        return cls(tensors.get("table", torch.arange(256)), config.get("shift", 0))


BROKEN = [
    (SaysInt32, "tokens", "encode of sample 0 gives torch.int32, expected torch.int64"),
    (SaysAList, "tokens", "encode of sample 0 gives a list, expected a torch.Tensor"),
    (SaysARow, "tokens", r"gives tokens of shape \(1, 2\), expected \(length,\)"),
    (HasNoBegin, "tokens", "opens with token 5, not with begin, 256"),
    (HasNoEnd, "tokens", "closes with token 5, not with end, 257"),
    (SaysNothing, "tokens", r"gives \[\], expected begin, any number of tokens, and end"),
    (EndsTwice, "tokens", "gives end inside, at 1; a tower that writes it stops there"),
    (IsBeyondItself, "tokens", "gives token 258, beyond the vocabulary of 258"),
    (CannotEncodeMuch, "tokens", "encode of sample 1 fails with KeyError: 'too much'"),
    (Shouts, "round trip", "sample 1 comes back as b'TWO TOWERS', not as b'two towers'; where a loss"),
    (NeedsBegin, "edges", "something else for the tokens of sample 1 without begin: b'wo towers', not b'two"),
    (ReadsPadding, "edges", "something else for the tokens of sample 0 with padding behind"),
    (DrawsANumber, "repetition", "encode gives other tokens for sample 1 the second time"),
    (
        DecodesByChance,
        "repetition",
        "decode gives something else .* second time: does it use a random number",
    ),
    (CountsItsCalls, "repetition", "decode gives something else .* or what it kept from the call before"),
    (Seeds, "repetition", "change the global random state of torch; use a generator of your own"),
    (Shuffles, "repetition", "change the global random state of random"),
    (
        SortsItsBatches,
        "batches",
        "encode_batch gives Tensor of shape .* at place 1, where one by one there is",
    ),
    (DropsEmptyRows, "batches", "decode_batch gives 19 for 20"),
    (StopsItsBatches, "batches", "decode_batch gives b.* at place .*, where one by one there is b"),
    (PadsItsBatches, "batches", r"encode_batch gives Tensor of shape \(12,\) .* at place 0"),
    (StacksItsBatches, "batches", "encode_batch gives a tuple, expected a list"),
    (NeedsABatch, "batches", "decode_batch of nothing fails with IndexError"),
    (ChangesTheData, "inputs", "encode changes sample 2 in place; work on a copy of it"),
    (ChangesTheTokens, "inputs", "decode changes the tokens in place; work on a copy of them"),
    (ChangesTheBatch, "inputs", "decode_batch changes the tokens in place"),
    (ChangesTheSamples, "inputs", "encode_batch changes the samples in place"),
    (
        KeepsItsTokens,
        "inputs",
        "other tokens for sample 0 when those it gave before are changed; give a copy",
    ),
    (TakesAnything, "raw data", "encode of None, a NoneType, gives Tensor.*; expected a TypeError"),
    (TripsOverStrangers, "raw data", "encode of None, a NoneType, fails with AttributeError"),
    (SaysValueError, "raw data", "fails with ValueError: what is this.; expected a TypeError"),
    (TripsOverNothing, "raw data", "encode of b'' fails with IndexError.*expected tokens or a ValueError"),
    (LooksUp, "any tokens", "fails with IndexError: .*; towers write any tokens: drop what means nothing"),
    (NeedsTokens, "any tokens", r"decode of \[\], shape \(0,\) and torch.int64, fails with IndexError"),
    (ForgetsItsShift, "saved", "that is loaded differs in the tokens of sample 1, the tokens of sample 2"),
    (ForgetsLater, "saved", "save_pretrained of what was loaded fails with FileNotFoundError"),
    (WritesBeside, "saved", "writes outside its folder: saved.log"),
    (WritesHere, "saved", "writes outside its folder: elsewhere.cipher.log"),
    (WritesAPickle, "saved", "writes table, a pickle, which runs code when it is loaded"),
    (WritesForTorch, "saved", "writes table.data, a pickle"),
    (WritesAModel, "saved", "writes model.bin, a pickle"),
    (RemembersWhere, "saved", "from_pretrained fails with CheckpointError: .*modality.json is missing"),
    (
        TakesAnyFolder,
        "damage",
        "from_pretrained of a folder that is nowhere gives .*; expected a multitower.Ch",
    ),
    (ReadsByItself, "damage", "from_pretrained of a folder that is nowhere fails with FileNotFoundError"),
    (HasAFileOfItsOwn, "damage", "from_pretrained of a folder without extra.json gives .*; expected a mult"),
    (TakesHalves, "damage", "from_pretrained of a folder with half of extra.json gives "),
    (ReadsTensorsByItself, "damage", "a folder with half of modality.safetensors fails with SafetensorError"),
    (IsAnyones, "damage", "from_pretrained of a folder that is another's gives "),
]


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
    assert modality_report(built(ChangesTheData), samples)["inputs"]
    assert samples[1] == b"towers"


@pytest.mark.parametrize(("kind", "promise", "message"), BROKEN, ids=[kind.__name__ for kind, *_ in BROKEN])
def test_what_is_broken_is_named(kind: type[Cipher], promise: str, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"{kind.__name__} breaks (?s:.*)\n  {promise}: .*{message}"):
        check_modality(built(kind), SAMPLES)


def test_every_promise_can_be_broken() -> None:
    assert {promise for _, promise, _ in BROKEN} | {"attributes"} == set(MODALITY_PROMISES)


@pytest.mark.parametrize(
    "kind",
    [
        SaysInt32, EndsTwice, Shouts, ReadsPadding, Seeds, SortsItsBatches, ChangesTheData, ChangesTheTokens,
        ChangesTheBatch, KeepsItsTokens, TakesAnything, WritesHere, WritesAPickle, TakesAnyFolder,
        ReadsByItself, HasAFileOfItsOwn, ForgetsLater,
    ],
)  # fmt: skip
def test_what_is_whole_is_not_blamed(kind: type[Cipher]) -> None:
    (cause,) = [promise for each, promise, _ in BROKEN if each is kind]
    broken = {name for name, reason in modality_report(built(kind), SAMPLES).items() if reason}
    assert broken == {cause}


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
    assert re.search(message, modality_report(modality, SAMPLES)["attributes"])


def test_a_pad_beyond_the_vocabulary_is_named() -> None:
    modality = built(type("Odd", (Cipher,), {"pad": 300}))
    assert (
        modality_report(modality, SAMPLES)["attributes"] == "pad: token 300 is beyond the vocabulary of 258"
    )


def test_what_is_no_modality_is_named() -> None:
    assert "str is no subclass of multitower.Modality" in modality_report("text", SAMPLES)["attributes"]


def test_tokens_that_are_the_data_are_named() -> None:
    report = modality_report(built(Tokens), [torch.tensor([256, 3, 257])])
    assert report["inputs"] == "the tokens of sample 0 share its memory; give a copy"


def test_edges_inside_can_be_declared() -> None:
    check_modality(built(EndsTwice), SAMPLES, edges_inside=True)


class ForgetsASixteenth(Cipher):
    """Keeps no more of a byte than its upper half: a quantiser."""

    def encode(self, raw: Any) -> Tensor:
        tokens = super().encode(raw)
        return super().encode(bytes(byte & 0xF0 for byte in raw)) if len(raw) else tokens


class Drifts(Cipher):
    """What comes back is each time another byte."""

    def decode(self, tokens: Tensor) -> bytes:
        return bytes((byte + 1) % 256 for byte in super().decode(tokens))


def farthest(raw: bytes, again: bytes) -> int:
    return max((abs(a - b) for a, b in zip(raw, again, strict=True)), default=0)


def test_a_loss_can_be_declared() -> None:
    check_modality(built(ForgetsASixteenth), SAMPLES, round_trip=farthest, bound=15)
    report = modality_report(built(ForgetsASixteenth), SAMPLES, round_trip=farthest, bound=14)
    assert report["round trip"] == "sample 1 comes back with a loss of 15, more than 14"
    nan = modality_report(built(), SAMPLES, round_trip=lambda raw, again: float("nan"), bound=1.0)
    assert "a loss of nan, more than 1" in nan["round trip"]


def test_tokens_alone_can_make_the_round_trip() -> None:
    assert "comes back as" in modality_report(built(ForgetsASixteenth), SAMPLES)["round trip"]
    check_modality(built(ForgetsASixteenth), SAMPLES, round_trip="tokens")
    report = modality_report(built(Drifts), SAMPLES, round_trip="tokens")
    assert "sample 1 has other tokens after decode and encode" in report["round trip"]


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
