"""Encode raw data as segments and decode them, with the modalities of a model's towers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..batch.collate import Segment
from ..generate.edges import with_edges
from ..model import FusedModel
from ..plugins.modality import Modality


@dataclass(frozen=True)
class Codec:
    """A model, and the modalities of its towers."""

    model: FusedModel
    modalities: Mapping[str, Modality]

    def modality(self, name: str, where: str) -> Modality:
        """Return the modality of a tower; ``where`` begins the message of an error."""
        if not isinstance(name, str) or name not in self.model.towers:
            raise ValueError(
                f"{where}: there is no tower {name!r}; the towers are {', '.join(self.model.towers)}"
            )
        if name not in self.modalities:
            raise ValueError(
                f"{where}: tower {name!r} has no modality; there are ones for "
                f"{', '.join(self.modalities) or 'none'}: Pipeline(model, {{{name!r}: ...}})"
            )
        return self.modalities[name]

    def encode(self, examples: Sequence[Any]) -> list[list[Any]]:
        """Return examples with raw data encoded as segments; see ``Pipeline``."""
        rows = [read_example(example, number) for number, example in enumerate(examples)]
        table: dict[Raw, Segment] = {}
        for name, raws in by_tower(leaf for leaf in leaves(rows) if isinstance(leaf, Raw)).items():
            for raw in raws:
                accepts = self.modality(name, raw.where).accepts
                if not isinstance(raw.data, accepts):
                    kinds = " or ".join(kind.__name__ for kind in accepts)
                    raise TypeError(
                        f"{raw.where}: tower {name!r} takes {kinds}, not {type(raw.data).__name__}"
                    )
            try:
                encoded = self.modalities[name].encode_batch([raw.data for raw in raws])
            except Exception as error:
                error.add_note(f"raised for tower {name!r} in {'; '.join(raw.where for raw in raws)}")
                raise
            segments = (Segment(name, tokens) for tokens in encoded)
            table |= zip(raws, segments, strict=True)
        return replaced(rows, lambda leaf: table.get(leaf, leaf))

    def decode(self, rows: Sequence[Any], *, pairs: bool) -> list[list[Any]]:
        """Replace segments by raw data, or with ``pairs`` by (tower, raw data)."""
        table: dict[Segment, Any] = {}
        for name, segments in by_tower(leaves(rows)).items():
            raws = self.modality(name, "output").decode_batch([segment.tokens for segment in segments])
            table |= zip(segments, raws, strict=True)
        return replaced(rows, lambda leaf: (leaf.tower, table[leaf]) if pairs else table[leaf])

    def with_edges(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Add the begin and end tokens of modalities to options, if they differ from their towers'."""
        return with_edges(options, self.model, self.modalities)


@dataclass(frozen=True, eq=False)
class Raw:
    """Raw data for a tower, and its place in the examples for error messages."""

    tower: str
    data: Any
    where: str


def read_example(example: Any, number: int) -> list[Any]:
    """Return an example with ``Raw`` instead of pairs."""
    if not isinstance(example, list):
        raise TypeError(
            f"example {number} is a {type(example).__name__}: give a list, as in [('text', 'words'), ...]"
        )
    return [_read_entry(entry, f"example {number}, entry {place}") for place, entry in enumerate(example)]


def _read_entry(entry: Any, where: str) -> Raw | Segment | tuple[Raw | Segment, ...]:
    if isinstance(entry, tuple) and not _is_pair(entry):
        return tuple(_read_part(part, where) for part in entry)
    return _read_part(entry, where)


def _read_part(part: Any, where: str) -> Raw | Segment:
    if isinstance(part, Segment):
        return part
    if not _is_pair(part):
        raise TypeError(
            f"{where} contains a {type(part).__name__}: give a pair (tower, raw), a multitower.Segment, or a "
            "tuple of these that begin at the same time"
        )
    tower, data = part
    return Raw(tower, data, where)


def _is_pair(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], str)


def leaves(rows: Iterable[Any]) -> list[Any]:
    """Flatten rows of entries, where an entry may be a tuple.

    >>> leaves([[1, (2, 3)], [4]])
    [1, 2, 3, 4]
    """
    entries = [entry for row in rows for entry in row]
    return [leaf for entry in entries for leaf in (entry if isinstance(entry, tuple) else (entry,))]


def replaced(rows: Iterable[Any], replace: Callable[[Any], Any]) -> list[list[Any]]:
    """Replace each leaf in rows of entries, where an entry may be a tuple.

    >>> replaced([[1, (2, 3)], [4]], str)
    [['1', ('2', '3')], ['4']]
    """
    return [
        [tuple(map(replace, entry)) if isinstance(entry, tuple) else replace(entry) for entry in row]
        for row in rows
    ]


def by_tower(parts: Iterable[Any]) -> dict[str, list[Any]]:
    """Group raw data or segments by tower."""
    found: dict[str, list[Any]] = {}
    for part in parts:
        found.setdefault(part.tower, []).append(part)
    return found
