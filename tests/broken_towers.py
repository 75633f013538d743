"""Towers that each break one guarantee of ``check_tower``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multitower.testing import TinyTower
from multitower.tower.inject import Inject


class Leaks(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, context) + 1e-3 * hidden.mean(1, keepdim=True)


class LeaksOneToken(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens) + 0.1 * self.table(tokens.roll(-1, 1)), None


class SeesItsLength(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        places = torch.arange(tokens.shape[1]) / tokens.shape[1]
        return self.table(tokens) + torch.outer(places, torch.arange(8.0)).to(self.table.weight), None


class MixesRows(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, context) + 0.01 * hidden.mean(0)


class ReadsTheFirstRow(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens[:1]).repeat(len(tokens), 1, 1), None


class DetachesALayer(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return hidden + (super().layer(index, hidden, context) - hidden).detach()


class RunsWithoutGradients(TinyTower):
    @torch.no_grad()
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, context)


class DetachesTheState(TinyTower):
    def head(self, hidden: Tensor, context: Any) -> Tensor:
        return super().head(hidden.detach(), context)


class RepeatsLayerOne(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(1, hidden, context)


class CountsFromZero(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return self.layers[index](hidden)


class IsOfAnotherWidth(TinyTower):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.width += 1


class ScoresMore(TinyTower):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.vocab_size -= 1


class EmbedsFewer(TinyTower):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.vocab_size += 1


class HasNoSizes(TinyTower):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.vocab_size = None


class DropsOut(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return nn.functional.dropout(super().layer(index, hidden, context), 0.1)


class KeepsACount(TinyTower):
    calls = 0

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        self.calls += 1
        return super().layer(index, hidden, context) + 0.001 * self.calls


class KeepsTheContext(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        self.places = 0.1 * torch.arange(tokens.shape[1])[:, None].to(self.table.weight) * len(tokens)
        return super().embed(tokens)

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, context) + self.places[: hidden.shape[1]].mean()


class EmptiesTheContext(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens), [1.0, 2.0]

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, None) * (context.pop() if context else 3.0)


class ChangesTheState(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        output = super().layer(index, hidden, context)
        if not hidden.requires_grad:
            hidden += 1
        return output


class ChangesTheTokens(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        hidden = self.table(tokens)
        tokens += 1
        return hidden, None


class ScoresOtherPlaces(TinyTower):
    def head_at(self, hidden: Tensor, context: Any, places: Tensor) -> Tensor:
        return self.head(hidden, context)[:, places - 1]


class ScoresOnePlace(TinyTower):
    def head_at(self, hidden: Tensor, context: Any, places: Tensor) -> Tensor:
        return self.head(hidden, context)[:, places[:1]]


class RunsOtherwise(TinyTower):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 1


class MixesExamples(TinyTower):
    def embed(self, tokens: Tensor, *, positions: Tensor | None = None) -> tuple[Tensor, Any]:
        return super().embed(tokens)


class MasksTokenZero(TinyTower):
    """Takes token 0 for padding: rows of nothing else have no one to attend to."""

    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens), tokens != 0

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        weights = torch.zeros(context.shape, dtype=hidden.dtype).masked_fill(~context, -torch.inf)
        return super().layer(index, hidden, None) + 0 * weights.softmax(1)[:, :, None]


class CountsFromTheRight(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        padding = (tokens == 0).sum(1)[:, None, None]
        return self.table(tokens) + (0.1 * padding * torch.arange(8)).to(self.table.weight), None


class IsOfOneDtype(TinyTower):
    packs = False

    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens) + torch.zeros(8), None


class DecodesElsewhere(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        return super().decoder(lambda layer, state, positions: inject(layer, state, positions + 1))


class DecodesWithoutEmbedding(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        return super().decoder(
            lambda layer, state, positions: inject(layer, state, positions) if layer else state
        )


class DecodesAnotherLayer(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        return super().decoder(lambda layer, state, positions: inject(2 - layer, state, positions))


class DecodesWithoutLinks(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        def ignore(layer: int, state: Tensor, positions: Tensor) -> Tensor:
            inject(layer, state, positions)
            return state

        return super().decoder(ignore)


class Caches(TinyTower):
    """A tiny tower that decodes with a cache, and so only attends to all that came before."""

    caches, packs = True, False

    def embed(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        return self.table(tokens), cache

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        layer = self.layers[index - 1]
        query, *new = (part[:, None] for part in layer.attention(layer.norm(hidden)).chunk(3, dim=-1))
        keys, values = self.all_of(index, new, context)
        attended = nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=self.mask(query.shape[2], keys.shape[2])
        )
        x = hidden + attended[:, 0]
        return x + layer.out(layer.ffn(x))

    def all_of(self, index: int, new: list[Tensor], cache: Any) -> Any:
        return new if cache is None else cache.update(*new, index - 1)

    def mask(self, new: int, total: int) -> Tensor:
        return torch.ones(new, total, dtype=torch.bool).tril(total - new)


class TakesNoCache(TinyTower):
    caches = True


class ForgetsItsCache(Caches):
    def all_of(self, index: int, new: list[Tensor], cache: Any) -> Any:
        return new


class CachesTwice(Caches):
    def all_of(self, index: int, new: list[Tensor], cache: Any) -> Any:
        super().all_of(index, new, cache)
        return super().all_of(index, new, cache)


class CountsFromTheFirst(Caches):
    def embed(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        places = torch.outer(torch.arange(tokens.shape[1]), torch.arange(8)).to(self.table.weight)
        return self.table(tokens) + 0.1 * places, cache


class MasksFromTheFirst(Caches):
    def mask(self, new: int, total: int) -> Tensor:
        return torch.ones(new, total, dtype=torch.bool).tril() if new > 1 else super().mask(new, total)


class RemembersElsewhere(Caches):
    def all_of(self, index: int, new: list[Tensor], cache: Any) -> Any:
        if cache is not None:
            cache.update(*new, index - 1)
            kept = cache.__dict__.setdefault("others", {})
            new = [torch.cat(parts, 2) for parts in zip(kept.get(index, []), new, strict=False)] or new
            kept[index] = new
        return new


class CannotPadLeft(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        decoder = super().decoder(inject)
        forward = decoder.forward
        decoder.forward = lambda input_ids, attention_mask=None, **unused: forward(input_ids)
        return decoder
