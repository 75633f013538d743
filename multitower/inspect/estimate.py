"""What a batch costs a fused model: parameters, FLOPs and memory, found without running on any values."""

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
"""What families of transformers call the cache in what their forward gives."""

Part = tuple[str, str]
"""A part of a model: one of "towers", "adapters", "links" or "loss", and its name there."""

LOSS: Part = ("loss", "")


def estimate(model: Fusion | FusionGraph, batch: Batch, *, logits: bool = True) -> Estimate:
    """Estimate what a batch costs a model: parameters, FLOPs, and the memory of training and decoding.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> both = [mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 7, 2], target=True)]
    >>> found = estimate(tiny_model(), mt.collate([both]))
    >>> found.links["speech->text"].cache_bytes    # of 2 taps: keys and values, 4 tokens, 8 floats each
    512
    >>> found.total.step_flops == found.total.forward_flops + found.total.backward_flops
    True

    Of a graph it is what the compiled model would cost, before any weight is loaded: of a tower that is a
    folder or a Hub id only the config is read (one that names no dtype counts as float32), and given modules
    are left as they are. What a plugin loads it loads as ever.

    >>> from multitower.testing import tiny_tower
    >>> graph = FusionGraph()
    >>> graph.add_tower("speech", tiny_tower())
    >>> graph.add_tower("text", tiny_tower())
    >>> graph.add_link("speech", "text", taps=[(1, 2)])
    >>> print(estimate(graph, mt.collate([both])))
                       parameters  trained      forward         step     saved  cache
    tower speech            1,200        0   9.22 kFLOP   9.22 kFLOP       0 B    0 B
    tower text              1,200        0   6.72 kFLOP   7.49 kFLOP     120 B    0 B
    link speech->text         288      288   2.18 kFLOP   6.72 kFLOP  1.16 KiB  256 B
    loss                        0        0       0 FLOP       0 FLOP     228 B    0 B
    total                   2,688      288  18.11 kFLOP  23.42 kFLOP  1.50 KiB  256 B

    The model runs on shapes alone, on a copy without values, as it would on its device and in its present
    mode; itself it is left as it is. Only what the batch's times, masks and labels decide is decided by
    their values. A part that is on the meta device is taken to be where the batch is.

    Args:
        model: The model, or a graph.
        batch: As ``collate`` gives it, on the device on which the model takes it.
        logits: As in ``FusedModel.forward``.

    Returns:
        The costs, with a table of them for ``print``. A batch without labels has no backward.

    Raises:
        GraphError: See ``FusionGraph.compile``.
        TowerError: See ``FusionGraph.compile``; or a folder or Hub id is of a quantised model.
        ValueError: The batch does not fit the model, weights are offloaded, or a tower decides what to run
            by values of its states, as a mixture of experts may.
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
    empty.attn_implementation = SDPA  # the counts of flex_attention would need values
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
    """Notes FLOPs and saved bytes for the part that runs.

    In the backward that is the part which saved the tensor that was asked for last: no product of matrices
    can be differentiated without one.
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
        """Run a step; return the FLOPs of its forward, those of all of it, and the bytes saved, by part."""
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
        """Return a method during which a part runs."""

        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            output = method(*args, **kwargs)
            self.enter(before)
            return output

        return run

    def enter(self, part: Part) -> Part:
        """Note what the last part did, and that another one runs; return the last."""
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
    """Copy a model shallowly, so that the meter is told which of its parts runs."""

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
    """Return a graph without the links that have something to read in this batch, but see none of it."""
    data = graph.to_dict()
    blind = {link.name for link in graph.links.values() if _is_blind(link, streams)}
    data["links"] = [link for link in data["links"] if link["name"] not in blind]
    return FusionGraph.from_dict(data)


def _is_blind(link: Any, streams: Mapping[str, Stream]) -> bool:
    if link.source not in streams or link.target not in streams:
        return False
    source, queries = streams[link.source], moments(streams[link.target])
    keys, window = moments(source), reach(link.window, source)
    some = max(1, MOST_VALUES // max(1, keys.numel()))  # what a model sees at once may be much
    return all(
        visibility(part, keys, source["mask"], window).is_blind()
        for part in torch.split(queries, some, dim=1)
    )


@torch.no_grad()
def _cache_bytes(model: Fusion, meter: _Meter, streams: Mapping[str, Stream]) -> Counter[Part]:
    """Count what decoding keeps of the tokens, as ``generate`` would begin with it."""
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
    """Return the tensors in a cache, whatever objects it is made of."""
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
    """Count the parameters of each part, those that are trained, and their bytes."""
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
"""FLOPs by shapes, where ``torch.utils.flop_counter`` has no formula of its own."""


def empty_model(graph: FusionGraph) -> Fusion:
    """Make the model of a graph without values, on the meta device; see ``estimate``."""
    copies = on_meta(nn.ModuleDict(dict(graph.modules)))
    towers = load_towers(graph.towers, dict(copies.items()), empty=True)
    return Fusion(graph, towers, empty=True)
