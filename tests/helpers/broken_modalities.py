"""Modalities that each break one promise about data and tokens."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import multitower as mt
from broken import Breakages
from multitower.plugins import check_tokens

BROKEN = Breakages()


class Cipher(mt.Modality):
    """A substitution cipher of bytes, whose table is saved."""

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


@BROKEN.of("tokens", "encode of sample 0 gives torch.int32, expected torch.int64", alone=True)
class SaysInt32(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(raw).int()


@BROKEN.of("tokens", "encode of sample 0 gives a list, expected a torch.Tensor")
class SaysAList(Cipher):
    def encode(self, raw: Any) -> Any:
        return super().encode(raw).tolist()


@BROKEN.of("tokens", r"gives tokens of shape \(1, 2\), expected \(length,\)")
class SaysARow(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(raw)[None]


@BROKEN.of("tokens", "opens with token 5, not with begin, 256")
class HasNoBegin(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return torch.cat([torch.tensor([5]), super().encode(raw)])


@BROKEN.of("tokens", "closes with token 5, not with end, 257")
class HasNoEnd(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return torch.cat([super().encode(raw), torch.tensor([5])])


@BROKEN.of("tokens", r"gives \[\], expected begin, any number of tokens, and end")
class SaysNothing(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(raw)[:0]


@BROKEN.of("tokens", "gives end inside, at 1; a tower that writes it stops there", alone=True)
class EndsTwice(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return torch.cat([super().encode(raw), torch.tensor([self.end])])


@BROKEN.of("tokens", "gives token 258, beyond the vocabulary of 258")
class IsBeyondItself(Cipher):
    def encode(self, raw: Any) -> Tensor:
        tokens = super().encode(raw)
        return torch.cat([tokens[:-1], torch.tensor([258]), tokens[-1:]])


@BROKEN.of("tokens", "encode of sample 1 fails with KeyError: 'too much'")
class CannotEncodeMuch(Cipher):
    def encode(self, raw: Any) -> Tensor:
        if len(raw) > 5:
            raise KeyError("too much")
        return super().encode(raw)


@BROKEN.of(
    "round trip", "sample 1 comes back as b'TWO TOWERS', not as b'two towers'; where a loss", alone=True
)
class Shouts(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        return super().decode(tokens).upper()


@BROKEN.of("edges", "something else for the tokens of sample 1 without begin: b'wo towers', not b'two")
class NeedsBegin(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        ids = check_tokens(tokens)
        data = super().decode(tokens)
        return data if (ids and ids[0] == self.begin) or len(ids) < 2 else data[1:]


@BROKEN.of("edges", "something else for the tokens of sample 0 with padding behind", alone=True)
class ReadsPadding(Cipher):
    @property
    def pad(self) -> int:
        return 0


@BROKEN.of("repetition", "encode gives other tokens for sample 1 the second time")
class DrawsANumber(Cipher):
    def encode(self, raw: Any) -> Tensor:
        tokens = super().encode(raw)
        return tokens if not len(raw) else torch.cat([tokens[:-1], torch.randint(256, (1,)), tokens[-1:]])


@BROKEN.of("repetition", "decode gives something else .* second time: does it use a random number")
class DecodesByChance(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        return super().decode(tokens) + bytes([np.random.randint(256)])


@BROKEN.of("repetition", "decode gives something else .* or what it kept from the call before")
class CountsItsCalls(Cipher):
    calls = 0

    def decode(self, tokens: Tensor) -> bytes:
        self.calls += 1
        return super().decode(tokens) + bytes([self.calls % 256])


@BROKEN.of("repetition", "change the global random state of torch; use a generator of your own", alone=True)
class Seeds(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        torch.manual_seed(0)
        return super().decode(tokens)


@BROKEN.of("repetition", "change the global random state of random")
class Shuffles(Cipher):
    def encode(self, raw: Any) -> Tensor:
        random.random()
        return super().encode(raw)


@BROKEN.of(
    "batches", "encode_batch gives Tensor of shape .* at place 1, where one by one there is", alone=True
)
class SortsItsBatches(Cipher):
    def encode_batch(self, raws: Any) -> list[Tensor]:
        return super().encode_batch(sorted(raws, key=len))


@BROKEN.of("batches", "decode_batch gives 19 for 20")
class DropsEmptyRows(Cipher):
    def decode_batch(self, rows: Any) -> list[bytes]:
        return super().decode_batch([row for row in rows if len(row)])


@BROKEN.of("batches", r"encode_batch gives Tensor of shape \(12,\) .* at place 0")
class PadsItsBatches(Cipher):
    def encode_batch(self, raws: Any) -> list[Tensor]:
        rows = super().encode_batch(raws)
        return list(torch.nn.utils.rnn.pad_sequence(rows, True, self.end)) if rows else []


@BROKEN.of("batches", "encode_batch gives a tuple, expected a list")
class StacksItsBatches(Cipher):
    def encode_batch(self, raws: Any) -> Any:
        return tuple(super().encode_batch(raws))


@BROKEN.of("batches", "decode_batch gives b.* at place .*, where one by one there is b")
class StopsItsBatches(Cipher):
    """Cuts each row of a batch at its first end token, unlike ``decode``."""

    def decode_batch(self, rows: Any) -> list[bytes]:
        return [self.decode(row[: [*row.tolist(), self.end].index(self.end)]) for row in rows]


@BROKEN.of("batches", "decode_batch of nothing fails with IndexError")
class NeedsABatch(Cipher):
    def decode_batch(self, rows: Any) -> list[bytes]:
        return [rows[0].new_zeros(0).numpy().tobytes() + self.decode(row) for row in [rows[0], *rows[1:]]]


@BROKEN.of("inputs", "encode changes sample 2 in place; work on a copy of it", alone=True)
class ChangesTheData(Cipher):
    def encode(self, raw: Any) -> Tensor:
        tokens = super().encode(raw)
        if isinstance(raw, bytearray):
            raw.append(0)
        return tokens


@BROKEN.of("inputs", "decode changes the tokens in place; work on a copy of them", alone=True)
class ChangesTheTokens(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        data = super().decode(tokens)
        tokens[tokens > 255] = 0
        return data


@BROKEN.of("inputs", "decode_batch changes the tokens in place", alone=True)
class ChangesTheBatch(Cipher):
    def decode_batch(self, rows: Any) -> list[bytes]:
        return [self.decode(rows.pop(0)) for _ in range(len(rows))]


@BROKEN.of("inputs", "encode_batch changes the samples in place")
class ChangesTheSamples(Cipher):
    def encode_batch(self, raws: Any) -> list[Tensor]:
        return [self.encode(raws.pop(0)) for _ in range(len(raws))]


@BROKEN.of(
    "inputs", "other tokens for sample 0 when those it gave before are changed; give a copy", alone=True
)
class KeepsItsTokens(Cipher):
    def encode(self, raw: Any) -> Tensor:
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault(bytes(raw), super().encode(raw)) if raw is not None else super().encode(raw)


class Tokens(Cipher):
    """Returns its data, which are tokens already, without a copy."""

    accepts = (torch.Tensor,)

    def encode(self, raw: Any) -> Tensor:
        if not isinstance(raw, torch.Tensor):
            raise TypeError("give a tensor")
        return raw

    def decode(self, tokens: Tensor) -> Any:
        return tokens


@BROKEN.of("raw data", "encode of None, a NoneType, gives Tensor.*; expected a TypeError", alone=True)
class TakesAnything(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(raw if isinstance(raw, self.accepts) else str(raw).encode())


@BROKEN.of("raw data", "encode of None, a NoneType, fails with AttributeError")
class TripsOverStrangers(Cipher):
    def encode(self, raw: Any) -> Tensor:
        return super().encode(bytes.fromhex(raw.hex()))


@BROKEN.of("raw data", "fails with ValueError: what is this.; expected a TypeError")
class SaysValueError(Cipher):
    def encode(self, raw: Any) -> Tensor:
        if not isinstance(raw, self.accepts):
            raise ValueError("what is this?")
        return super().encode(raw)


@BROKEN.of("raw data", "encode of b'' fails with IndexError.*expected tokens or a ValueError")
class TripsOverNothing(Cipher):
    def encode(self, raw: Any) -> Tensor:
        raw[0] if isinstance(raw, self.accepts) else None
        return super().encode(raw)


@BROKEN.of("any tokens", "fails with IndexError: .*; towers write any tokens: drop what means nothing")
class LooksUp(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        return bytes(int(self.table.argsort()[token]) for token in tokens if token not in (256, 257))


@BROKEN.of("any tokens", r"decode of \[\], shape \(0,\) and torch.int64, fails with IndexError")
class NeedsTokens(Cipher):
    def decode(self, tokens: Tensor) -> bytes:
        return super().decode(tokens[:1]) + super().decode(tokens[1:]) if tokens[0] >= 0 else b""
