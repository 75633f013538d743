"""The interface of a tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .shell import Inject


class Tower(nn.Module, ABC):
    """A causal decoder that can be run one layer at a time.

    >>> import torch, multitower as mt
    >>> from torch import nn
    >>> class Bag(mt.Tower):
    ...     depth, width, vocab_size, begin, end = 2, 8, 10, 0, (1,)
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.table = nn.Embedding(10, 8)
    ...         self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    ...     def embed(self, tokens):
    ...         return self.table(tokens), None
    ...     def layer(self, index, hidden, context):
    ...         return hidden + self.layers[index - 1](hidden).cumsum(1)
    ...     def head(self, hidden, context):
    ...         return hidden @ self.table.weight.T
    >>> Bag()(torch.tensor([[2, 3, 4]])).shape
    torch.Size([1, 3, 10])

    By default, ``generate`` runs the whole sequence in each step. If ``caches`` is set, it runs only new
    tokens: ``embed(tokens, cache)`` gets transformers' ``DynamicCache`` and passes it to the layers in the
    context. The tokens follow ``cache.get_seq_length()`` earlier ones, and layer ``index`` gets all keys and
    values, of shape (batch, heads, length, head width), from ``cache.update(keys, values, index - 1)``.

    If ``packs`` is set, rows may have several examples: ``embed(tokens, positions=positions)`` gets each
    token's index in its example, int64, shape (batch, length), and layers must not let a token attend to
    another example's. Padding counts as one more example.

    Subclasses set the attributes and implement ``embed``, ``layer`` and ``head``. Streams are padded on the
    right, so a causal tower needs no padding mask.

    Attributes:
        depth: Number of layers.
        width: Width of the state between layers.
        vocab_size: Number of token ids that ``head`` scores.
        begin: The BOS id, which starts a segment; None if ``generate`` cannot start one.
        end: The EOS ids; empty if there are none.
        max_length: Length of a row at which ``generate`` stops; None for no limit.
        hard_limit: Number of positions that the tower has; longer rows raise an error. None if rows of any
            length run, whatever ``max_length`` is.
        caches: Whether ``embed`` takes a cache as its second argument, None by default, and layers use it.
        packs: Whether ``embed`` takes positions, and layers tell packed examples apart by them.
        pads_left: Whether ``decoder`` gives the same results for rows with left padding; otherwise, prompts
            of different lengths are decoded separately. False if ``caches`` is set.
    """

    depth: int
    width: int
    vocab_size: int
    begin: int | None = None
    end: tuple[int, ...] = ()
    max_length: int | None = None
    hard_limit: int | None = None
    caches: bool = False
    packs: bool = False

    @property
    def pads_left(self) -> bool:
        """Whether rows with left padding decode as they do alone; see above."""
        return not self.caches

    @property
    def resumes(self) -> bool:
        """Whether ``resume`` can continue from the keys and values of an earlier call."""
        return self.caches

    @abstractmethod
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return the input of layer 1, shape (batch, length, width), and a context for the layers.

        Args:
            tokens: int64, shape (batch, length).

        Returns:
            The state, and a context (masks, rotary tables, ...) that is passed to ``layer`` and ``head``.
        """

    def resume(self, tokens: Tensor, cache: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Embed tokens that follow those in a cache, which the layers then extend; see ``embed``.

        Args:
            tokens: int64, shape (batch, length).
            cache: A ``DynamicCache`` of transformers, which may be empty. Towers made from transformers
                models also take static ones.
            mask: False at padding, for the tokens in the cache and the new ones, bool, shape (batch, length
                of both, or length of a static cache). None if there is no padding, or only on the right and
                within the tower's positions.

        Raises:
            ValueError: A mask is given, but the tower does not support left padding.
        """
        if mask is not None:
            raise ValueError(
                f"{type(self).__name__} can continue only from caches whose rows have the same length"
            )
        embedded: tuple[Tensor, Any] = self.embed(tokens, cache)  # type: ignore[call-arg]  # by those that set caches
        return embedded

    @abstractmethod
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        """Run layer ``index``, counted from 1."""

    @abstractmethod
    def head(self, hidden: Tensor, context: Any) -> Tensor:
        """Return the logits, shape (batch, length, vocab_size), from the state after the last layer."""

    def head_at(self, hidden: Tensor, context: Any, places: Tensor) -> Tensor:
        """Return the logits of some tokens of each row, shape (batch, number of places, vocab_size).

        By default this computes all logits; override it to skip the others.

        Args:
            hidden: The state of all tokens after the last layer.
            context: The context from ``embed``.
            places: Indices of tokens, int64, shape (number of places,).
        """
        return self.head(hidden, context)[:, places]

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the tower alone: return the logits of tokens of shape (batch, length)."""
        hidden, context = self.embed(tokens)
        return self.head(self.run_layers(hidden, context), context)

    def run_layers(self, hidden: Tensor, context: Any) -> Tensor:
        """Run all layers on the output of ``embed``."""
        for index in range(1, self.depth + 1):
            hidden = self.layer(index, hidden, context)
        return hidden

    @property
    def native(self) -> nn.Module:
        """The original model."""
        return self

    @property
    def device(self) -> torch.device:
        """Device of the tower's input."""
        return next(self.parameters()).device

    def decoder(self, inject: Inject) -> Any:
        """Return a model with transformers' ``generate`` that calls ``inject`` after each layer.

        By default, without ``caches``, each step runs the whole sequence.
        """
        from .decode_plain import CachedDecoder, UncachedDecoder

        return CachedDecoder(self, inject) if self.caches else UncachedDecoder(self, inject)
