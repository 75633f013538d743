"""Small modalities for tiny towers, and pipelines with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import multitower as mt
from models import pair

STEPS = {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 5.0}


class Letters(mt.Modality):
    name, accepts, vocab_size = "letters", (str,), 14

    def __init__(self, begin: int = 1, end: int = 2) -> None:
        self.begin, self.end = begin, end

    def encode(self, raw: str) -> Tensor:
        if not raw:
            raise ValueError("there is no letter")
        return torch.tensor([self.begin, *(ord(letter) - ord("a") + 3 for letter in raw), self.end])

    def decode(self, tokens: Tensor) -> str:
        edges = (self.begin, self.end)
        return "".join(chr(ord("a") + token - 3) for token in tokens.tolist() if token not in edges)


class Tune(Letters):
    name, accepts = "tune", (list, tuple)

    def encode(self, raw: list[int]) -> Tensor:
        return torch.tensor([self.begin, *raw, self.end])

    def decode(self, tokens: Tensor) -> list[int]:
        return [token for token in tokens.tolist() if token not in (self.begin, self.end)]


def decoded(pipe: mt.Pipeline, example: list, output: Any, **options: Any) -> Any:
    (row,) = pipe.model.generate([example], output, **STEPS, **options)
    return row


def simple_pipe() -> mt.Pipeline:
    return mt.Pipeline(pair(gates=True), {"speech": Tune(), "text": Letters()})


def pipe_of_other_edges() -> mt.Pipeline:
    """Return a pipeline whose modalities have other begin and end tokens than their towers."""
    return mt.Pipeline(pair(gates=True), {"text": Letters(begin=12, end=13), "speech": Tune(begin=1, end=11)})
