"""Two transformers decoders joined by forward hooks: the fusion without this library.

    from hook_version import Hooked
    joined = Hooked(source, target, taps=[(2, 2), (4, 4)])
    loss = joined(source_tokens, target_tokens, labels=target_tokens)
    joined.generate(source_tokens, prompt, max_new_tokens=100)

The source runs without autograd, and its states are stored. Hooks on layers of the target attend to them, in
training and in the target's own ``generate`` with its cache. Both towers are frozen. Taps have the modules,
names and shapes of ``multitower.link.GatedCrossAttention``, so weights can be copied. The source precedes the
target; padding is on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Gated cross-attention and a gated feed-forward."""

    def __init__(self, source_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.source_norm = nn.LayerNorm(source_width)
        self.project = nn.Sequential(
            nn.Linear(source_width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
        )
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.ffn_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Return the target's state after the tap.

        Args:
            x: The target's state, shape (batch, length, width).
            source: The source's state, shape (batch, source length, source width).
            mask: bool, shape (batch, 1, 1, source length), False at padding; None without padding.
        """
        states = self.project(self.source_norm(source))
        query, keys, values = (
            each.view(*each.shape[:2], self.heads, -1).transpose(1, 2)
            for each in (self.query(self.norm(x)), self.key(states), self.value(states))
        )
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        attended = attended.transpose(1, 2).reshape(x.shape)
        x = x + torch.tanh(self.attention_gate) * self.out(attended)
        return x + torch.tanh(self.ffn_gate) * self.ffn(self.ffn_norm(x))


class Hooked(nn.Module):
    """A target whose layers read a source by hooks.

    Args:
        source: A transformers causal LM with layers in ``model.layers``.
        target: Another.
        taps: Pairs (source layer, target layer), counted from 1; the tap runs after the target layer.
        heads: Heads per tap.
        careful: Whether to skip unneeded work: the source's head, and padding masks without effect.
            Otherwise, the models are called in the usual way.
    """

    def __init__(
        self,
        source: Any,
        target: Any,
        taps: Sequence[tuple[int, int]],
        heads: int,
        *,
        careful: bool = False,
    ) -> None:
        super().__init__()
        self.careful = careful
        self.source = source.requires_grad_(False).eval()
        self.target = target.requires_grad_(False).eval()
        widths = source.config.hidden_size, target.config.hidden_size
        self.taps = nn.ModuleList(CrossAttention(*widths, heads) for _ in taps)
        self.states: dict[int, Tensor] = {}
        self.mask: Tensor | None = None
        for place, (read, layer) in enumerate(taps):
            source.model.layers[read - 1].register_forward_hook(self._keep(place))
            target.model.layers[layer - 1].register_forward_hook(self._add(place))

    def forward(
        self, source: Tensor, tokens: Tensor, labels: Tensor, source_mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss of the target's labels.

        Args:
            source: int64, shape (batch, source length).
            tokens: int64, shape (batch, length).
            labels: The tokens, -100 at padding.
            source_mask: bool, shape (batch, source length): False at padding.
        """
        self.read(source, source_mask)
        masks = {} if source_mask is None or self.careful else {"attention_mask": (labels >= 0).long()}
        loss: Tensor = self.target(input_ids=tokens, labels=labels, use_cache=False, **masks).loss
        return loss

    @torch.no_grad()
    def generate(self, source: Tensor, prompt: Tensor, **options: Any) -> Tensor:
        """Decode with the target's own ``generate``."""
        self.read(source)
        tokens: Tensor = self.target.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return tokens

    @torch.no_grad()
    def read(self, source: Tensor, mask: Tensor | None = None) -> None:
        """Run the source; hooks store its states."""
        self.mask = None if mask is None else mask[:, None, None]
        model = self.source.model if self.careful else self.source
        masks = {} if mask is None or self.careful else {"attention_mask": mask.long()}
        model(input_ids=source, use_cache=False, **masks)

    def _keep(self, place: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.states[place] = output[0] if isinstance(output, tuple) else output

        return hook

    def _add(self, place: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            state = self.taps[place](state, self.states[place], self.mask)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return hook
