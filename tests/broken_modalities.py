"""Modalities that each break one promise about data and tokens."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import multitower as mt
from multitower.plugins import check_tokens


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
