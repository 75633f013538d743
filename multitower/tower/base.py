"""What the library asks of a tower."""

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

    Such a tower decodes each step from the first token. One that sets ``caches`` decodes only new tokens:
    ``embed(tokens, cache)`` is then given transformers' ``DynamicCache`` and hands it to the layers in the
    context. The tokens come after ``cache.get_seq_length()`` others, and layer ``index`` gets the keys and
    values of all by ``cache.update(keys, values, index - 1)``, of shape (batch, heads, length, head width).

    One that sets ``packs`` takes rows of several examples: ``embed(tokens, positions=positions)`` is then
    given where in its example each token stands, int64, shape (batch, length), 0 for the first of each, and
    the layers let no token see another example's; padding is one more. Others take padded batches alone.

    Subclasses set the attributes and the three methods. Streams are padded on the right, so a causal
    tower needs no padding mask.

    Attributes:
        depth: Number of layers.
        width: Width of the state between layers.
        vocab_size: Number of token ids that ``head`` scores.
        begin: The id that opens a segment, or None: then the tower cannot start one in ``generate``.
        end: The ids that close a segment; empty when there is none.
        max_length: How many tokens a row may have, where ``generate`` then stops; None without such a limit.
        hard_limit: For how many tokens of a row there are positions; longer ones are refused. None where rows
            of any length run, whatever ``max_length`` says.
        caches: Whether ``embed`` takes a cache as its second argument, None by default, and layers use it.
        packs: Whether ``embed`` takes positions, by which layers tell the examples in a row apart.
        pads_left: Whether ``decoder`` decodes rows with padding on the left as it does each alone; if not,
            prompts of unlike length are decoded one after the other. Towers that set ``caches`` do not.
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
        """Whether rows with padding on the left decode as they do alone; see above."""
        return not self.caches

    @property
    def resumes(self) -> bool:
        """Whether keys and values that a call left can be gone on from by the next, as ``resume`` does."""
        return self.caches

    @abstractmethod
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Return the state that enters layer 1, shape (batch, length, width), and what the layers need.

        Args:
            tokens: int64, shape (batch, length).

        Returns:
            The state, and a context (masks, rotary tables, ...) that is handed to ``layer`` and ``head``.
        """

    def resume(self, tokens: Tensor, cache: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Embed tokens that come after those in a cache, to which the layers add theirs; see ``embed``.

        Args:
            tokens: int64, shape (batch, length).
            cache: A ``DynamicCache`` of transformers; it may be empty. Towers made of a transformers model
                take static ones too.
            mask: Which of the tokens, those in the cache included, are no padding, bool, shape (batch, length
                of both, or that of a static cache). None where none is, or what there is stands on the right
                and has positions.

        Raises:
            ValueError: There is a mask, and the tower does not pad on the left.
        """
        if mask is not None:
            raise ValueError(f"{type(self).__name__} goes on from caches of rows of one length alone")
        embedded: tuple[Tensor, Any] = self.embed(tokens, cache)  # type: ignore[call-arg]  # by those that set caches
        return embedded

    @abstractmethod
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        """Run layer ``index``, counted from 1."""

    @abstractmethod
    def head(self, hidden: Tensor, context: Any) -> Tensor:
        """Return the logits, shape (batch, length, vocab_size), of the state after the last layer."""

    def head_at(self, hidden: Tensor, context: Any, places: Tensor) -> Tensor:
        """Return the logits of some tokens of each row, shape (batch, number of places, vocab_size).

        This default computes all of them; override it where the others can be left out.

        Args:
            hidden: The state after the last layer, of all tokens.
            context: What ``embed`` gave.
            places: Which tokens, int64, shape (number of places,).
        """
        return self.head(hidden, context)[:, places]

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the tower alone: tokens of shape (batch, length) to logits."""
        hidden, context = self.embed(tokens)
        return self.head(self.run_layers(hidden, context), context)

    def run_layers(self, hidden: Tensor, context: Any) -> Tensor:
        """Run all layers, one after the other, on what ``embed`` gave."""
        for index in range(1, self.depth + 1):
            hidden = self.layer(index, hidden, context)
        return hidden

    @property
    def native(self) -> nn.Module:
        """The model as it was before it became a tower."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the tower takes its tokens."""
        return next(self.parameters()).device

    def decoder(self, inject: Inject) -> Any:
        """Return a model with transformers' ``generate`` that runs ``inject`` after each layer.

        This default works for any tower; where it does not have ``caches``, every step is computed from the
        start.
        """
        from .decode_plain import CachedDecoder, UncachedDecoder

        return CachedDecoder(self, inject) if self.caches else UncachedDecoder(self, inject)
