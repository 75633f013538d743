"""Estimate the parameters, FLOPs and memory of a batch from shapes alone."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..base.extras import require
from ..batch.collate import Batch, Stream, check_streams
from ..batch.places import moments, reach
from ..compile.modules import load_towers
from ..declare.graph import FusionGraph
from ..generate.tap_cache import TapCache
from ..link.attention import SDPA, visibility
from ..run.embed import check_packs
from ..run.fusion import Fusion
from ..tower import TransformersTower
from ..tower.weights import is_offloaded
from .cost import Cost, Estimate
from .shapes import MOST_VALUES, NEEDS_VALUES, ShapesOnly, on_meta

CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""The names of the cache in the outputs of transformers models."""

Part = tuple[str, str]
"""A part of a model: "towers", "adapters", "links" or "loss", and its name."""

LOSS: Part = ("loss", "")


def estimate(model: Fusion | FusionGraph, batch: Batch, *, logits: bool = True) -> Estimate:
    """Estimate the parameters, FLOPs, and memory in training and decoding that a batch costs.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> both = [mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 7, 2], target=True)]
    >>> found = estimate(tiny_model(), mt.collate([both]))
    >>> found.links["speech->text"].cache_bytes    # of 2 taps: keys and values, 4 tokens, 8 floats each
    512
    >>> found.total.step_flops == found.total.forward_flops + found.total.backward_flops
    True

    A graph is estimated without loading weights: for a folder or Hub id, only the config is read (float32 if
    it names no dtype), and given modules are not changed. Towers from plugins are loaded as usual.

    >>> from multitower.testing import tiny_tower
    >>> graph = FusionGraph()
    >>> graph.add_tower("speech", tiny_tower())
    >>> graph.add_tower("text", tiny_tower())
    >>> graph.add_link("speech", "text", taps=[(1, 2)])
    >>> print(estimate(graph, mt.collate([both])))
                       parameters  trained      forward         step     saved  cache
    tower speech            1,200        0   9.22 kFLOP   9.22 kFLOP       0 B    0 B
    tower text              1,200        0   6.72 kFLOP   7.49 kFLOP     120 B    0 B
    link speech->text         288      288   2.18 kFLOP   6.72 kFLOP  1.17 KiB  256 B
    loss                        0        0       0 FLOP       0 FLOP     228 B    0 B
    total                   2,688      288  18.11 kFLOP  23.42 kFLOP  1.51 KiB  256 B

    A copy of the model runs on fake tensors, for the model's device and in its present mode; the model is not
    changed. Only the batch's tokens, times, masks and labels have values. Parts on the meta device are
    assumed to be on the batch's device.

    Args:
        model: The model, or a graph.
        batch: A batch made by ``collate``, on the device on which the model expects it.
        logits: As in ``FusedModel.forward``.

    Returns:
        The costs; ``print`` shows them as a table. Without labels, there is no backward.

    Raises:
        GraphError: See ``FusionGraph.compile``.
        TowerError: See ``FusionGraph.compile``; or a folder or Hub id contains a quantised model.
        ValueError: The batch does not fit the model, weights are offloaded, or a tower's control flow depends
            on the values of its states, as in some mixtures of experts.
    """
    if isinstance(model, FusionGraph):
        model = empty_model(model)
    streams = batch["streams"]
    check_streams(streams, {name: model.tower(name).vocab_size for name in model.towers})
    for name, stream in streams.items():
        check_packs(name, model.tower(name), stream)
    if is_offloaded(model):
        raise ValueError(
            "some weights are offloaded, and come only when they run; estimate the graph instead"
        )
    mode = ShapesOnly()
    empty: Fusion = mode.copy(model, next(iter(streams.values()))["tokens"].device)
    empty.attn_implementation = SDPA  # counting flex_attention would need values
    empty._graph = _without_blind_links(model.graph, streams)
    meter = _Meter([*empty.parameters(), *empty.buffers()], streams)
    try:
        with mode:
            forward, step, saved = meter.measure(_watched(empty, meter), streams, logits)
            caches = _cache_bytes(empty, meter, streams)
    except NEEDS_VALUES as error:
        raise ValueError(
            f"{' '.join(meter.part)}: it decides by values of its states ({error}), and an estimate computes "
            "none of them; some mixtures of experts take the setting experts_implementation='grouped_mm', "
            "with which they do not"
        ) from error

    def cost(part: Part, owned: tuple[int, int, int] = (0, 0, 0)) -> Cost:
        return Cost(*owned, forward[part], step[part] - forward[part], saved[part], caches[part])

    owned = _parameters(model)
    costs = {
        kind: {name: cost((kind, name), owned[kind, name]) for name in getattr(model, kind)}
        for kind in ("towers", "adapters", "links")
    }
    return Estimate(**costs, loss=cost(LOSS))


class _Meter:
    """Attributes FLOPs and saved bytes to the part that runs.

    In the backward, this is the part that saved the last unpacked tensor: the backward of every matrix
    product unpacks one.
    """

    def __init__(self, own: Sequence[Tensor], streams: Mapping[str, Stream]) -> None:
        given = [tensor for stream in streams.values() for tensor in stream.values()]
        kept = [tensor.untyped_storage() for tensor in [*own, *given]]
        self.kept = {storage._cdata: storage for storage in kept}
        self.part = LOSS
        self.flops: Counter[Part] = Counter()
        self.saved: Counter[Part] = Counter()
        self.counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self.noted = 0

    def measure(
        self, model: Fusion, streams: Mapping[str, Stream], logits: bool
    ) -> tuple[Counter[Part], Counter[Part], Counter[Part]]:
        """Run a step; return the FLOPs of its forward, of the whole step, and the saved bytes, by part."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        with torch.enable_grad(), self.counter, hooks:
            loss = model(streams, logits=logits).loss
            self.enter(LOSS)
            forward, saved = self.flops.copy(), self.saved.copy()
            if loss is not None and loss.requires_grad:
                loss.backward()
            self.enter(LOSS)
        return forward, self.flops, saved

    def within(self, part: Part, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method so that its FLOPs are attributed to a part."""

        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            output = method(*args, **kwargs)
            self.enter(before)
            return output

        return run

    def enter(self, part: Part) -> Part:
        """Attribute the FLOPs so far to the current part, and switch to another; return the previous part."""
        total = self.counter.get_total_flops()
        self.flops[self.part] += total - self.noted
        self.noted, self.part, before = total, part, self.part
        return before

    def _pack(self, tensor: Tensor) -> tuple[Part, Tensor]:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.kept:
            self.kept[storage._cdata] = storage
            self.saved[self.part] += storage.nbytes()
        return self.part, tensor

    def _unpack(self, packed: tuple[Part, Tensor]) -> Tensor:
        self.enter(packed[0])
        return packed[1]


def _watched(model: Fusion, meter: _Meter) -> Fusion:
    """Return a shallow copy of a model that tells the meter which part runs."""

    def watched(part: Part, module: nn.Module, *methods: str) -> nn.Module:
        twin = copy.copy(module)
        for name in methods:
            setattr(twin, name, meter.within(part, getattr(module, name)))
        return twin

    twin = copy.copy(model)
    kinds: dict[str, dict[str, nn.Module]] = {"towers": {}, "adapters": {}, "links": {}}
    for name, tower in model.towers.items():
        kinds["towers"][name] = watched(("towers", name), tower, "embed", "layer", "head", "head_at")
    for name, adapter in model.adapters.items():
        kinds["adapters"][name] = watched(("adapters", name), adapter, "forward")
    for name in model.links:
        taps = {
            key: watched(("links", name), tap, "read", "forward") for key, tap in model._link(name).items()
        }
        kinds["links"][name] = nn.ModuleDict(taps)
    twin._modules = {**model._modules, **{kind: nn.ModuleDict(modules) for kind, modules in kinds.items()}}
    return twin


def _without_blind_links(graph: FusionGraph, streams: Mapping[str, Stream]) -> FusionGraph:
    """Return a graph without links whose source has tokens in this batch, but none visible to the target."""
    data = graph.to_dict()
    blind = {link.name for link in graph.links.values() if _is_blind(link, streams)}
    data["links"] = [link for link in data["links"] if link["name"] not in blind]
    return FusionGraph.from_dict(data)


def _is_blind(link: Any, streams: Mapping[str, Stream]) -> bool:
    if link.source not in streams or link.target not in streams:
        return False
    source, queries = streams[link.source], moments(streams[link.target])
    keys, window = moments(source), reach(link.window, source)
    some = max(1, MOST_VALUES // max(1, keys.numel()))  # limits the memory of the mask
    return all(
        visibility(part, keys, source["mask"], window).is_blind()
        for part in torch.split(queries, some, dim=1)
    )


@torch.no_grad()
def _cache_bytes(model: Fusion, meter: _Meter, streams: Mapping[str, Stream]) -> Counter[Part]:
    """Return the size of the caches after ``generate``'s prefill, by part."""
    model.eval()
    caches: Counter[Part] = Counter()
    for name, stream in streams.items():
        meter.enter(("towers", name))
        caches["towers", name] = _own_cache_bytes(model.tower(name), stream["tokens"])
    for tap, entry in TapCache.fill(model, streams, list(model.towers)).entries.items():
        caches["links", tap.link] += entry.source.keys.nbytes + entry.source.values.nbytes
    return caches


def _own_cache_bytes(tower: Any, tokens: Tensor) -> int:
    if isinstance(tower, TransformersTower):
        output = tower.model(input_ids=tokens, use_cache=True)
        kept = [getattr(output, key, None) for key in CACHES]
    elif tower.caches:
        kept = [require("transformers", "transformers").DynamicCache()]
        hidden, context = tower.embed(tokens, *kept)
        hidden = tower.run_layers(hidden, context)
    else:
        return 0
    storages = {
        storage._cdata: storage.nbytes()
        for tensor in _tensors_of(kept, set())
        if (storage := tensor.untyped_storage())
    }
    return sum(storages.values())


def _tensors_of(kept: Any, visited: set[int]) -> Iterator[Tensor]:
    """Yield all tensors in a cache, of whatever nested objects it consists."""
    if id(kept) in visited or isinstance(kept, nn.Module | type):
        return
    visited.add(id(kept))
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, Mapping):
        kept = list(kept.values())
    elif hasattr(kept, "__dict__"):
        kept = list(vars(kept).values())
    if isinstance(kept, list | tuple):
        for each in kept:
            yield from _tensors_of(each, visited)


def _parameters(model: Fusion) -> dict[Part, tuple[int, int, int]]:
    """Return, by part, the number of parameters, of trained ones, and their bytes."""
    counted: set[int] = set()
    counts = {}
    for kind in ("towers", "adapters", "links"):
        for name, module in getattr(model, kind).items():
            own = {id(each): each for each in module.parameters() if id(each) not in counted}
            counted |= own.keys()
            sizes = [(each.numel(), each.numel() * each.requires_grad, each.nbytes) for each in own.values()]
            total, trained, size = map(sum, zip(*sizes, strict=True)) if sizes else (0, 0, 0)
            counts[kind, name] = (total, trained, size)
    return counts


_aten = torch.ops.aten
FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda *args, **_: sdpa_flop_count(*args[:3]),  # type: ignore[no-untyped-call]  # of torch
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *args, **_: sdpa_backward_flop_count(*args[:4])  # type: ignore[no-untyped-call]  # of torch
    ),
    _aten._grouped_mm: lambda one, other, *_, **__: 2 * one[-2] * one[-1] * other[-1],
}
"""FLOP formulas of operators that ``torch.utils.flop_counter`` lacks."""


def empty_model(graph: FusionGraph) -> Fusion:
    """Compile a graph on the meta device; see ``estimate``."""
    copies = on_meta(nn.ModuleDict(dict(graph.modules)))
    towers = load_towers(graph.towers, dict(copies.items()), empty=True)
    return Fusion(graph, towers, empty=True)
