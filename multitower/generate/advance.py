"""Run pending tokens, all towers together, after the cached keys and values of earlier ones."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..batch.places import PLACES
from ..compile.schedule import Layer, Tap
from ..link.attention import Visibility, visibility
from ..link.cross_attention import KeysValues, add
from ..run.embed import check_room, embed
from ..run.fusion import Fusion
from ..run.tables import Rotations
from ..tower.abilities import plain
from .rows import Row, Said, cache_of, places_beside, rows_of, stacked


class Keeping(NamedTuple):
    """What to cache.

    Attributes:
        model: The model.
        open: Towers that may get more tokens. Keys and values are cached only for these and for taps into
            them.
        outputs: Those of them that may be decoded. In the others, layers above the last one that a tap reads
            never run.
    """

    model: Fusion
    open: Collection[str]
    outputs: Collection[str]

    def beside(self, name: str) -> set[str]:
        """Return the towers with respect to which links use this tower's places in segments."""
        links = [each for each in self.model._graph.links.values() if each.position == "segment"]
        ends = [(each.source, each.target) for each in links if name in (each.source, each.target)]
        return {other for pair in ends for other in pair if other != name}

    def readers(self, name: str) -> list[Tap]:
        """Return the taps from this tower into towers that may get more tokens."""
        return [tap for tap in self.model.schedule.taps if tap.source == name and tap.target in self.open]

    def read_layers(self, name: str) -> set[int]:
        """Return the layers of a tower that these taps read."""
        return {tap.source_layer for tap in self.readers(name)}

    def depth(self, name: str) -> int | None:
        """Return the last layer to run for a tower's tokens; None if none is needed."""
        if self.caches(name) and name in self.outputs:
            return self.model.tower(name).depth
        return max(self.read_layers(name), default=None)

    def caches(self, name: str) -> bool:
        """Whether to cache the tower's own keys and values."""
        return name in self.open and self.model.tower(name).resumes


def advance(keeping: Keeping, rows: Sequence[Row], names: Collection[str] | None = None) -> list[Row]:
    """Run the pending tokens of some towers, and of their sources, each token once; return the new rows.

    A tower that cannot resume from a cache runs from its first token if it has pending tokens. Towers with
    ``memory="segment"`` run one segment at a time.
    """
    rows, names = list(rows), _pending(keeping.model, rows, names)
    forgetful = [name for name in names if keeping.model.forgets(name)]
    while names:
        rows = [row.forgetting(forgetful) for row in rows]
        ends = [[row.of(name).next_segment() for name in forgetful] for row in rows]
        times = [min((time for time in each if time is not None), default=None) for each in ends]
        if any(time is not None for time in times):  # the next pass reads the states of this one
            keeping = keeping._replace(open={*keeping.open, *names})
        short = [row if time is None else row.before(time) for row, time in zip(rows, times, strict=True)]
        for number, new in enumerate(_advance(keeping, short, names)):
            whole = rows[number].said
            said = {
                name: each._replace(tokens=whole[name].tokens, times=whole[name].times)
                for name, each in new.said.items()
            }
            rows[number] = replace(new, said=said)
        names = names if any(time is not None for time in times) else []
    return rows


def _advance(keeping: Keeping, rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Run the pending tokens of these towers: one pass for each group of rows that can share a cache."""
    for name, (number, row) in itertools.product(names, enumerate(rows)):
        said = row.of(name)
        check_room(name, keeping.model.tower(name), said.times[said.base :], f"row {number} of the batch")
    kept = [name for name in names if len(rows) > 1 and keeping.caches(name)]
    apart = [name for name in kept if not keeping.model.tower(name).pads_left]  # cannot mix lengths
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for number, row in enumerate(rows):
        key = tuple((row.of(name).cached, row.of(name).pending) for name in apart)
        alike.setdefault(key, []).append(number)
    done: dict[int, Row] = {}
    for group in alike.values():
        part = [rows[number] for number in group]
        new = _Pass(
            keeping, part, [name for name in names if any(row.of(name).pending for row in part)]
        ).run()
        done |= zip(group, new, strict=True)
    return [done[number] for number in range(len(rows))]


def _pending(model: Fusion, rows: Sequence[Row], names: Collection[str] | None) -> list[str]:
    """Return the names of those of these towers, and of all their sources, that have pending tokens."""
    pending = [name for name in model.towers if any(row.of(name).pending for row in rows)]
    if names is None:
        return pending
    sources: dict[str, set[str]] = {}
    for tap in model.schedule.taps:
        sources.setdefault(tap.target, set()).add(tap.source)
    found: set[str] = set()
    waiting = [name for name in names if name in pending]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [source for source in sources.get(name, ()) if source in pending]
    return [name for name in pending if name in found]


class _Pass:
    """One forward pass over the pending tokens of a batch of rows."""

    def __init__(self, keeping: Keeping, rows: Sequence[Row], names: Collection[str]) -> None:
        self.keeping, self.model, self.rows, self.names = keeping, keeping.model, rows, names
        self.starts = {name: [self._start(name, row.of(name)) for row in rows] for name in names}
        self.times = {name: self._times(name) for name in names}
        self.streams = {name: self._stream(name) for name in names}
        self.earlier = {name: self._earlier(name) for row in rows for name in row.said}
        self.rotations = Rotations(self.streams)
        self.caches = {
            name: cache_of([row.of(name) for row in rows]) for name in names if keeping.caches(name)
        }
        self.given: dict[Layer, Tensor] = {}
        self.keys: dict[Tap, KeysValues] = {}

    def run(self) -> list[Row]:
        """Run the needed steps of the schedule, and return the new rows."""
        model, taps = self.model, self.model.schedule.taps
        depths = {name: self.keeping.depth(name) for name in self.names}
        wanted = {name: depth for name, depth in depths.items() if depth is not None}
        known = {(tap.source, tap.source_layer) for tap in taps if tap.source not in self.names}
        seen, hidden, contexts = self._visibilities(), dict[str, Tensor](), dict[str, Any]()
        for step in model.schedule.needed(wanted, seen, known):
            name, layer = step.tower, step.layer
            if step.taps:
                updates = [self._read(tap, hidden[name], seen[tap.link]) for tap in step.taps]
                hidden[name] = add(hidden[name], updates)
                continue
            if layer:
                hidden[name] = model.tower(name).layer(layer, hidden[name], contexts[name])
            else:
                hidden[name], contexts[name] = self._embed(name)
            if (name, layer) in model.schedule.read_layers:
                self.given[name, layer] = hidden[name]
        return self._rows(depths)

    def _start(self, name: str, said: Said) -> int:
        """Return the index of the first token to run in a row: after the cached ones, or ``base``."""
        if self.keeping.caches(name):
            return said.base + said.cached
        return said.base if said.pending else len(said.tokens)

    def _stream(self, name: str) -> dict[str, Tensor]:
        parts = list(zip((row.of(name) for row in self.rows), self.starts[name], strict=True))
        device = self.model.tower(name).device
        tokens = pad_sequence([said.tokens[start:] for said, start in parts], batch_first=True)
        times = self.times[name]
        stream = {"tokens": tokens, "times": times, "mask": times >= 0}
        for other in self.keeping.beside(name):
            stream[PLACES + other] = self._new(name, places_beside(self.rows, name, other))
        return {key: each.to(device) for key, each in stream.items()}

    def _times(self, name: str) -> Tensor:
        """Return the times of the tokens to run, on the CPU, padded on the right with -1."""
        return self._new(name, [row.of(name).times for row in self.rows])

    def _new(self, name: str, known: Sequence[Tensor]) -> Tensor:
        """Return those of each row's values that are of tokens to run, padded on the right with -1."""
        new = [each[start:] for each, start in zip(known, self.starts[name], strict=True)]
        return pad_sequence(new, batch_first=True, padding_value=-1)

    def _earlier(self, name: str) -> Tensor:
        """Return the times of the tokens before those to run, on the CPU, padded on the left with -1."""
        starts = self.starts.get(name, [row.of(name).done for row in self.rows])
        times = [row.of(name).times[:start] for row, start in zip(self.rows, starts, strict=True)]
        return pad_sequence(times, batch_first=True, padding_value=-1, padding_side="left")

    def _visibilities(self) -> dict[str, Visibility]:
        """Return the visibility of each link with visible source tokens."""
        model, seen, alike = self.model, dict[str, Visibility](), dict[tuple[Any, ...], Visibility]()
        dtypes = {tap.link: model.tap(tap).query.weight.dtype for tap in model.schedule.taps}
        for link in model.graph.links.values():
            if link.target not in self.names or link.source not in self.earlier:
                continue
            key = (link.source, link.target, link.window, dtypes[link.name])
            if key not in alike:
                queries, times = self.streams[link.target]["times"], self.earlier[link.source]
                if link.source in self.streams:
                    times = torch.cat([times, self.times[link.source]], 1)
                alike[key] = visibility(queries, times, times >= 0, *key[2:])
            seen[link.name] = alike[key]
        return {name: each for name, each in seen.items() if not each.is_blind()}

    def _embed(self, name: str) -> tuple[Tensor, Any]:
        tower, stream = self.model.tower(name), self.streams[name]
        if name in self.caches:
            ones = [torch.ones(count, dtype=torch.bool, device="cpu") for count in self._cached(name)]
            before = pad_sequence(ones, batch_first=True, padding_side="left")
            mask = torch.cat([before.to(tower.device), stream["mask"]], 1)
            x, context = tower.resume(
                stream["tokens"], self.caches[name], mask if self._padded(name) else None
            )
        else:
            x, context = embed(name, tower, stream)
        return self.model.adapt(name, x), context

    def _cached(self, name: str) -> list[int]:
        """Return the number of cached tokens of each row."""
        starts = zip(self.starts[name], self.rows, strict=True)
        return [start - row.of(name).base for start, row in starts]

    def _padded(self, name: str) -> bool:
        """Whether a tower needs a mask: padding is on the left, or could exceed the last position."""
        unlike = [len(set(self._cached(name))) > 1]
        if self.model.tower(name).hard_limit is not None:
            unlike.append(len({int(mask.sum()) for mask in self.streams[name]["mask"]}) > 1)
        return any(unlike)

    def _read(self, tap: Tap, x: Tensor, seen: Visibility) -> Tensor:
        module = self.model.tap(tap)
        update: Tensor = module(x, self._keys(tap), seen, self.rotations.of_queries(tap, module))
        return update

    def _keys(self, tap: Tap) -> KeysValues:
        """Return the keys and values that a tap reads: cached ones, then those of the tokens that run."""
        if tap not in self.keys:
            parts = [] if self.earlier[tap.source].shape[1] == 0 else [kept_of(self.rows, tap, self.starts)]
            if tap.source in self.names:
                module, states = self.model.tap(tap), self.given[tap.source, tap.source_layer]
                parts.append(module.read(states, self.rotations.of_keys(tap, module)))
            self.keys[tap] = KeysValues(*(torch.cat(part, 2) for part in zip(*parts, strict=True)))
        return self.keys[tap]

    def _rows(self, depths: Mapping[str, int | None]) -> list[Row]:
        """Return the rows with the keys and values of this pass added, without padding."""
        said, read = [dict(row.said) for row in self.rows], [dict(row.read) for row in self.rows]
        for name in self.names:
            before = self.earlier[name].shape[1]
            places = [
                slice(before - start, before + len(row.of(name).tokens) - start)
                for row, start in zip(self.rows, self.starts[name], strict=True)
            ]
            layers = plain(self.caches[name]) if name in self.caches and depths[name] else []
            apart = before - max(self._cached(name))
            own = [
                slice(place.start + row.of(name).base - apart, place.stop - apart)
                for place, row in zip(places, self.rows, strict=True)
            ]
            caches = rows_of(layers, own)
            for number, row in enumerate(self.rows):
                tokens = row.of(name).tokens
                if len(tokens):
                    said[number][name] = row.of(name)._replace(done=len(tokens), cache=caches[number])
            for tap in self.keeping.readers(name):
                kept = rows_of([self._keys(tap)], places)
                for number, (each,) in enumerate(kept):
                    read[number][tap] = each
        return [replace(row, said=said[number], read=read[number]) for number, row in enumerate(self.rows)]


def kept_of(rows: Sequence[Row], tap: Tap, starts: Mapping[str, Sequence[int]] | None = None) -> KeysValues:
    """Return a tap's cached keys and values for a batch of rows, padded on the left.

    At least one row must have some. ``starts`` limits, for each source and row, how many tokens to take; all
    by default.
    """
    known = next(row.read[tap] for row in rows if tap in row.read)
    none = KeysValues(*(part[:, :, :0] for part in known))
    counts = (starts or {}).get(tap.source, [None] * len(rows))
    parts = [
        [part[:, :, :count] for part in row.read.get(tap, none)]
        for row, count in zip(rows, counts, strict=True)
    ]
    keys, values = (stacked(part) for part in zip(*parts, strict=True))
    return KeysValues(keys, values)
