"""Whether a transformers model goes on from the keys and values of an earlier call as if there were one."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..base.extras import require
from .probe import LENGTH, evaluated, forward_options, logits_of, probe_tokens, rounding

STEPS = 2
"""How many tokens are decoded after a kept cache, to see whether it is right."""


class Resumable(Protocol):
    """What the question is asked of: a tower made of a transformers model."""

    model: Any
    depth: int

    def resume(self, tokens: Tensor, cache: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Embed tokens that come after those in a cache."""

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        """Run a layer."""

    def head(self, hidden: Tensor, context: Any) -> Tensor:
        """Return logits."""


@torch.no_grad()
def why_not_resumed(tower: Resumable, *, padding: int = 0) -> str:
    """Return how tokens run after a cache differ from all tokens run at once; empty if not at all.

    Tokens are run in two pieces, layer by layer, and then ``generate`` goes on from what they left.

    Args:
        tower: The tower.
        padding: How many tokens of padding stand on the left of one of two rows.
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
                for index in range(1, tower.depth + 1):
                    hidden = tower.layer(index, hidden, context)
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
    except Exception as error:  # whatever stops it, going on in this way is out of the question
        return f"{type(error).__name__}: {error}"
    found = torch.cat([torch.cat(pieces)[padding:], *(step[:1].to(whole) for step in decoded.logits)])
    expected = torch.cat([whole[:-1], longer])
    worst = (found - expected).abs().max().item()
    return "" if worst <= rounding(expected) else f"its logits differ by {worst:.2g}"


def plain(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of each layer of a cache.

    Raises:
        TypeError: A layer keeps something else.
    """
    layer_type = require("transformers", "transformers").cache_utils.DynamicLayer
    for layer in cache.layers:
        if type(layer) is not layer_type or not layer.is_initialized:
            raise TypeError(f"a layer of its cache is a {type(layer).__name__}, not keys and values alone")
    return [(layer.keys, layer.values) for layer in cache.layers]
