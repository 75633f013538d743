"""Tables made once for a batch: rotary positions, and what each link may see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..batch.collate import Streams
from ..batch.pack import moments, reach
from ..declare.spec import LinkSpec
from ..link.attention import Visibility, block_visibility, has_flex, visibility
from ..link.cross_attention import GatedCrossAttention
from ..link.rotary import Rotation, rotation


class Rotations:
    """Tables of rotary positions, each made once: for a stream, a head width, a dtype and a device.

    >>> from multitower.link.cross_attention import GatedCrossAttention
    >>> tap = GatedCrossAttention(8, 8, heads=2, position="rotary")
    >>> made = Rotations({"text": torch.tensor([[0, 1, 2]])})
    >>> made.of("text", tap).cos.shape, made.of("text", tap) is made.of("text", tap)
    (torch.Size([1, 1, 3, 2]), True)

    Args:
        times: By stream when each of its tokens stands, int64, shape (batch, length).
    """

    def __init__(self, times: Mapping[str, Tensor]) -> None:
        self.times = times
        self.made: dict[tuple[object, ...], Rotation] = {}

    def of(self, stream: str, tap: GatedCrossAttention) -> Rotation | None:
        """Return the table of a stream as a tap needs it; None where it has no rotary positions."""
        if not tap.rotary:
            return None
        weight = tap.query.weight
        key = (stream, tap.head_width, weight.dtype, weight.device)
        if key not in self.made:
            self.made[key] = rotation(self.times[stream].to(weight.device), tap.head_width, weight.dtype)
        return self.made[key]


def visibilities(
    links: Iterable[LinkSpec],
    dtypes: Mapping[str, torch.dtype],
    streams: Streams,
    *,
    flex: bool = False,
    blind: bool = False,
) -> dict[str, Visibility]:
    """Return, for each link that has something to do in this batch, what its queries may see.

    Args:
        links: The links as declared.
        dtypes: By link that of its queries.
        streams: The batch.
        flex: Whether masks are for flex_attention, where the device has it.
        blind: Whether links that see nothing are included.
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
