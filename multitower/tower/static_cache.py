"""A tower's own keys and values in tensors of a fixed length, as programs need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..base.extras import require
from .abilities import plain
from .probe import probe_tokens


class KeptLayer(NamedTuple):
    """What one layer keeps of one token: keys and values of shape (1, heads, 1, head width)."""

    keys: Tensor
    values: Tensor

    def empty_keys(self, rows: int, length: int) -> Tensor:
        """Return room for the keys of some rows."""
        return _room(self.keys, rows, length)

    def empty_values(self, rows: int, length: int) -> Tensor:
        """Return room for their values."""
        return _room(self.values, rows, length)


def kept_layers(tower: Any) -> list[KeptLayer]:
    """Return what each layer of a tower keeps of a token, found by running one."""
    cache = require("transformers", "transformers").DynamicCache()
    hidden, context = tower.resume(probe_tokens(tower.model)[:1, :1], cache)
    hidden = tower.run_layers(hidden, context)
    return [KeptLayer(keys, values) for keys, values in plain(cache)]


def static_cache(keys: Sequence[Tensor], values: Sequence[Tensor], length: Tensor) -> Any:
    """Return a cache of transformers that writes into given tensors.

    Sliding layers keep everything, too: their masks leave out what lies before the window.

    Args:
        keys: For each layer its keys, shape (batch, heads, maximum length, head width).
        values: For each layer its values.
        length: How many tokens they hold, int64, a scalar; it stays as it is.
    """
    cache_utils = require("transformers", "transformers").cache_utils
    layers = []
    for each_keys, each_values in zip(keys, values, strict=True):
        layer = cache_utils.StaticLayer(max_cache_len=each_keys.shape[2])
        layer.keys, layer.values, layer.cumulative_length = each_keys, each_values, length.clone()
        layer.dtype, layer.device, layer.is_initialized = each_keys.dtype, each_keys.device, True
        layers.append(layer)
    return cache_utils.Cache(layers=layers)


def _room(kept: Tensor, rows: int, length: int) -> Tensor:
    return kept.new_zeros(rows, kept.shape[1], length, kept.shape[3])
