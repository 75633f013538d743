"""What is kept of one row of a conversation: its tokens, and the keys and values that they left.

Rows are values: whatever is done with one makes another, which shares the tensors that did not change. So a
row can be kept, gone back to, or gone on from in several ways.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.extras import require
from ..batch.collate import Example, Segment, place_in_time
from ..batch.places import places
from ..compile.schedule import Tap
from ..link.cross_attention import KeysValues

Turn = Segment | tuple[Segment, ...]
"""An entry of an example: a segment, or several that begin at the same time."""


class Said(NamedTuple):
    """The tokens of one tower in a row, and what is known of them.

    Attributes:
        tokens: int64, shape (length,), on the CPU.
        times: When they stand, int64, shape (length,).
        done: How many of them have run, so that others can read them.
        cache: The keys and values of each layer of the tower, of those that have run since ``base``, shape
            (1, heads, done - base, head width); empty where the tower cannot go on from any.
        base: The first token that the tower attends to: where its segment begins, if it forgets.
    """

    tokens: Tensor
    times: Tensor
    done: int = 0
    cache: tuple[KeysValues, ...] = ()
    base: int = 0

    @property
    def cached(self) -> int:
        """How many tokens since ``base`` the tower need not run again when it goes on."""
        return self.done - self.base if self.cache else 0

    @property
    def pending(self) -> int:
        """How many tokens have not run."""
        return len(self.tokens) - self.done

    @property
    def length(self) -> int:
        """How many tokens there are since ``base``."""
        return len(self.tokens) - self.base

    def begins(self, place: int, time: int) -> bool:
        """Whether a segment begins with the token at a place, which stands at a time."""
        return place == 0 or int(self.times[place - 1]) + 1 != time

    def next_segment(self) -> int | None:
        """Return when the first segment begins that has not run, but for one that begins next."""
        places = range(self.done + 1, len(self.tokens))
        times = (int(self.times[place]) for place in places if self.begins(place, int(self.times[place])))
        return next(times, None)

    def forgetting(self, time: int) -> Said:
        """Return what there is where all is forgotten if a segment begins next, if need be at a time."""
        next_time = int(self.times[self.done]) if self.pending else time
        return self._replace(base=self.done, cache=()) if self.begins(self.done, next_time) else self

    def until(self, count: int, time: int) -> Said:
        """Return what there was of the first tokens when the row ended at a time.

        Where their segment was forgotten and goes on, it has not run.
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


NOTHING = Said(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))


@dataclass(frozen=True)
class Row:
    """An example so far.

    >>> row = Row().then([Segment("text", [1, 5]), Segment("speech", [1, 7, 2])])
    >>> row.time, row.of("speech").times.tolist(), row.of("speech").pending
    (5, [2, 3, 4], 3)
    >>> row.until(1).time
    2

    Attributes:
        history: Its entries.
        time: When the next begins.
        said: What each tower has in it, by name.
        read: By tap, the keys and values that it reads of the tokens of its source that have run, shape (1,
            heads, how many, head width), on the target's device.
    """

    history: tuple[Turn, ...] = ()
    time: int = 0
    said: Mapping[str, Said] = field(default_factory=dict)
    read: Mapping[Tap, KeysValues] = field(default_factory=dict)

    def of(self, name: str) -> Said:
        """Return what a tower has in the row."""
        return self.said.get(name, NOTHING)

    def then(self, entries: Example, number: int = 0) -> Row:
        """Return the row with further entries, which have not run; errors call it by its number."""
        said, end = dict(self.said), self.time
        for segment, time in place_in_time(entries, number):
            tokens, before = torch.as_tensor(segment.tokens), said.get(segment.tower, NOTHING)
            times = torch.arange(len(tokens)) + self.time + time
            said[segment.tower] = before._replace(
                tokens=torch.cat([before.tokens, tokens]), times=torch.cat([before.times, times])
            )
            end = max(end, int(times[-1]) + 1)
        return replace(self, history=(*self.history, *entries), time=end, said=said)

    def until(self, entries: int) -> Row:
        """Return the row as it was when it had so many entries, with what is kept of these."""
        before = Row().then(self.history[:entries])
        said = {}
        for name, short in before.said.items():
            said[name] = self.of(name).until(len(short.tokens), before.time)
        read = {
            tap: _first(each, said[tap.source].done) for tap, each in self.read.items() if tap.source in said
        }
        return replace(before, said=said, read=read)

    def forgetting(self, names: Collection[str]) -> Row:
        """Return the row where some towers have forgotten all if a segment of theirs begins next."""
        said = {
            name: each.forgetting(self.time) if name in names else each for name, each in self.said.items()
        }
        return replace(self, said=said)

    def before(self, time: int) -> Row:
        """Return the row without tokens that have not run and stand at this time or later."""
        said = {}
        for name, each in self.said.items():
            count = max(each.done, int((each.times < time).sum()))
            said[name] = each._replace(tokens=each.tokens[:count], times=each.times[:count])
        return replace(self, said=said)

    def places(self, name: str, other: str, times: Tensor | None = None) -> Tensor:
        """Return the places of a tower's tokens beside another's, int64, shape (length,).

        See ``batch.places``.
        """
        both = {name: self.of(name).times if times is None else times, other: self.of(other).times}
        streams = {each: {"times": when[None]} for each, when in both.items() if len(when)}
        return places(streams)[name][0]

    def but_last(self, name: str) -> Row:
        """Return the row as if the last token of a tower had not run."""
        said = self.of(name)
        done = min(said.done, len(said.tokens) - 1)
        short = said._replace(done=done, cache=tuple(_first(each, done - said.base) for each in said.cache))
        read = {tap: _first(each, done) if tap.source == name else each for tap, each in self.read.items()}
        return replace(self, said={**self.said, name: short}, read=read)


class Prompt(NamedTuple):
    """What a tower is decoded after, in some rows, padded on the left.

    Attributes:
        tokens: int64, shape (batch, length).
        times: When they stand, and when the first token that is decoded does, int64, shape (batch, length +
            1); -1 at padding.
        starts: Where in each row the new segment starts: at the last of these tokens, its begin token, or
            after it.
        places: Their places beside other towers, of the shape of ``times``, if a link asks.
    """

    tokens: Tensor
    times: Tensor
    starts: Sequence[int]
    places: Mapping[str, Tensor]

    @property
    def length(self) -> int:
        """How many tokens a row has, padding included."""
        return self.tokens.shape[1]

    @property
    def mask(self) -> Tensor:
        """Where they are not padding, bool, shape (batch, length)."""
        return self.times[:, :-1] >= 0


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Put tensors of shape (1, heads, length, width) into one, padded on the left; a single one is itself.

    >>> stacked([torch.ones(1, 1, 2, 1), torch.ones(1, 1, 1, 1)]).flatten().tolist()
    [1.0, 1.0, 0.0, 1.0]
    """
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])


def cache_of(said: Sequence[Said]) -> Any:
    """Return a ``DynamicCache`` of what a tower has kept in several rows, padded on the left."""
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
    """Take apart the layers of a cache of several rows: for each what stands at its place."""
    return [
        tuple(KeysValues(*(part[row : row + 1, :, place] for part in pair)) for pair in pairs)
        for row, place in enumerate(places)
    ]


def _first(kept: KeysValues, count: int) -> KeysValues:
    return KeysValues(*(part[:, :, :count] for part in kept))
