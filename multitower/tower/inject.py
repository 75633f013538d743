"""What is done between the layers of a tower while it decodes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Inject = Callable[[int, Tensor, Tensor], Tensor]
"""Called with (layer, state after it, positions); gives the state to go on with.

Layer 0 is the embedding. The state has shape (batch, length of this call, width); the positions, int64 of
shape (length of this call,), say where in their rows the tokens of this call stand.
"""
