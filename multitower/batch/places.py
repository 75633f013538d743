"""Where tokens stand in their segments, and these in their example; see ``position="segment"`` of a link."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .collate import EXAMPLES, Example, place_in_time

ROOM = 2**20
"""How many tokens a segment has room for in a place, which is one number."""

APART = 1000.0
"""How far apart the positions of one segment and of the next begin, in tokens."""

LAST = 2**62

PLACES = "places beside "
"""How the names begin under which a stream brings its places: "places beside text"."""


def places(streams: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return for each token which segment it is in, and which token of it, in one number.

    Tokens of one tower that follow each other are one segment here, in however many ``Segment`` they came.

    >>> times = {"speech": [[0, 1, 2, 6]], "text": [[3, 4, 5]]}
    >>> found = places({name: {"times": torch.tensor(each)} for name, each in times.items()})
    >>> [(place // ROOM, place % ROOM) for place in found["speech"][0].tolist()]
    [(0, 0), (0, 1), (0, 2), (2, 0)]
    >>> [(place // ROOM, place % ROOM) for place in found["text"][0].tolist()]
    [(1, 0), (1, 1), (1, 2)]

    Args:
        streams: Those of the two towers of a link, or one of them, each with "times", -1 at padding on either
            side or "mask", and, where it is packed, "examples". What other towers say is not counted.

    Returns:
        By stream ``segment * ROOM + token``, int64, shape (batch, length): segments are counted in the order
        in which they begin; those that begin at the same time have the same number.
    """
    device = next(iter(streams.values()))["times"].device
    first, begin, keys = {}, {}, []
    for name, stream in streams.items():
        times = stream["times"].to(device)
        real = stream["mask"].to(device) if "mask" in stream else times >= 0
        times = times.where(real, -1)
        before = _shifted(times)
        begins = (before < 0) | (times != before + 1)
        if EXAMPLES in stream:  # the next example may begin at the time at which this one ends
            examples = stream[EXAMPLES].to(device)
            begins |= examples != _shifted(examples)
        index = torch.arange(times.shape[1], device=device)
        first[name] = times.gather(1, (index * begins).cummax(1).values)
        begin[name] = stream[EXAMPLES].to(device) * 2**40 if EXAMPLES in stream else 0 * times
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


def _shifted(rows: Tensor) -> Tensor:
    """Return what stands before each number of a row, -1 before the first."""
    return F.pad(rows, (1, 0), value=-1)[:, :-1]


def measure_pace(examples: Iterable[Example], source: str, target: str) -> float:
    """Return how many tokens of one tower go along with one of another: the ``pace`` of a link.

    >>> import multitower as mt
    >>> pairs = [[mt.Segment("speech", [1] * 30), mt.Segment("text", [1] * 4)] for _ in range(9)]
    >>> mt.batch.measure_pace(pairs, "speech", "text")
    7.5

    Args:
        examples: As ``collate`` takes them; those that lack one of the two are left out.
        source: Name of the tower that is read.
        target: Name of the tower that reads.

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
    """Return positions, float32, shape (batch, length), on a line on which segments lie far apart.

    >>> positions_in_segments(torch.tensor([[0, 1, ROOM + 2]]), 7.5).tolist()
    [[0.0, 7.5, 1015.0]]

    Args:
        places: As ``places`` gives them.
        stretch: How many units there are from one token to the next.
    """
    return (places // ROOM) * APART + (places % ROOM) * stretch
