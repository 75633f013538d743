"""Decoding of transformers models with their own ``generate`` and cache, calling a hook after each layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .probe import Layers, forward_options
from .shell import Inject, as_call, as_tuple, make_shell, stand_in

FOR_SPEED = ("cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens")
"""Options that change only how fast a tower decodes, not what."""


def make_decoder(model: nn.Module, found: Layers, inject: Inject) -> Any:
    """Return a copy of a model, sharing its parameters, that calls ``inject`` after each layer."""
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
    """Positions of the current step's tokens in their rows, int64, shape (length,).

    None between steps, so that no forward uses those of an earlier step.
    """

    now: Tensor | None = None


class _Followed:
    """Replaces a layer's ``forward``: it runs the layer, then ``inject``.

    A callable object would do, but torch.compile guards on its identity; for a bound method it guards on the
    object's class and attributes. So what was compiled for one decoder serves the next.
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
    """Return the length of a row after a decoding step, from whatever ``generate`` passes on.

    It drops a mask of ones, and passes a chunk of a prompt without the tokens in the cache.
    """
    mask, cache = inputs.get("attention_mask"), inputs.get("past_key_values")
    if mask is not None:
        return int(mask.shape[1])
    if cache is None or inputs.get("next_sequence_length") is not None:
        return input_ids.shape[1]
    return max(input_ids.shape[1], int(cache.get_seq_length()) + length)
