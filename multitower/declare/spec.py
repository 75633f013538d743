"""Towers and links as declared; they validate themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import GraphError

TRAIN = ("none", "all", "lora")
ADAPTERS = ("residual", "gated", "paper", None)
PROJECTIONS = ("mlp", "linear", "relu", "none")
GATES = ("tanh", None)
POSITIONS = ("rotary", "segment", None)
MEMORIES = ("all", "segment")

Taps = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TowerSpec:
    """A declared tower."""

    name: str
    source: str | None
    train: str = "none"
    adapter: str | None = None
    peft: Mapping[str, Any] | None = None
    memory: str = "all"

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise GraphError(f"tower name {self.name!r}: use letters, digits, '_' and '-', a letter first")
        _not_reserved("tower", self.name)
        _one_of(f"tower {self.name!r}: train", self.train, TRAIN)
        _one_of(f"tower {self.name!r}: adapter", self.adapter, ADAPTERS)
        _one_of(f"tower {self.name!r}: memory", self.memory, MEMORIES)
        if self.peft is not None and self.train != "lora":
            raise GraphError(f"tower {self.name!r}: a peft config needs train='lora', not {self.train!r}")
        if self.peft is not None and not (isinstance(self.peft, Mapping) and "peft_type" in self.peft):
            raise GraphError(f"tower {self.name!r}: a peft config has a peft_type; {self.peft!r} has none")


@dataclass(frozen=True)
class LinkSpec:
    """A declared link: at its taps, the target tower attends to the source tower."""

    source: str
    target: str
    name: str
    interleave: int | tuple[int, int] | None = None
    taps: Taps | None = None
    embeddings: bool = False
    gate: str | None = None
    projection: str = "none"
    heads: int | None = None
    position: str | None = "segment"
    pace: float = 1.0
    window: int | None = None
    feed_forward: bool = False
    relative: bool = True

    def __post_init__(self) -> None:
        where = f"link {self.name!r}"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_>-]*", self.name):
            raise GraphError(f"{where}: use letters, digits, '_', '-' and '>' in a link name, a letter first")
        _not_reserved("link", self.name)
        if self.source == self.target:
            raise GraphError(f"{where}: tower {self.source!r} cannot read itself; link two different towers")
        if (self.interleave is None) == (self.taps is None):
            raise GraphError(
                f"{where}: give either interleave, as in interleave=(1, 2), or taps, as in taps=[(2, 3)]"
            )
        strides = self.interleave if isinstance(self.interleave, tuple) else (self.interleave,)
        if self.interleave is not None and not (
            len(strides) in (1, 2) and all(_is_positive(stride) for stride in strides)
        ):
            raise GraphError(
                f"{where}: interleave={self.interleave!r} must be a positive whole number of target layers, "
                "or a pair (i_source, i_target) of them"
            )
        if self.taps is not None:
            if not self.taps:
                raise GraphError(f"{where}: taps is empty; give at least one (source layer, target layer)")
            for tap in self.taps:
                if not (isinstance(tap, tuple) and len(tap) == 2 and all(_is_layer(layer) for layer in tap)):
                    raise GraphError(
                        f"{where}: tap {tap!r} must be a pair (source layer, target layer), counted from 1; "
                        "0 is what enters layer 1"
                    )
            if len(set(self.taps)) < len(self.taps):
                raise GraphError(f"{where}: the same tap occurs twice in {list(self.taps)}")
        if not isinstance(self.embeddings, bool):
            raise GraphError(f"{where}: embeddings={self.embeddings!r} must be True or False")
        if self.embeddings and self.taps is not None:
            raise GraphError(f"{where}: embeddings=True adds a tap to interleave; add (0, 0) to taps instead")
        _one_of(f"{where}: gate", self.gate, GATES)
        _one_of(f"{where}: projection", self.projection, PROJECTIONS)
        _one_of(f"{where}: position", self.position, POSITIONS)
        if (
            isinstance(self.pace, bool)
            or not isinstance(self.pace, int | float)
            or not 0 < self.pace < math.inf
        ):
            raise GraphError(f"{where}: pace={self.pace!r} must be a positive number")
        if self.pace != 1 and self.position != "segment":
            raise GraphError(f"{where}: a pace needs position='segment', not {self.position!r}")
        if self.heads is not None and not _is_positive(self.heads):
            raise GraphError(f"{where}: heads={self.heads!r} must be a positive whole number")
        if self.window is not None and not _is_positive(self.window):
            raise GraphError(f"{where}: window={self.window!r} must be a positive whole number of tokens")
        for option in ("feed_forward", "relative"):
            if not isinstance(value := getattr(self, option), bool):
                raise GraphError(f"{where}: {option}={value!r} must be True or False")

    def resolve(self, source_depth: int, target_depth: int) -> Taps:
        """Return the taps as pairs (source layer, target layer), counted from 1, for towers of these depths.

        >>> LinkSpec("a", "b", name="a->b", interleave=(1, 2)).resolve(4, 6)
        ((1, 2), (2, 4), (3, 6))
        >>> LinkSpec("a", "b", name="a->b", interleave=2).resolve(3, 6)
        ((1, 2), (2, 4), (3, 6))
        >>> LinkSpec("a", "b", name="a->b", interleave=(1, 2), embeddings=True).resolve(4, 6)
        ((0, 0), (1, 2), (2, 4), (3, 6))

        Layer 0 is the input of layer 1: the embedded tokens, after the input adapter if there is one. If
        ``interleave`` is a single number, source layers are at the same relative depth, rounded down (at
        least 1), so that such links never make a cycle among layers.

        Raises:
            GraphError: A tap names a layer that a tower does not have, or no tap fits.
        """
        if self.taps is not None:
            for source_layer, target_layer in self.taps:
                for tower, layer, depth in (
                    (self.source, source_layer, source_depth),
                    (self.target, target_layer, target_depth),
                ):
                    if layer > depth:
                        raise GraphError(
                            f"link {self.name!r}: tap {(source_layer, target_layer)} names layer {layer} of "
                            f"tower {tower!r}, which has layers 1 to {depth} (0 is what enters layer 1)"
                        )
            return tuple(sorted(self.taps))
        if isinstance(self.interleave, tuple):
            i, j = self.interleave
            taps = tuple((n * i, n * j) for n in range(1, min(source_depth // i, target_depth // j) + 1))
        else:
            assert self.interleave is not None
            taps = tuple(
                (max(1, layer * source_depth // target_depth), layer)
                for layer in range(self.interleave, target_depth + 1, self.interleave)
            )
        if not taps:
            raise GraphError(
                f"link {self.name!r}: interleave={self.interleave!r} leaves no tap, since tower "
                f"{self.source!r} has {source_depth} layers and {self.target!r} has {target_depth}; "
                "use smaller steps"
            )
        return ((0, 0), *taps) if self.embeddings else taps


def is_name(value: object) -> bool:
    """Whether this is a valid tower name, which is also used as a folder name.

    >>> is_name("text"), is_name("../text")
    (True, False)
    """
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,99}", value) is not None


def _not_reserved(what: str, name: str) -> None:
    if hasattr(nn.ModuleDict(), name):
        raise GraphError(f"{what} name {name!r} is that of an attribute of torch modules; choose another")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_layer(value: object) -> bool:
    return (value == 0 and isinstance(value, int) and not isinstance(value, bool)) or _is_positive(value)


def _one_of(what: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise GraphError(f"{what}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
