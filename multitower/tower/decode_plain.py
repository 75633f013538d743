"""Decoding of towers that are not from transformers, with transformers' ``generate``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..base.extras import require
from .decode_transformers import FOR_SPEED
from .shell import Inject

transformers: Any = require("transformers", "transformers")


class _Decoder(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc]  # known only when it runs
    """A minimal causal LM around a tower, for ``generate``."""

    config_class = transformers.PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, tower: Any, inject: Inject) -> None:
        super().__init__(transformers.PretrainedConfig())
        self.config.vocab_size = tower.vocab_size
        self.config.num_hidden_layers = tower.depth
        self.config.max_position_embeddings = tower.max_length
        own = getattr(tower.native, "generation_config", None)
        self.generation_config = transformers.GenerationConfig() if own is None else copy.deepcopy(own)
        self.tower: Any = tower
        self.inject = inject


class CachedDecoder(_Decoder):
    """Decodes a tower with ``caches``: each step runs only new tokens."""

    def generate(self, inputs: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Decode as transformers does; all rows must have the same length."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                f"{type(self.tower).__name__} decodes with a cache, where padding has no place; decode rows "
                "of unlike length one length after the other"
            )
        return super().generate(inputs, attention_mask=attention_mask, **options)

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None, **unused: Any
    ) -> Any:
        """Return the logits of tokens that follow those in the cache."""
        cache = transformers.DynamicCache(config=self.config) if past_key_values is None else past_key_values
        if not isinstance(cache, transformers.DynamicCache):
            raise ValueError(
                f"{type(self.tower).__name__} decodes with a DynamicCache, not with a "
                f"{type(cache).__name__}; leave cache_implementation out"
            )
        start = int(cache.get_seq_length())
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        hidden, context = self.tower.embed(input_ids, cache)
        hidden = self.inject(0, hidden, positions)
        for index in range(1, self.tower.depth + 1):
            hidden = self.inject(index, self.tower.layer(index, hidden, context), positions)
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=self.tower.head(hidden, context), past_key_values=past_key_values
        )


class UncachedDecoder(_Decoder):
    """Decodes any tower; each step runs the whole sequence."""

    def __init__(self, tower: Any, inject: Inject) -> None:
        super().__init__(tower, inject)
        self.config.use_cache = False
        self.generation_config.use_cache = False
        for key in FOR_SPEED:
            setattr(self.generation_config, key, None)

    def generate(self, inputs: Tensor, **options: Any) -> Any:
        """Decode as transformers does, but refuse ``use_cache``, with which it would pass only new tokens."""
        if options.get("use_cache") or getattr(options.get("generation_config"), "use_cache", None):
            raise ValueError(
                f"{type(self.tower.native).__name__} decodes without a cache, each step from the first "
                "token; leave use_cache out"
            )
        return super().generate(inputs, **options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> Any:
        """Return the logits of left-padded rows, which are shifted to right padding for the tower."""
        length = input_ids.shape[1]
        padding = torch.zeros_like(input_ids[:, :1])
        if attention_mask is not None:
            padding = length - attention_mask.sum(1, keepdim=True)
        places = torch.arange(length, device=input_ids.device)
        to_right = (places + padding) % length
        to_left = (places - padding) % length
        hidden, context = self.tower.embed(input_ids.gather(1, to_right))
        for index in range(self.tower.depth + 1):
            if index:
                hidden = self.tower.layer(index, hidden, context)
            hidden = _rows(self.inject(index, _rows(hidden, to_left), places), to_right)
        logits = _rows(self.tower.head(hidden, context), to_left)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def _rows(states: Tensor, places: Tensor) -> Tensor:
    return states.gather(1, places[:, :, None].expand(-1, -1, states.shape[-1]))
