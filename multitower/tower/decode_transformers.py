"""Have a transformers model decode by its own generate and cache, with something done after each layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .probe import Layers, forward_options
from .shell import Inject, as_call, as_tuple, make_shell, stand_in

FOR_SPEED = ("cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens")
"""Settings that change how a tower decodes by itself, not what."""


def make_decoder(model: nn.Module, found: Layers, inject: Inject) -> Any:
    """Return a copy of a model, parameters shared, whose layers are followed by ``inject``."""
    positions = _Positions()
    layers = list(model.get_submodule(found.path).children())
    for index, place in enumerate(found.order, 1):
        followed = _Followed(layers[place], index, inject, positions, found)
        layers[place] = stand_in(layers[place], followed.forward)
    shell = make_shell(model, found.path, layers).model
    prepare = shell.prepare_inputs_for_generation
    recorded = {key: value for key, value in forward_options(model).items() if key != "use_cache"}

    @functools.wraps(prepare)
    def prepare_inputs(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = {**prepare(input_ids, *args, **kwargs), **recorded}
        length = inputs["input_ids"].shape[1]
        total = _length_so_far(input_ids, length, kwargs)
        positions.now = torch.arange(total - length, total, device=input_ids.device)
        return inputs

    shell.prepare_inputs_for_generation = prepare_inputs
    return shell


class _Positions:
    """Where in their rows the tokens of the present decoding step stand: int64, shape (length,).

    None between steps, so that no forward takes those of the step before.
    """

    now: Tensor | None = None


class _Followed:
    """Stands in for a layer by ``forward``, which runs it, then ``inject``.

    A callable object would do, but torch.compile tells one such from another by its identity, a method by
    the class and the attributes of its object: so what it compiled for one decoder serves the next.
    """

    def __init__(
        self, layer: nn.Module, index: int, inject: Inject, positions: _Positions, found: Layers
    ) -> None:
        self.layer, self.index, self.inject, self.positions = layer, index, inject, positions
        self.layout, self.keyword, self.depth = found.layout, found.keyword, len(found.order)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = as_call(args, kwargs, self.keyword)
        if self.index == 1:
            hidden = self._inject(0, hidden)
        output = self.layer(hidden, *args, **kwargs)
        state = self._inject(self.index, as_tuple(output)[0])
        if self.index == self.depth:
            self.positions.now = None
        return state if isinstance(output, Tensor) else (state, *output[1:])

    def _inject(self, layer: int, hidden: Tensor) -> Tensor:
        now = self.positions.now
        if now is None:
            raise ValueError(
                "this model decodes step by step and must know where its tokens stand: call its "
                "prepare_inputs_for_generation before each forward, as transformers' generate does"
            )
        state = self.layout.to_tower(hidden)
        state = self.inject(layer, state, now[-state.shape[1] :])
        return self.layout.to_model(state)


def _length_so_far(input_ids: Tensor, length: int, inputs: dict[str, Any]) -> int:
    """Return how many tokens a row has after a decoding step, whatever of them ``generate`` passes on.

    A mask of ones it drops; chunks of a prompt come alone, after what the cache holds.
    """
    mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
    if mask is not None:
        return int(mask.shape[1])
    if cache is None or inputs.get("next_sequence_length") is not None:
        return input_ids.shape[1]
    return max(input_ids.shape[1], int(cache.get_seq_length()) + length)
