"""Models with peft adapters that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

import multitower as mt
from models import EXAMPLES, causal_lm
from multitower.testing import open_links

CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules={"v_proj", "q_proj"}, task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(use_dora=True, use_rslora=True, target_modules="all-linear"),
    "bias": lambda: peft.LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    "head": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding": lambda: peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "tokens": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[2, 3]),
    "layers": lambda: peft.LoraConfig(
        target_modules=["q_proj"], layers_to_transform=[1], rank_pattern={"q_proj": 2}
    ),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj", "down_proj"]),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj", "down_proj"]),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "vera unsaved": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, save_projection=False),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "vblora": lambda: peft.VBLoRAConfig(target_modules=["q_proj"], vector_length=4, num_vectors=8, topk=2),
}


def fused(text: Any, train: Any = "lora", *, trained: bool = True) -> mt.FusedModel:
    """Fuse a frozen speech tower with a text tower; with ``trained``, open gates and randomise adapters."""
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("gpt2", width=12, depth=4, vocab_size=14, seed=5))
    graph.add_tower("text", text, train=train)
    graph.add_link("speech", "text", interleave=(2, 1))
    graph.add_link("text", "speech", interleave=(1, 2))
    torch.manual_seed(5)
    model = graph.compile().eval()
    return randomise(open_links(model, seed=7)) if trained else model


def randomise(model: mt.FusedModel) -> mt.FusedModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.tower("text").parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: mt.FusedModel) -> dict[str, torch.Tensor]:
    return model(**mt.collate(EXAMPLES)).logits


def assert_same(model: mt.FusedModel, again: mt.FusedModel) -> None:
    for name, expected in logits(model).items():
        assert torch.equal(logits(again)[name], expected), name


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def ready() -> nn.Module:
    model: nn.Module = peft.get_peft_model(causal_lm("llama"), peft.LoraConfig())
    return model
