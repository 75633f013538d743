"""Export a tower as two programs for cached decoding: one encodes the sources, one decodes new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..base.extras import require
from ..batch.collate import Example, Segment, Stream
from ..batch.places import PLACES, places
from ..errors import ExportError
from ..generate.tap_cache import TapCache
from ..link.attention import Visibility, visibility
from ..link.cross_attention import GatedCrossAttention, KeysValues, add
from ..run.fusion import Fusion
from ..run.tables import Rotations
from ..tower import Tower
from ..tower.abilities import plain, why_not_resumed
from ..tower.probe import LENGTH, evaluated, probe_tokens, rounding
from ..tower.transformers import TransformersTower
from .tower import Logits
from .trace import Part, part_of, placed, run, sizes_of, strip, traced

State = dict[str, Any]
"""Passed between the programs: dicts and lists of tensors, which load without this library."""

LEAST = 3
"""Minimum cache length: tracing the step needs more than one row, and more new tokens than rows."""


class DecoderPrograms(NamedTuple):
    """The programs that decode a tower; see ``export_decoder``.

    Attributes:
        encode: Takes streams; returns the keys and values for cross-attention, and an empty cache.
        step: Takes new tokens, their times and what ``encode`` returned; returns logits, and fills the cache.
    """

    encode: ExportedProgram
    step: ExportedProgram


def export_decoder(model: Fusion, name: str, *, max_length: int) -> DecoderPrograms:
    """Export two programs that decode one tower of a fused model with key-value caches.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_tower
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> graph = mt.FusionGraph()
    >>> graph.add_tower("speech", tiny_tower())
    >>> graph.add_tower("text", GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2)))
    >>> graph.add_link("speech", "text", interleave=1)
    >>> encode, step = (each.module() for each in export_decoder(graph.compile(), "text", max_length=16))
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 7])]])
    >>> keys = ("tokens", "times", "mask")
    >>> streams = {name: {key: stream[key] for key in keys} for name, stream in batch["streams"].items()}
    >>> state = encode(streams)
    >>> step(streams["text"]["tokens"], streams["text"]["times"], state).shape    # the prompt
    torch.Size([1, 2, 20])
    >>> step(torch.tensor([[9]]), torch.tensor([[6]]), state).shape               # a token after it
    torch.Size([1, 1, 20])
    >>> state["cache"]["length"]
    tensor(3)

    ``encode`` takes streams in the form of ``export_tower``: those of the tower itself (other towers may read
    its prompt) and of all towers that it reads, directly or through others. It returns a state:

    - "taps": for each tap into the tower, such as "speech->text 2-2", "keys" and "values" of shape (batch,
      heads, source length, head width);
    - "sources": for each other tower, "times", int64, and "mask", bool, (batch, source length);
    - "cache": the tower's own "keys" and "values", per layer, zeros of shape (batch, heads, max_length, head
      width); "times", int64, (batch, max_length), -1 where there is no token; and "length", an int64 scalar.

    ``step`` takes tokens and times, int64, shape (batch, new), and this state. It returns logits, shape
    (batch, new, vocabulary), and updates the cache in place. It takes first the prompt, then one or more new
    tokens at a time. Prompts of different lengths are padded on the left with time -1. As in the model, a
    token attends to source tokens of earlier time; tokens that other towers should read must be in the
    tower's stream for ``encode``.

    The programs are checked against the model on streams of other sizes before they are returned.

    Args:
        model: The model; it is not changed.
        name: The tower to decode; it must be a transformers model.
        max_length: Maximum number of the tower's tokens in a row, including left padding. More raise torch's
            IndexError on the CPU.

    Raises:
        KeyError: There is no tower of that name.
        ValueError: ``max_length`` is less than 3, or more than the tower has positions for.
        ExportError: ``torch.export`` cannot trace a tower for every batch size and length; a tower is
            offloaded; or the decoded tower caches something other than keys and values, or does not support
            left padding.
    """
    part = part_of(model, name)
    tower = part.model.tower(name)
    _check_length(name, tower.hard_limit, max_length)
    with evaluated(model), torch.no_grad():
        _check_kept(name, tower, model.forgets(name))
        assert isinstance(tower, TransformersTower)
        encoder = _Encoder(part.model, name, _kept_layers(tower), max_length)
        stepper = _Step(part.model, name)
        streams = _example(part, name, 2, max_length)
        encode = traced(encoder, (streams,), (part.dynamic(),), part)
        state, new = encoder(streams), {0: part.rows, 1: Dim("new", max=max_length)}
        args = (*_on_the_left(streams[name], LEAST), state)
        step = traced(stepper, args, (new, new, _dynamic(part, state)), part)
        programs = DecoderPrograms(encode, step)
        for rows in (3, 1):
            _prove(part, name, programs, _example(part, name, rows, max_length))
    for program in programs:
        strip(program)
    return programs


class _Encoder(nn.Module):
    """Runs once, on the prompt and the sources."""

    def __init__(
        self, model: Fusion, name: str, layers: list[tuple[Tensor, Tensor]], max_length: int
    ) -> None:
        super().__init__()
        self.model, self.name, self.layers, self.max_length = model, name, layers, max_length

    def forward(self, streams: dict[str, Stream]) -> State:
        """Return the keys and values for the taps into the tower, and an empty cache."""
        entries = TapCache.fill(self.model, streams, [self.name]).entries
        rows, device = streams[self.name]["tokens"].shape[0], self.model.tower(self.name).device
        keys, values = (
            [each.new_zeros(rows, each.shape[1], self.max_length, each.shape[3]) for each in part]
            for part in zip(*self.layers, strict=True)
        )
        return {
            "taps": {f"{tap.link} {tap.key}": entry.source._asdict() for tap, entry in entries.items()},
            "sources": {
                name: {key: stream[key].to(device) for key in ("times", "mask")}
                for name, stream in streams.items()
                if name != self.name
            },
            "cache": {
                "keys": keys,
                "values": values,
                "times": torch.full((rows, self.max_length), -1, device=device),
                "length": torch.zeros((), dtype=torch.long, device=device),
            },
        }


class _Step(nn.Module):
    """Runs on new tokens; contains only the decoded tower and the taps into it."""

    def __init__(self, model: Fusion, name: str) -> None:
        super().__init__()
        links = model.graph.links
        self.name, self.tower = name, model.tower(name)
        self.adapter = model.adapters[name] if name in model.adapters else nn.Identity()
        self.reads = [(tap, links[tap.link].window) for tap in model.schedule.taps if tap.target == name]
        self.taps = nn.ModuleList(model.tap(tap) for tap, _ in self.reads)

    def forward(self, tokens: Tensor, times: Tensor, state: State) -> Tensor:
        """Return the logits of new tokens, and add these to the cache."""
        cache, count = state["cache"], tokens.shape[1]
        new = cache["length"] + torch.arange(count, device=tokens.device)
        cache["times"].index_copy_(1, new, times)
        kept = _static_cache(cache["keys"], cache["values"], cache["length"])
        x, context = self.tower.resume(tokens, kept, cache["times"] >= 0)
        x = self.adapter(x)
        stream = {"times": times}
        for tap, module in zip((tap for tap, _ in self.reads), self.taps, strict=True):
            if module.position == "segment" and PLACES + tap.source not in stream:
                both = {self.name: {"times": cache["times"]}, tap.source: state["sources"][tap.source]}
                stream[PLACES + tap.source] = places(both)[self.name][:, new]
        rotations, seen = Rotations({self.name: stream}), dict[tuple[Any, ...], Visibility]()
        for layer in range(self.tower.depth + 1):
            if layer:
                x = self.tower.layer(layer, x, context)
            x = self._read(layer, x, times, state, rotations, seen)
        cache["length"].add_(count)
        return self.tower.head(x, context)

    def _read(
        self,
        layer: int,
        x: Tensor,
        times: Tensor,
        state: State,
        rotations: Rotations,
        seen: dict[tuple[Any, ...], Visibility],
    ) -> Tensor:
        """Apply the taps after a layer."""
        updates = []
        for (tap, window), module in zip(self.reads, self.taps, strict=True):
            if tap.target_layer != layer:
                continue
            assert isinstance(module, GatedCrossAttention)
            source = KeysValues(**state["taps"][f"{tap.link} {tap.key}"])
            dtype, when = module.query.weight.dtype, state["sources"][tap.source]
            sight = (tap.source, window, dtype)
            if sight not in seen:
                seen[sight] = visibility(times, when["times"], when["mask"], window, dtype)
            updates.append(module(x, source, seen[sight], rotations.of_queries(tap, module)))
        return add(x, updates) if updates else x


def _kept_layers(tower: TransformersTower) -> list[tuple[Tensor, Tensor]]:
    """Return the cached keys and values of each layer for a single token: (1, heads, 1, head width)."""
    cache = require("transformers", "transformers").DynamicCache()
    tower.run_layers(*tower.resume(probe_tokens(tower.model)[:1, :1], cache))
    return plain(cache)


def _static_cache(keys: Sequence[Tensor], values: Sequence[Tensor], length: Tensor) -> Any:
    """Return a transformers cache that writes into the given tensors, after their first ``length`` tokens.

    Layers with sliding windows also cache all tokens; their masks exclude those before the window.
    """
    cache_utils = require("transformers", "transformers").cache_utils
    layers = []
    for each_keys, each_values in zip(keys, values, strict=True):
        layer = cache_utils.StaticLayer(max_cache_len=each_keys.shape[2])
        layer.keys, layer.values, layer.cumulative_length = each_keys, each_values, length.clone()
        layer.dtype, layer.device, layer.is_initialized = each_keys.dtype, each_keys.device, True
        layers.append(layer)
    return cache_utils.Cache(layers=layers)


def _check_length(name: str, limit: int | None, max_length: int) -> None:
    if max_length < LEAST:
        raise ValueError(
            f"max_length={max_length}: a cache must hold at least {LEAST} tokens of tower {name!r}"
        )
    if limit is not None and max_length > limit:
        raise ValueError(f"max_length={max_length}, but tower {name!r} has positions for {limit} tokens")


def _check_kept(name: str, tower: Tower, forgets: bool) -> None:
    """Check that a tower caches only keys and values, and supports left padding."""
    if forgets:
        raise ExportError(f"tower {name!r} has memory='segment', of which no program with caches can be made")
    reason = "it is not made of a transformers model"
    if isinstance(tower, TransformersTower):
        reason = why_not_resumed(tower) or why_not_resumed(tower, padding=LENGTH - 3)
    if reason:
        raise ExportError(
            f"tower {name!r} ({type(tower.native).__name__}) cannot go on from kept keys and values: "
            f"{reason}; export_tower makes a program of it that runs everything at each call"
        )


def _dynamic(part: Part, state: State) -> dict[str, Any]:
    """Return the dynamic shapes of a state."""
    rows = {0: part.rows}
    of = {f"{tap.link} {tap.key}": part.lengths[tap.source] for tap in part.model.schedule.taps}
    return {
        "taps": {
            name: {key: {0: part.rows, 2: of[name]} for key in each} for name, each in state["taps"].items()
        },
        "sources": {
            name: {key: {0: part.rows, 1: part.lengths[name]} for key in each}
            for name, each in state["sources"].items()
        },
        "cache": {
            key: [rows] * len(value) if isinstance(value, list) else (rows if value.dim() else None)
            for key, value in state["cache"].items()
        },
    }


def _example(part: Part, name: str, rows: int, max_length: int) -> dict[str, Stream]:
    """Make rows of different lengths in which the tower has tokens before and after its sources."""
    generator = torch.Generator().manual_seed(rows)

    def segment(tower: str, length: int) -> Segment:
        return Segment(
            tower, torch.randint(part.model.tower(tower).vocab_size, (length,), generator=generator)
        )

    sources = [tower for tower in part.towers if tower != name]
    examples: list[Example] = []
    for row in range(rows):
        given = [segment(tower, 2 + number + rows - row) for number, tower in enumerate(sources)]
        examples.append([segment(name, 1), *given, segment(name, min(1 + row, max_length - 1))])
    return placed(examples, part)


def _on_the_left(stream: Stream, length: int) -> tuple[Tensor, Tensor]:
    """Return the last tokens of a stream and their times, with padding moved to the left."""
    ends = [int(mask.sum()) for mask in stream["mask"]]
    tokens, times = (
        torch.stack([row.roll(-end) for row, end in zip(stream[key], ends, strict=True)])
        for key in ("tokens", "times")
    )
    return tokens[:, -length:], times[:, -length:]


def _prove(part: Part, name: str, programs: DecoderPrograms, streams: dict[str, Stream]) -> None:
    """Decode streams with the programs, the last tokens one by one, and compare logits with the model's."""
    sizes = sizes_of(streams)
    state = run(programs.encode, (streams,), sizes)
    whole = Logits(part.model, name)(streams)
    length = whole.shape[1]
    tokens, times = _on_the_left(streams[name], length)
    prompt = max(1, length - 2)
    pieces = [slice(0, prompt), *(slice(place, place + 1) for place in range(prompt, length))]
    found = [run(programs.step, (tokens[:, piece], times[:, piece], state), sizes) for piece in pieces]
    ours, expected = torch.cat(found, 1)[times >= 0], whole[streams[name]["mask"]]
    worst = (ours - expected).abs().max().item()
    if not worst <= rounding(expected):
        raise ExportError(
            f"the programs give other logits than the model for streams of the shapes {sizes} (largest "
            f"difference {worst:.2g}); a tower looks at sizes or values while it runs, or at its cache"
        )
