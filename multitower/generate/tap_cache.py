"""The cached keys and values that taps read during decoding; they grow while their source is decoded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch.collate import Stream, values_at_hand
from ..compile.schedule import Tap
from ..link.attention import Visibility, visibility
from ..link.cross_attention import GatedCrossAttention, KeysValues, add
from ..run.fusion import Fusion
from ..run.tables import Rotations


class Entry(NamedTuple):
    """The cache of one tap, on its target's device.

    Attributes:
        source: Keys and values.
        times: Times of the source tokens, int64, shape (batch, source length).
        mask: False at padding, bool, shape (batch, source length).
    """

    source: KeysValues
    times: Tensor
    mask: Tensor

    def then(self, other: Entry, place: int) -> Entry:
        """Return this entry up to index ``place``, followed by another entry."""
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
    """An entry for each tap whose source has tokens."""

    def __init__(self, model: Fusion, targets: Collection[str], entries: Mapping[Tap, Entry]) -> None:
        self.model, self.targets = model, targets
        self.entries = dict(entries)
        self.given = {tap: entry.times.shape[1] for tap, entry in entries.items()}

    @classmethod
    def fill(cls, model: Fusion, streams: Mapping[str, Stream], targets: Collection[str]) -> TapCache:
        """Run the towers once over the given streams, up to the last layer that a tap reads."""
        cache = cls(model, targets, {})
        devices = {name: model.tower(name).device for name in streams}
        placed = {
            name: {key: value.to(devices[name]) for key, value in stream.items() if key != "labels"}
            for name, stream in streams.items()
        }
        taps = [tap for name in placed for tap in cache.readers(name)]
        wanted: dict[str, int] = {}
        for tap in taps:
            wanted[tap.source] = max(tap.source_layer, wanted.get(tap.source, 0))
        given = model.run(placed, wanted=wanted).given if placed else {}
        rotations = Rotations(placed)
        entries = {
            tap: cache._read(tap, given[tap.source, tap.source_layer], placed[tap.source], rotations)
            for tap in taps
        }
        return cls(model, targets, entries)

    def readers(self, name: str) -> list[Tap]:
        """Return the taps from this tower into the towers to decode."""
        return [tap for tap in self.model.schedule.taps if tap.source == name and tap.target in self.targets]

    def grow(self, tap: Tap, states: Tensor, stream: Stream, place: int) -> None:
        """Add the keys and values of new source tokens, from ``place`` tokens after the initial ones."""
        new = self._read(tap, states, stream, Rotations({tap.source: stream}))
        old = self.entries.get(tap)
        self.entries[tap] = new if old is None else old.then(new, self.given.get(tap, 0) + place)

    def _read(self, tap: Tap, states: Tensor, stream: Stream, rotations: Rotations) -> Entry:
        device, module = self.model.tower(tap.target).device, self.model.tap(tap)
        source = module.read(states, rotations.of_keys(tap, module))
        source = KeysValues(*(part.contiguous() for part in source))  # every later step reads them
        return Entry(source, stream["times"].to(device), stream["mask"].to(device))


class Read(NamedTuple):
    """A tap and its cache, as used in each step.

    Attributes:
        tap: The tap.
        module: Its module.
        entry: Its cache.
        sight: Source, window and dtype: with the times of the step, they determine the visibility.
    """

    tap: Tap
    module: GatedCrossAttention
    entry: Entry
    sight: tuple[str, int | None, torch.dtype]


class Step(NamedTuple):
    """What the taps of one decoding step share.

    Attributes:
        times: Times of its tokens, int64, shape (batch, length).
        rotations: Rotary tables for these times.
        seen: Visibilities by ``Read.sight``.
    """

    times: Tensor
    rotations: Rotations
    seen: dict[tuple[str, int | None, torch.dtype], Visibility]


class TapReader:
    """Runs a tower's taps after each of its layers during decoding; an ``Inject``.

    Args:
        model: The model.
        name: The tower.
        cache: What its taps read; all of it is earlier than the last token of the prompts.
        times: Times of the prompts' tokens and of the first new one, int64, shape (batch, prompt length + 1),
            padded on the left.
        notes: Layers whose output to record, for other towers to read.
        places: Places with respect to other towers, shaped like ``times``, if links use them.

    Attributes:
        noted: The recorded outputs by layer, one for each call.
    """

    def __init__(
        self,
        model: Fusion,
        name: str,
        cache: TapCache,
        times: Tensor,
        notes: Collection[int] = (),
        places: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.name, self.cache = model, name, cache
        self.noted: dict[int, list[Tensor]] = {layer: [] for layer in notes}
        self.times = F.pad(times, (1, 0), value=-1)  # torch.compile would specialise on a length of 1
        self.places = {key: F.pad(each, (1, 0)) for key, each in (places or {}).items()}
        self.reads = self.reads_now()
        self.repeated: dict[int, dict[int, list[Read]]] = {}
        self.step: Step | None = None
        self.late: dict[int, Step] = {}
        every = [read for reads in self.reads.values() for read in reads]
        self.settled = not any(
            module.position or window is not None for _, module, _, (_, window, _) in every
        )

    def reads_now(self) -> dict[int, list[Read]]:
        """Return the taps whose sources have tokens, by the target layer that they follow."""
        links, reads = self.model._graph.links, dict[int, list[Read]]()
        for tap in self.model.schedule.taps:
            if tap.target == self.name and tap in self.cache.entries:
                module = self.model.tap(tap)
                sight = (tap.source, links[tap.link].window, module.query.weight.dtype)
                read = Read(tap, module, self.cache.entries[tap], sight)
                reads.setdefault(tap.target_layer, []).append(read)
        return reads

    def __call__(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """Apply the input adapter (layer 0) and the taps after a layer."""
        return self.update(layer, x if layer else self.model.adapt(self.name, x), positions)

    def update(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """Record the layer's output if needed, and add the updates of its taps."""
        if layer in self.noted:
            self.noted[layer].append(x)
        if layer == 0:
            self.step = self._step(len(x), positions) if self.reads else None
        if layer not in self.reads:
            return x
        step, updates = self.step, []
        assert step is not None
        for tap, module, entry, sight in self._reads(len(x))[layer]:
            if sight not in step.seen:
                step.seen[sight] = visibility(step.times, entry.times, entry.mask, *sight[1:])
            turn = step.rotations.of_queries(tap, module)
            updates.append(module(x, entry.source, step.seen[sight], turn))
        if layer == max(self.reads):
            self.step = None
        return add(x, updates)

    def stream_of(self, positions: Tensor) -> Stream:
        """Return times and places of tokens, consecutive from the first new one on."""
        index = positions.to(self.times.device) + 1
        known = index.clamp(max=self.times.shape[1] - 1)
        every = {"times": self.times, **self.places}
        return {key: each[:, known] + (index - known) for key, each in every.items()}

    def _step(self, rows: int, positions: Tensor) -> Step:
        """Start a step. Steps after the prompt share one if windows and positions play no role."""
        late = self.settled and values_at_hand(positions) and int(positions[0]) >= self.times.shape[1] - 2
        if late and rows in self.late:
            return self.late[rows]
        stream = self.stream_of(positions[:1] if late else positions)
        stream = {key: each.repeat_interleave(self._copies(rows), 0) for key, each in stream.items()}
        step = Step(stream["times"], Rotations({self.name: stream}), {})
        if late:
            self.late[rows] = step
        return step

    def _reads(self, rows: int) -> dict[int, list[Read]]:
        """Return the taps with their caches repeated for this many rows."""
        copies = self._copies(rows)
        if copies == 1:
            return self.reads
        if copies not in self.repeated:
            self.repeated[copies] = {
                layer: [read._replace(entry=read.entry.repeat(copies)) for read in reads]
                for layer, reads in self.reads.items()
            }
        return self.repeated[copies]

    def _copies(self, rows: int) -> int:
        copies = rows // len(self.times)  # not divmod: the number of rows is symbolic in a compiled step
        if not copies or rows % len(self.times):
            raise ValueError(
                f"{rows} rows are decoded where {len(self.times)} were prepared; a decoding loop must keep "
                "all rows until the last has ended"
            )
        return copies
