"""Models and batches that the tests share."""

from __future__ import annotations

import torch
from torch import nn

import multitower as mt
from multitower.testing import open_links, tiny_tower

BEGIN, END = 1, 2
"""The begin and end tokens of all tiny towers; padding is 0, so the three differ."""

transformers_families = ("llama", "gpt2", "qwen3", "gemma3_text", "bloom", "phi3")


def causal_lm(
    family: str,
    *,
    width: int = 16,
    depth: int = 2,
    vocab_size: int = 20,
    seed: int = 0,
    config: dict | None = None,
) -> nn.Module:
    """Return a tiny random transformers model; ``config`` adds to its config."""
    import transformers

    default = transformers.AutoConfig.for_model(family)
    common = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": None,
    }
    if hasattr(default, "num_key_value_heads"):
        common |= {"num_key_value_heads": 1, "intermediate_size": 2 * width}
    if hasattr(default, "head_dim"):
        common["head_dim"] = width // 2
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **common, **(config or {}))
    ).eval()


def pair(
    text: nn.Module | None = None,
    speech: nn.Module | None = None,
    *,
    train: str = "none",
    gates: bool = False,
    position: str | None = None,
    window: int | None = None,
) -> mt.FusedModel:
    """Link speech and text, of different width and depth, in both directions as in Zipper."""
    graph = mt.FusionGraph()
    speech = speech or tiny_tower(1, depth=4, width=12, vocab_size=14)
    graph.add_tower("speech", speech, train=train, adapter="gated")
    graph.add_tower("text", text or tiny_tower(2, depth=2, width=8, vocab_size=20), adapter="gated")
    link = {"gate": "tanh", "projection": "mlp", "feed_forward": True, "position": position, "window": window}
    pace = 2.5 if position == "segment" else 1.0
    graph.add_link("speech", "text", interleave=(2, 1), pace=pace, **link)
    graph.add_link("text", "speech", interleave=(1, 2), pace=1 / pace, **link)
    torch.manual_seed(5)
    model = graph.compile().eval()
    return open_links(model, seed=7) if gates else model


def segment(tower: str, *tokens: int, target: bool = False) -> mt.Segment:
    return mt.Segment(tower, [BEGIN, *tokens, END], target=target)


EXAMPLES = [
    [segment("speech", 5, 6, 7, 8), segment("text", 9, 3, target=True)],
    [segment("text", 4, 5, 6, 7, 8), segment("speech", 9, 3, 2, target=True), segment("text", 2)],
    [segment("text", 11, target=True)],
]
