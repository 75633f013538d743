"""What taps read while a tower is decoded: keys and values, computed once, growing with their source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .link import KeysValues, visibility
from .schedule import Tap
from .stream import Stream

if TYPE_CHECKING:
    from .fused import FusedModel


class Entry(NamedTuple):
    """What one tap reads, on its target's device.

    Attributes:
        source: Keys and values.
        times: When each token of the source stands, int64, shape (batch, source length).
        mask: Whether it is one, bool, shape (batch, source length).
    """

    source: KeysValues
    times: Tensor
    mask: Tensor

    def then(self, other: Entry, place: int) -> Entry:
        """Put what another entry holds at this place of the source, instead of what stands there."""
        keys, values = (
            torch.cat([old[:, :, :place], new], 2) for old, new in zip(self.source, other.source, strict=True)
        )
        return Entry(
            KeysValues(keys, values),
            torch.cat([self.times[:, :place], other.times], 1),
            torch.cat([self.mask[:, :place], other.mask], 1),
        )

    def repeat(self, times: int) -> Entry:
        """Repeat each row for its beams or returned sequences; rows of one example need no reordering."""
        return Entry(
            KeysValues(*(part.repeat_interleave(times, 0) for part in self.source)),
            self.times.repeat_interleave(times, 0),
            self.mask.repeat_interleave(times, 0),
        )


class TapCache:
    """An entry for each tap whose source has tokens.

    Args:
        model: The model; its towers run once over what is given.
        streams: What is given.
    """

    def __init__(self, model: FusedModel, streams: Mapping[str, Stream]) -> None:
        self.model = model
        self.entries: dict[Tap, Entry] = {}
        placed = {
            name: {
                key: value.to(model.tower(name).device) for key, value in stream.items() if key != "labels"
            }
            for name, stream in streams.items()
        }
        given = model.run(placed).given if placed else {}
        for tap in model.schedule.taps:
            if tap.source in placed:
                stream = placed[tap.source]
                states = given[tap.source, tap.source_layer]
                self.entries[tap] = self._read(tap, states, stream["times"], stream["mask"])
        self.given = {tap: entry.times.shape[1] for tap, entry in self.entries.items()}

    def grow(self, tap: Tap, states: Tensor, times: Tensor, mask: Tensor, place: int) -> None:
        """Add what the source gave for further tokens; ``place`` counts them from those that were given."""
        new = self._read(tap, states, times, mask)
        old = self.entries.get(tap)
        self.entries[tap] = new if old is None else old.then(new, self.given.get(tap, 0) + place)

    def _read(self, tap: Tap, states: Tensor, times: Tensor, mask: Tensor) -> Entry:
        device = self.model.tower(tap.target).device
        return Entry(self.model.tap(tap).read(states, times), times.to(device), mask.to(device))


class TapReader:
    """What is done after each layer of one tower while it is decoded: an ``Inject``.

    Args:
        model: The model.
        name: The tower.
        cache: What its taps read.
        times: When the tokens of its prompts stand, int64, shape (batch, prompt length), padded on the left.
    """

    def __init__(self, model: FusedModel, name: str, cache: TapCache, times: Tensor) -> None:
        self.model, self.name, self.cache, self.times = model, name, cache, times
        self.repeated: dict[tuple[Tap, int], Entry] = {}
        self.taps: dict[int, list[Tap]] = {}
        for tap in model.schedule.taps:
            if tap.target == name:
                self.taps.setdefault(tap.target_layer, []).append(tap)

    def __call__(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """Adapt what is embedded, and let the state after a layer read others."""
        if layer == 0:
            return self.model.adapt(self.name, x)
        taps = [tap for tap in self.taps.get(layer, []) if tap in self.cache.entries]
        if not taps:
            return x
        copies = self._copies(len(x))
        times = self.times_of(positions).repeat_interleave(copies, 0)
        update = torch.zeros_like(x)
        for tap in taps:
            entry = self._entry(tap, copies)
            seen = visibility(times, entry.times, entry.mask, self.model.graph.links[tap.link].window)
            update = update + self.model.tap(tap)(x, times, entry.source, seen)
        return x + update

    def times_of(self, positions: Tensor) -> Tensor:
        """Give the times of tokens: those of the prompt are known, later ones follow one by one."""
        positions = positions.to(self.times.device)
        known = positions.clamp(max=self.times.shape[1] - 1)
        return self.times[:, known] + (positions - known)

    def _entry(self, tap: Tap, copies: int) -> Entry:
        entry = self.cache.entries[tap]
        if copies == 1:
            return entry
        if (tap, copies) not in self.repeated:
            self.repeated[tap, copies] = entry.repeat(copies)
        return self.repeated[tap, copies]

    def _copies(self, rows: int) -> int:
        copies, rest = divmod(rows, len(self.times))
        if rest or not copies:
            raise ValueError(
                f"{rows} rows are decoded where {len(self.times)} were prepared; a decoding loop must keep "
                "all rows until the last has ended"
            )
        return copies
