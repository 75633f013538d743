"""Positions of tokens: in packed rows, and in segments for a link's ``position="segment"``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .collate import EXAMPLES, Example, place_in_time

ROOM = 2**20
"""A place is ``segment * ROOM + token``, so a segment can have this many tokens."""

APART = 1000.0
"""Distance between the positions at which consecutive segments start, in tokens."""

LAST = 2**62

CLOCKS = 2**40
"""Distance between the clocks of two packed examples, in tokens: more than any example has."""

PLACES = "places beside "
"""Prefix of a stream's keys for places with respect to another tower: "places beside text"."""


def places(streams: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return each token's segment number, and its index in the segment, combined to one number.

    Consecutive tokens of one tower are one segment here, even if they came in several ``Segment``.

    >>> times = {"speech": [[0, 1, 2, 6]], "text": [[3, 4, 5]]}
    >>> found = places({name: {"times": torch.tensor(each)} for name, each in times.items()})
    >>> [(place // ROOM, place % ROOM) for place in found["speech"][0].tolist()]
    [(0, 0), (0, 1), (0, 2), (2, 0)]
    >>> [(place // ROOM, place % ROOM) for place in found["text"][0].tolist()]
    [(1, 0), (1, 1), (1, 2)]

    Args:
        streams: The streams of a link's two towers, or of one of them, each with "times" and, if packed,
            "examples". Padding has time -1, or is masked by "mask". Segments of other towers are not counted.

    Returns:
        For each stream ``segment * ROOM + token``, int64, shape (batch, length). Segments are numbered in the
        order of their start; those that start at the same time have the same number.
    """
    device = next(iter(streams.values()))["times"].device
    first, begin, keys = {}, {}, []
    for name, stream in streams.items():
        times = stream["times"].to(device)
        real = stream["mask"].to(device) if "mask" in stream else times >= 0
        times = times.where(real, -1)
        begins = run_begins({**stream, "times": times})
        index = torch.arange(times.shape[1], device=device)
        first[name] = times.gather(1, (index * begins).cummax(1).values)
        begin[name] = stream[EXAMPLES].to(device) * CLOCKS if EXAMPLES in stream else 0 * times
        keys.append((begin[name] + first[name]).masked_fill(~begins | ~real, LAST))
    every = torch.cat(keys, 1).sort(1).values
    number = (every != _shifted(every)).cumsum(1) - 1
    last = every.shape[1] - 1

    def numbered(key: Tensor) -> Tensor:
        return number.gather(1, torch.searchsorted(every, key.contiguous()).clamp(max=last))

    found = {}
    for name, stream in streams.items():
        segment = numbered(begin[name] + first[name]) - numbered(begin[name])
        token = (stream["times"].to(device) - first[name]).clamp(min=0)
        found[name] = (segment.clamp(min=0) * ROOM + token).to(stream["times"].device)
    return found


def run_begins(stream: Mapping[str, Tensor]) -> Tensor:
    """Return which tokens start a segment, that is a run of consecutive tokens: bool, shape (batch, length).

    >>> run_begins({"times": torch.tensor([[0, 1, 2, 6, 7]])}).tolist()
    [[True, False, False, True, False]]
    """
    times = stream["times"]
    before = _shifted(times)
    begins = (before < 0) | (times != before + 1)
    if EXAMPLES in stream:  # their clocks all start at 0
        examples = stream[EXAMPLES].to(times.device)
        begins = begins | (examples != _shifted(examples))
    return begins


def _shifted(rows: Tensor) -> Tensor:
    """Shift rows to the right by one, filling with -1."""
    return F.pad(rows, (1, 0), value=-1)[:, :-1]


def measure_pace(examples: Iterable[Example], source: str, target: str) -> float:
    """Return the ratio of two towers' numbers of tokens: the ``pace`` of a link.

    >>> import multitower as mt
    >>> pairs = [[mt.Segment("speech", [1] * 30), mt.Segment("text", [1] * 4)] for _ in range(9)]
    >>> mt.batch.measure_pace(pairs, "speech", "text")
    7.5

    Args:
        examples: Examples as for ``collate``; those without tokens of both towers are skipped.
        source: Name of the source tower.
        target: Name of the target tower.

    Raises:
        ValueError: No example has tokens of both.
    """
    counts = [0, 0]
    for number, example in enumerate(examples):
        timed = place_in_time(example, number)
        both = [sum(len(each.tokens) for each, _ in timed if each.tower == name) for name in (source, target)]
        if all(both):
            counts = [count + new for count, new in zip(counts, both, strict=True)]
    if not all(counts):
        raise ValueError(f"no example has tokens of both {source!r} and {target!r}, of which to tell a pace")
    return counts[0] / counts[1]


def positions_in_segments(places: Tensor, stretch: float) -> Tensor:
    """Return positions for rotary tables, float32, shape (batch, length), with segments far apart.

    >>> positions_in_segments(torch.tensor([[0, 1, ROOM + 2]]), 7.5).tolist()
    [[0.0, 7.5, 1015.0]]
    """
    return (places // ROOM) * APART + (places % ROOM) * stretch


def positions(examples: Tensor) -> Tensor:
    """Return each token's index in its example, for packed rows.

    >>> positions(torch.tensor([[0, 0, 2, 2, 2], [1, 1, 1, 3, 3]])).tolist()
    [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]

    Args:
        examples: Example numbers, int64, shape (batch, length), ascending in each row.
    """
    places = torch.arange(examples.shape[1], device=examples.device)
    return places - torch.searchsorted(examples, examples)


def moments(stream: Mapping[str, Tensor]) -> Tensor:
    """Return the time of each token on a clock on which packed examples are far apart."""
    return stream["times"] + 2 * CLOCKS * stream[EXAMPLES] if EXAMPLES in stream else stream["times"]


def reach(window: int | None, stream: Mapping[str, Tensor]) -> int | None:
    """Return the window on that clock; in packed rows it never reaches another example."""
    return min(window or CLOCKS, CLOCKS) if EXAMPLES in stream else window
