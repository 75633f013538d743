"""Examples of raw data: pairs of a tower and raw data where ``collate`` takes segments of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..batch.collate import Segment


@dataclass(frozen=True, eq=False)
class Raw:
    """Raw data for a tower, and where in the examples it stands."""

    tower: str
    data: Any
    where: str


def read_example(example: Any, number: int) -> list[Any]:
    """Return an example with ``Raw`` in place of pairs.

    >>> read_example([("text", "hi"), (("text", "ho"), Segment("speech", [0]))], 2)
    [Raw(tower='text', data='hi', where='example 2, entry 0'), (Raw(...), Segment(...))]

    Raises:
        TypeError: It is no list of pairs, segments and tuples of these.
    """
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
            f"{where} holds a {type(part).__name__}: give a pair (tower, raw), a multitower.Segment, or a "
            "tuple of these that begin at the same time"
        )
    tower, data = part
    return Raw(tower, data, where)


def _is_pair(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], str)


def leaves(rows: Iterable[Any]) -> list[Any]:
    """Return what stands in rows of entries, and in those entries that are tuples.

    >>> leaves([[1, (2, 3)], [4]])
    [1, 2, 3, 4]
    """
    entries = [entry for row in rows for entry in row]
    return [leaf for entry in entries for leaf in (entry if isinstance(entry, tuple) else (entry,))]


def replaced(rows: Iterable[Any], replace: Callable[[Any], Any]) -> list[list[Any]]:
    """Return rows of entries with something else in place of each leaf.

    >>> replaced([[1, (2, 3)], [4]], str)
    [['1', ('2', '3')], ['4']]
    """
    return [
        [tuple(map(replace, entry)) if isinstance(entry, tuple) else replace(entry) for entry in row]
        for row in rows
    ]


def by_tower(parts: Iterable[Any]) -> dict[str, list[Any]]:
    """Sort raw data or segments by their towers.

    >>> {name: len(parts) for name, parts in by_tower([Segment("text", [0]), Segment("text", [1])]).items()}
    {'text': 2}
    """
    found: dict[str, list[Any]] = {}
    for part in parts:
        found.setdefault(part.tower, []).append(part)
    return found
