"""Tests of what a transformers model supports; any exception counts as no."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.extras import require
from .probe import LENGTH, evaluated, forward_options, logits_of, probe_tokens, rounding

OF_THE_CACHE = ("cache_config", "cache_implementation", "compile_config", "disable_compile", "use_cache")
"""Options that affect how a model caches; they are kept during the tests, all others are reset."""

STEPS = 2
"""Number of tokens to decode after a given cache."""


@torch.no_grad()
def why_not_faithful(model: Any, *, length: int, padding: int = 0) -> str:
    """Return how a model's ``generate``, with its cache, differs from its forward; empty if it does not.

    Some models use different positions in the two, ignore left padding, or fail on prompts that are shorter
    than their convolutions.
    """
    steps = 6
    prompts = probe_tokens(model)[:2, :length].clone()
    prompts[0, :padding] = 0
    mask = torch.ones_like(prompts)
    mask[0, :padding] = 0
    try:
        with evaluated(model):
            decoded = model.generate(
                prompts,
                attention_mask=mask,
                **{
                    **dict.fromkeys(_settings(model) - {*OF_THE_CACHE}),
                    "max_new_tokens": steps,
                    "min_new_tokens": steps,
                    "do_sample": False,
                    "num_beams": 1,
                    "num_return_sequences": 1,
                    "pad_token_id": 0,
                    "output_logits": True,
                    "return_dict_in_generate": True,
                },
            )
            tokens = decoded.sequences[:1, padding:-1]
            whole = logits_of(model(input_ids=tokens, **forward_options(model)))
    except Exception as error:  # any error means: not supported
        return f"{type(error).__name__}: {error}"
    expected = whole[0, -steps:]
    found = torch.stack([step[0].to(expected.dtype) for step in decoded.logits])
    worst = (found - expected).abs().max().item()
    return "" if worst <= rounding(expected) else f"its logits differ by {worst:.2g}"


def _settings(model: Any) -> set[str]:
    """Return the names of the options that a model's generation config sets."""
    own: Any = getattr(model, "generation_config", None)
    return (
        set() if own is None else set(own.to_diff_dict()) & set(vars(type(own)())) - {"transformers_version"}
    )


@torch.no_grad()
def why_not_resumed(tower: Any, *, padding: int = 0) -> str:
    """Return how tokens after a cache differ from all tokens at once; empty if they do not.

    Tokens are run in two pieces, layer by layer; then ``generate`` continues from their cache.
    """
    model = tower.model
    tokens = probe_tokens(model)[:2].clone()
    tokens[0, :padding] = 0
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    cache = require("transformers", "transformers").DynamicCache()
    try:
        with evaluated(model):
            whole = logits_of(model(input_ids=tokens[:1, padding:], **forward_options(model)))[0]
            pieces = []
            for start, end in ((0, LENGTH - 2), (LENGTH - 2, LENGTH - 1)):
                seen = mask[:, :end].bool() if padding else None
                hidden, context = tower.resume(tokens[:, start:end], cache, seen)
                hidden = tower.run_layers(hidden, context)
                pieces.append(tower.head(hidden, context)[0])
            shapes = {
                tuple(part.shape[:1]) + tuple(part.shape[2:3]) for pair in plain(cache) for part in pair
            }
            if shapes != {(2, LENGTH - 1)} or len(cache.layers) != tower.depth:
                return f"its cache holds {sorted(shapes)} in {len(cache.layers)} layers"
            decoded = model.generate(
                tokens,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                do_sample=False,
                num_beams=1,
                cache_implementation=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            after = decoded.sequences[:1, padding:-1]
            longer = logits_of(model(input_ids=after, **forward_options(model)))[0, -STEPS:]
    except Exception as error:  # any error means: not supported
        return f"{type(error).__name__}: {error}"
    found = torch.cat([torch.cat(pieces)[padding:], *(step[:1].to(whole) for step in decoded.logits)])
    expected = torch.cat([whole[:-1], longer])
    worst = (found - expected).abs().max().item()
    return "" if worst <= rounding(expected) else f"its logits differ by {worst:.2g}"


def plain(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of each layer of a cache; raise TypeError if it holds anything else."""
    layer_type = require("transformers", "transformers").cache_utils.DynamicLayer
    for layer in cache.layers:
        if type(layer) is not layer_type or not layer.is_initialized:
            raise TypeError(f"a layer of its cache is a {type(layer).__name__}, not only keys and values")
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def tells_examples_apart(tower: Any) -> bool:
    """Whether a ``TransformersTower`` gives packed examples the same logits as each alone.

    It does if the model makes its masks from "position_ids"; recurrent models, and those with other kinds of
    positions, do not. Without values to compare, having that argument is enough.
    """
    model = tower.model
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in model.parameters()):
        return True
    tokens = probe_tokens(model)
    rows = [
        [tokens[0], tokens[1, :3], tokens[1, :1], tokens[2]],
        [tokens[2, :2], tokens[0], tokens[0, :2], tokens[1]],
    ]
    positions = torch.stack([torch.cat([torch.arange(len(each)) for each in row]) for row in rows])
    try:
        with evaluated(model):
            packed = torch.stack([torch.cat(row) for row in rows])
            hidden, context = tower.embed(packed, positions=positions.to(tokens.device))
            hidden = tower.run_layers(hidden, context)
            together = tower.head(hidden, context)
            alone = torch.cat([torch.cat([tower(each[None]) for each in row], 1) for row in rows])
    except Exception:  # any error means: not supported
        return False
    return bool((together - alone).abs().max() <= rounding(alone))


@torch.no_grad()
def count_positions(tower: Any) -> int | None:
    """Return the number of positions of a ``TransformersTower``; None if it has no finite table.

    This observes table lookups while the model embeds tokens and runs its first layer. In a table of
    positions, the same consecutive indices are looked up for all rows, one per token; entries before them are
    reserved. Its size must be the same for two lengths, since tables may be computed to fit. Lookups by
    ``index_select`` are ignored: models that use it (XGLM) let their tables grow. On the meta device, there
    are no indices to observe.
    """
    tokens = probe_tokens(tower.model)
    if tokens.is_meta:
        return None
    found = []
    try:
        with evaluated(tower.model):
            for length in (LENGTH, LENGTH - 2):
                with _Lookups(length) as lookups:
                    hidden, context = tower.embed(tokens[:, :length])
                    tower.layer(1, hidden, context)
                found.append(lookups.rooms)
    except Exception:  # some models cannot be observed, for instance with flex_attention
        return None
    return min(set.intersection(*found), default=None)


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Records the sizes, minus reserved entries, of tables in which consecutive indices are looked up."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.length, self.rooms = length, set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func is aten.embedding.default:
            self._note(args[0], 0, args[1])
        elif func is aten.gather.default:
            self._note(*args[:3])
        elif func is aten.index.Tensor:
            for dim, places in enumerate(args[1]):
                self._note(args[0], dim, places)
        return func(*args, **(kwargs or {}))

    def _note(self, table: Tensor, dim: int, places: Tensor | None) -> None:
        if (
            places is None
            or places.dtype not in (torch.int32, torch.int64)
            or self.length not in places.shape
        ):
            return
        rows = places.movedim(list(places.shape).index(self.length), -1).reshape(-1, self.length)
        first = int(rows[0, 0])
        if torch.equal(rows, torch.arange(first, first + self.length).to(rows).expand_as(rows)):
            self.rooms.add(table.shape[dim] - first)
