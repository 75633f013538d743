"""The state of one row of a conversation: its tokens, and their cached keys and values.

Rows are immutable: each operation returns a new one, which shares all tensors that did not change. So a row
can be stored, rolled back to, or continued in several ways.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..base.extras import require
from ..batch.collate import Example, Segment, place_in_time
from ..batch.places import places
from ..compile.schedule import Tap
from ..link.cross_attention import KeysValues

Turn = Segment | tuple[Segment, ...]
"""An entry of an example: a segment, or a tuple of segments that start at the same time."""


class Said(NamedTuple):
    """One tower's tokens in a row, and the state of its cache.

    Attributes:
        tokens: int64, shape (length,), on the CPU.
        times: The time of each token, int64, shape (length,).
        done: Number of tokens that have been run, so that other towers can attend to them.
        cache: Keys and values of each of the tower's layers for the tokens ``base`` to ``done``, shape (1,
            heads, done - base, head width); empty if the tower cannot resume from a cache.
        base: Index of the first token that the tower attends to: the start of the current segment if it
            forgets earlier ones, else 0.
    """

    tokens: Tensor
    times: Tensor
    done: int = 0
    cache: tuple[KeysValues, ...] = ()
    base: int = 0

    @property
    def cached(self) -> int:
        """Number of cached tokens."""
        return self.done - self.base if self.cache else 0

    @property
    def pending(self) -> int:
        """Number of tokens that have not been run."""
        return len(self.tokens) - self.done

    @property
    def length(self) -> int:
        """Number of tokens from ``base`` on."""
        return len(self.tokens) - self.base

    def begins(self, place: int, time: int) -> bool:
        """Whether a token at this index and time starts a segment."""
        return place == 0 or int(self.times[place - 1]) + 1 != time

    def next_segment(self) -> int | None:
        """Return the start time of the first pending segment, not counting one that starts at ``done``."""
        places = range(self.done + 1, len(self.tokens))
        times = (int(self.times[place]) for place in places if self.begins(place, int(self.times[place])))
        return next(times, None)

    def forgetting(self, time: int) -> Said:
        """Return the state without the past if the next token, pending or at ``time``, starts a segment."""
        next_time = int(self.times[self.done]) if self.pending else time
        return self._replace(base=self.done, cache=()) if self.begins(self.done, next_time) else self

    def until(self, count: int, time: int) -> Said:
        """Return the state as of the first ``count`` tokens, when the row ended at ``time``.

        If the tower forgot their last segment, and that segment continues, it counts as not run.
        """
        short = self._replace(tokens=self.tokens[:count], times=self.times[:count])
        done = min(self.done, count)
        if count > self.base or self.base == 0:
            return short._replace(
                done=done, cache=tuple(_first(each, done - self.base) for each in self.cache)
            )
        if self.begins(count, time):
            return short._replace(done=count, cache=(), base=count)
        places = range(count - 1, -1, -1)
        base = next((each for each in places if self.begins(each, int(self.times[each]))), 0)
        return short._replace(done=base, cache=(), base=base)


NOTHING = Said(*torch.empty(2, 0, dtype=torch.long, device="cpu"))


@dataclass(frozen=True)
class Row:
    """The state of one example.

    >>> row = Row().then([Segment("text", [1, 5]), Segment("speech", [1, 7, 2])])
    >>> row.time, row.of("speech").times.tolist(), row.of("speech").pending
    (5, [2, 3, 4], 3)
    >>> row.until(1).time
    2

    Attributes:
        history: The entries so far.
        time: The time at which the next entry starts.
        said: The tokens of each tower, by name.
        read: For each tap, the keys and values of the source tokens that have been run, shape (1, heads,
            number of these, head width), on the target's device.
    """

    history: tuple[Turn, ...] = ()
    time: int = 0
    said: Mapping[str, Said] = field(default_factory=dict)
    read: Mapping[Tap, KeysValues] = field(default_factory=dict)

    def of(self, name: str) -> Said:
        """Return a tower's tokens."""
        return self.said.get(name, NOTHING)

    def then(self, entries: Example, number: int = 0) -> Row:
        """Return the row with more entries, not run yet; ``number`` is the row's number in errors."""
        said, end = dict(self.said), self.time
        for segment, time in place_in_time(entries, number):
            tokens, before = torch.as_tensor(segment.tokens, device="cpu"), said.get(segment.tower, NOTHING)
            times = torch.arange(len(tokens), device="cpu") + self.time + time
            said[segment.tower] = before._replace(
                tokens=torch.cat([before.tokens, tokens]), times=torch.cat([before.times, times])
            )
            end = max(end, int(times[-1]) + 1)
        return replace(self, history=(*self.history, *entries), time=end, said=said)

    def until(self, entries: int) -> Row:
        """Return the row as it was after its first ``entries`` entries, with the caches for these."""
        before = Row().then(self.history[:entries])
        said = {}
        for name, short in before.said.items():
            said[name] = self.of(name).until(len(short.tokens), before.time)
        read = {
            tap: _first(each, said[tap.source].done) for tap, each in self.read.items() if tap.source in said
        }
        return replace(before, said=said, read=read)

    def forgetting(self, names: Collection[str]) -> Row:
        """Return the row where these towers forget their past if their next token starts a segment."""
        said = {
            name: each.forgetting(self.time) if name in names else each for name, each in self.said.items()
        }
        return replace(self, said=said)

    def before(self, time: int) -> Row:
        """Return the row without pending tokens at this time or later."""
        said = {}
        for name, each in self.said.items():
            count = max(each.done, int((each.times < time).sum()))
            said[name] = each._replace(tokens=each.tokens[:count], times=each.times[:count])
        return replace(self, said=said)

    def but_last(self, name: str) -> Row:
        """Return the row as if a tower's last token had not been run."""
        said = self.of(name)
        done = min(said.done, len(said.tokens) - 1)
        short = said._replace(done=done, cache=tuple(_first(each, done - said.base) for each in said.cache))
        read = {tap: _first(each, done) if tap.source == name else each for tap, each in self.read.items()}
        return replace(self, said={**self.said, name: short}, read=read)


class Prompt(NamedTuple):
    """The prompts of one tower for several rows, padded on the left.

    Attributes:
        tokens: int64, shape (batch, length).
        times: Times of these tokens and of the first new one, int64, shape (batch, length + 1); -1 at
            padding.
        starts: For each row, the index at which the returned segment starts: the BOS token, which is the last
            token of the prompt, or, for a continued segment, the first token after the prompt.
        places: Places with respect to other towers, shaped like ``times``, if links use them.
    """

    tokens: Tensor
    times: Tensor
    starts: Sequence[int]
    places: Mapping[str, Tensor]

    @property
    def length(self) -> int:
        """Length of the padded prompts."""
        return self.tokens.shape[1]

    @property
    def mask(self) -> Tensor:
        """False at padding, bool, shape (batch, length)."""
        return self.times[:, :-1] >= 0


def places_beside(
    rows: Sequence[Row], name: str, other: str, times: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return the places of a tower's tokens with respect to another tower, int64, shape (length,), by row.

    Some row must have a token. ``times`` are those of the tokens if they are not the rows' own; see
    ``batch.places``.
    """
    own = [row.of(name).times for row in rows] if times is None else times
    both = {name: own, other: [row.of(other).times for row in rows]}
    streams = {
        each: pad_sequence(list(when), batch_first=True, padding_value=-1) for each, when in both.items()
    }
    found = places({each: {"times": when} for each, when in streams.items() if when.shape[1]})[name]
    return [row[: len(when)] for row, when in zip(found, own, strict=True)]


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors of shape (1, heads, length, width) along the batch, padded on the left.

    >>> stacked([torch.ones(1, 1, 2, 1), torch.ones(1, 1, 1, 1)]).flatten().tolist()
    [1.0, 1.0, 0.0, 1.0]
    """
    if len(parts) == 1:
        return parts[0]
    _, heads, _, width = parts[0].shape
    longest = max(part.shape[2] for part in parts)
    batch = parts[0].new_zeros(len(parts), heads, longest, width)
    for row, part in enumerate(parts):
        batch[row, :, longest - part.shape[2] :] = part[0]
    return batch


def cache_of(said: Sequence[Said]) -> Any:
    """Return a ``DynamicCache`` of a tower's keys and values for several rows, padded on the left."""
    cache_type, layers = require("transformers", "transformers").DynamicCache, [each.cache for each in said]
    full = next((each for each in layers if each), None)
    if full is None:
        return cache_type()
    none = tuple(KeysValues(*(part[:, :, :0] for part in layer)) for layer in full)
    return cache_type(
        [
            tuple(stacked(part) for part in zip(*same, strict=True))
            for same in zip(*(each or none for each in layers), strict=True)
        ]
    )


def rows_of(pairs: Sequence[tuple[Tensor, Tensor]], places: Sequence[slice]) -> list[tuple[KeysValues, ...]]:
    """Split batched keys and values of several layers into rows, each cut to its slice of the length."""
    return [
        tuple(KeysValues(*(part[row : row + 1, :, place] for part in pair)) for pair in pairs)
        for row, place in enumerate(places)
    ]


def _first(kept: KeysValues, count: int) -> KeysValues:
    return KeysValues(*(part[:, :, :count] for part in kept))
