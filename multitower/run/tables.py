"""Tables that are computed once per batch: rotary positions, and the visibility of each link."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..batch.collate import Streams
from ..batch.places import PLACES, moments, places, positions_in_segments, reach
from ..compile.schedule import Tap
from ..declare.spec import LinkSpec
from ..link.attention import Rotation, Visibility, block_visibility, has_flex, rotation, visibility
from ..link.cross_attention import GatedCrossAttention


class Rotations:
    """Tables of rotary positions, cached by stream, head width, dtype and device.

    Each stream has "times", int64, shape (batch, length). If it lacks the other tower's tokens, it also has
    its places with respect to that tower; see ``batch.places``.
    """

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.places: dict[tuple[str, str], Tensor] = {}
        self.made: dict[tuple[object, ...], Rotation] = {}

    def of_keys(self, tap: Tap, module: GatedCrossAttention) -> Rotation | None:
        """Return the table for a tap's source stream; None without rotary positions."""
        return self._of(tap.source, tap.target, module, module.stretches[0])

    def of_queries(self, tap: Tap, module: GatedCrossAttention) -> Rotation | None:
        """Return the table for a tap's target stream; None without rotary positions."""
        return self._of(tap.target, tap.source, module, module.stretches[1])

    def _of(self, name: str, other: str, module: GatedCrossAttention, stretch: float) -> Rotation | None:
        if module.position is None:
            return None
        weight, beside = module.query.weight, other if module.position == "segment" else ""
        key = (name, beside, stretch, module.head_width, weight.dtype, weight.device)
        if key not in self.made:
            known = self._places(name, beside) if beside else self.streams[name]["times"]
            positions = known.to(weight.device)
            if beside:
                positions = positions_in_segments(positions, stretch)
            self.made[key] = rotation(positions, module.head_width, weight.dtype)
        return self.made[key]

    def _places(self, name: str, beside: str) -> Tensor:
        if PLACES + beside in self.streams[name]:
            return self.streams[name][PLACES + beside]
        if (name, beside) not in self.places:
            both = {each: self.streams[each] for each in (name, beside) if each in self.streams}
            for each, found in places(both).items():
                self.places[each, beside if each == name else name] = found
        return self.places[name, beside]


def visibilities(
    links: Iterable[LinkSpec],
    dtypes: Mapping[str, torch.dtype],
    streams: Streams,
    *,
    flex: bool = False,
    blind: bool = False,
) -> dict[str, Visibility]:
    """Return the visibility of each link whose towers are both in the batch.

    ``dtypes`` are those of the scores. With ``flex``, masks are for FlexAttention where the device supports
    it. Links without visible tokens are left out unless ``blind``.
    """
    alike: dict[tuple[object, ...], Visibility] = {}
    when = {name: moments(stream) for name, stream in streams.items()}
    seen = {}
    for link in links:
        if link.source not in streams or link.target not in streams:
            continue
        key = (link.source, link.target, link.window, dtypes[link.name])
        if key not in alike:
            source = streams[link.source]
            between = (when[link.target], when[link.source], source["mask"], reach(link.window, source))
            blocks = flex and has_flex(when[link.target].device)
            alike[key] = block_visibility(*between) if blocks else visibility(*between, dtypes[link.name])
        seen[link.name] = alike[key]
    return {name: each for name, each in seen.items() if blind or not each.is_blind()}
