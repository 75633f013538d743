"""Fused models for conversations, and a count of the tokens that they run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import multitower as mt
from models import causal_lm, pair

FAMILIES = ["plain", "llama", "gpt2", "bloom", "mistral", "gemma3_text"]
SLIDING = {"sliding_window": 4}
EXTRA = {
    "mistral": SLIDING,
    "gemma3_text": {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
}


def fusion(kind: str, **options: Any) -> mt.FusedModel:
    if kind == "plain":
        return pair(gates=True, **options)
    speech = causal_lm("llama", depth=4, vocab_size=14, seed=1)
    return pair(causal_lm(kind, config=EXTRA.get(kind)), speech, gates=True, **options)


def lists(decoded: Any) -> list:
    return [
        [[part.tokens.tolist() for part in (each if isinstance(each, tuple) else (each,))] for each in row]
        for row in decoded
    ]


def counted(model: mt.FusedModel) -> Counter:
    """Count the tokens that pass through each layer of each tower."""
    ran: Counter = Counter()
    for name in model.towers:
        for place, layer in enumerate(model.unimodal(name).model.layers, 1):
            key = (name, place)
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, key=key: ran.update(
                    {key: (args[0] if args else kwargs["hidden_states"]).shape[1]}
                ),
                with_kwargs=True,
            )
    return ran
