"""A tower to check, and how to run it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...tower import Tower, TransformersTower
from ..compare import assert_close, tolerance

Logits = Callable[[nn.Module, Tensor], Tensor]
"""From a model and tokens of shape (batch, length) to logits of shape (batch, length, vocab_size)."""


class TowerCase(NamedTuple):
    """A tower to check, and how to get its original model's logits."""

    tower: Tower
    own: Logits | None

    @property
    def has_native(self) -> bool:
        """Whether the tower was made from another model."""
        return self.tower.native is not self.tower

    def native(self, tokens: Tensor) -> Tensor:
        """Return the logits of the original model."""
        model: Any = self.tower.native
        if self.own is not None:
            return self.own(model, tokens)
        if isinstance(self.tower, TransformersTower):
            output = model(input_ids=tokens, use_cache=False)
        else:
            output = model(tokens)
        logits: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        return logits

    def copy(self) -> TowerCase:
        """Copy the tower and the model."""
        return self._replace(tower=copy.deepcopy(self.tower))

    def tokens(self, rows: int, length: int) -> Tensor:
        """Return random tokens that include the first and the last one of the vocabulary."""
        size = self.tower.vocab_size
        generator = torch.Generator().manual_seed(rows + length)
        tokens = torch.randint(size, (rows, length), generator=generator)
        tokens[0, :2] = torch.tensor([size - 1, 0])[:length]
        return tokens.to(self.tower.device)

    def run(self, tokens: Tensor, *cache: Any, **positions: Tensor) -> Tensor:
        """Run the tower layer by layer, with additional arguments for ``embed``."""
        tower: Any = self.tower
        hidden, context = tower.embed(tokens, *cache, **positions)
        hidden = self.tower.run_layers(hidden, context)
        return self.tower.head(hidden, context)


def assert_alike(found: Tensor, expected: Tensor, what: str) -> None:
    """Compare logits up to rounding, in float32 or coarser, because many models compute parts in float32."""
    within = max(tolerance(torch.float32), tolerance(expected.dtype))
    assert_close(found, expected, what, within, least=0.0)
