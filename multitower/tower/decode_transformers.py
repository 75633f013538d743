"""Have a transformers model decode by its own generate and cache, with something done after each layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .inject import Inject
from .probe import Layers, evaluated, forward_options, logits_of, probe_tokens, rounding
from .shell import as_call, as_tuple, make_shell, stand_in

FOR_SPEED = ("cache_implementation", "prefill_chunk_size", "prompt_lookup_num_tokens")
"""Settings that change how a tower decodes by itself, not what."""

OF_THE_CACHE = ("cache_config", "cache_implementation", "compile_config", "disable_compile", "use_cache")
"""Settings with which a model is asked how it decodes; what else it has set says nothing of that."""


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


@torch.no_grad()
def why_not_faithful(model: Any, *, length: int, padding: int = 0) -> str:
    """Return how a model's generate, with its cache, differs from its forward; empty if not at all.

    Some families take other positions in one than in the other, cannot tell padding on the left, or begin
    wrongly from prompts that are shorter than their convolutions.

    Args:
        model: A causal LM.
        length: How long the prompts are.
        padding: How many tokens of padding stand on the left of one of two rows.
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
    except Exception as error:  # whatever stops it, decoding in this way is out of the question
        return f"{type(error).__name__}: {error}"
    expected = whole[0, -steps:]
    found = torch.stack([step[0].to(expected.dtype) for step in decoded.logits])
    worst = (found - expected).abs().max().item()
    return "" if worst <= rounding(expected) else f"its logits differ by {worst:.2g}"


def _settings(model: Any) -> set[str]:
    """Name what a model has set for its decoding, of what ``generate`` takes as options."""
    own: Any = getattr(model, "generation_config", None)
    return (
        set() if own is None else set(own.to_diff_dict()) & set(vars(type(own)())) - {"transformers_version"}
    )


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
