"""Tiny random towers and models for tests and documentation, without downloads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..declare.graph import FusionGraph
from ..model import FusedModel
from ..tower import Tower


class TinyLayer(nn.Module):
    """Causal attention with one head, and a feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the layer on states of shape (batch, length, width)."""
        query, key, value = self.attention(self.norm(x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        output: Tensor = x + self.out(self.ffn(x))
        return output


class TinyTower(Tower):
    """A small causal decoder in plain PyTorch: BOS is 1, EOS is 2, padding is 0."""

    begin = 1
    end = (2,)
    packs = True

    def __init__(self, depth: int, width: int, vocab_size: int) -> None:
        super().__init__()
        self.depth, self.width, self.vocab_size = depth, width, vocab_size
        self.table = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(TinyLayer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def embed(self, tokens: Tensor, *, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Look up the embeddings; with positions, also return a mask that separates examples."""
        if positions is None:
            return self.table(tokens), None
        examples = (positions == 0).cumsum(1)
        return self.table(tokens), (examples[:, :, None] == examples[:, None]).tril()

    def layer(self, index: int, hidden: Tensor, context: Tensor | None) -> Tensor:
        """Run one layer."""
        output: Tensor = self.layers[index - 1](hidden, context)
        return output

    def head(self, hidden: Tensor, context: Tensor | None) -> Tensor:
        """Compute logits with the tied embedding table."""
        logits: Tensor = self.norm(hidden) @ self.table.weight.T
        return logits


def tiny_tower(seed: int = 0, *, depth: int = 2, width: int = 8, vocab_size: int = 16) -> TinyTower:
    """Return a random tower, determined by the seed.

    >>> tiny_tower(seed=3, depth=4).depth
    4
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyTower(depth, width, vocab_size).eval()


def tiny_model(seed: int = 0) -> FusedModel:
    """Return a model of two random towers, "speech" (trained) and "text" (frozen), linked in both directions.

    >>> [str(link) for link in tiny_model().graph.links]
    ['speech->text', 'text->speech']
    """
    graph = FusionGraph()
    graph.add_tower("speech", tiny_tower(2 * seed, depth=3, width=12), train="all")
    graph.add_tower("text", tiny_tower(2 * seed + 1, depth=2, width=8))
    graph.add_link("speech", "text", interleave=1)
    graph.add_link("text", "speech", interleave=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return graph.compile()


def open_links(model: FusedModel, seed: int = 0, *, scale: float = 1.0) -> FusedModel:
    """Make links and input adapters contribute, as training would; return the same model.

    >>> open_links(tiny_model()).is_open("speech->text")
    True

    Parameters that are zero at the start get random values, of about the size of torch's default
    initialisation; ``scale=0.0`` resets them to zero.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = [module for link in model.links.values() for module in link.values()]  # type: ignore[operator]  # ModuleDicts
    with torch.no_grad():
        for module in (*model.adapters.values(), *modules):
            for parameter in module.zero_at_start():
                size = scale / parameter.shape[-1] ** 0.5
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model
