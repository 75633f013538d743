"""Towers that each break one promise of ``check_tower``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from broken import Breakages
from multitower.testing import TinyTower
from multitower.tower.shell import Inject

BROKEN = Breakages()


@BROKEN.of("causality", "the logits before token 1 change with the tokens from there on")
class Leaks(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, context) + 1e-3 * hidden.mean(1, keepdim=True)


@BROKEN.of("causality", "the logits before token 1 change with the tokens from there on")
@BROKEN.of("packing", r"embed\(tokens, positions=positions\), .* fails with TypeError")
class LeaksOneToken(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens) + 0.1 * self.table(tokens.roll(-1, 1)), None


@BROKEN.of("rows", "a row alone, without what follows, is scored otherwise")
class SeesItsLength(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        places = torch.arange(tokens.shape[1]) / tokens.shape[1]
        return self.table(tokens) + torch.outer(places, torch.arange(8.0)).to(self.table.weight), None


@BROKEN.of("rows", "a row alone, without what follows, is scored otherwise", alone=True)
class MixesRows(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, context) + 0.01 * hidden.mean(0)


@BROKEN.of("shapes", "the logits do not depend on the tokens")
class ReadsTheFirstRow(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens[:1]).repeat(len(tokens), 1, 1), None


@BROKEN.of("gradients", "no gradient reaches layers.0.norm.weight, layers.0.norm.bias", alone=True)
class DetachesALayer(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return hidden + (super().layer(index, hidden, context) - hidden).detach()


@BROKEN.of("gradients", "no gradient reaches table.weight, layers.0|no gradient reaches lay")
class RunsWithoutGradients(TinyTower):
    @torch.no_grad()
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, context)


@BROKEN.of("gradients", "no gradient reaches layers.0.norm.weight")
class DetachesTheState(TinyTower):
    def head(self, hidden: Tensor, context: Any) -> Tensor:
        return super().head(hidden.detach(), context)


@BROKEN.of("gradients", "no gradient reaches layers.1.norm.weight.*: is each layer run", alone=True)
class RepeatsLayerOne(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(1, hidden, context)


@BROKEN.of("shapes", "layer 2 of 2 fails with IndexError")
class CountsFromZero(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return self.layers[index](hidden)


@BROKEN.of("shapes", r"embed gives \(2, 5, 8\), expected \(2, 5, 9\)")
class IsOfAnotherWidth(TinyTower):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.width += 1


@BROKEN.of("shapes", r"head gives \(2, 5, 16\), expected \(2, 5, 15\)")
class ScoresMore(TinyTower):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.vocab_size -= 1


@BROKEN.of("shapes", "embed fails with IndexError")
class EmbedsFewer(TinyTower):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.vocab_size += 1


@BROKEN.of("attributes", "vocab_size must be a positive whole number, not None")
class HasNoSizes(TinyTower):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.vocab_size = None


@BROKEN.of("repetition", "something random in eval mode")
class DropsOut(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return nn.functional.dropout(super().layer(index, hidden, context), 0.1)


@BROKEN.of("repetition", "kept from the call before")
class KeepsACount(TinyTower):
    calls = 0

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        self.calls += 1
        return super().layer(index, hidden, context) + 0.001 * self.calls


@BROKEN.of("repetition", "two batches in turns.*keep what layers need in the context")
class KeepsTheContext(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        self.places = 0.1 * torch.arange(tokens.shape[1])[:, None].to(self.table.weight) * len(tokens)
        return super().embed(tokens)

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, context) + self.places[: hidden.shape[1]].mean()


@BROKEN.of("repetition", "a second pass with the same context gives other logits")
class EmptiesTheContext(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens), [1.0, 2.0]

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        return super().layer(index, hidden, None) * (context.pop() if context else 3.0)


@BROKEN.of("shapes", r"layer 1 changes in place the state.*not x \+= \.\.\.")
class ChangesTheState(TinyTower):
    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        output = super().layer(index, hidden, context)
        if not hidden.requires_grad:
            hidden += 1
        return output


@BROKEN.of("shapes", "embed changes the tokens in place")
class ChangesTheTokens(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        hidden = self.table(tokens)
        tokens += 1
        return hidden, None


@BROKEN.of("shapes", r"head_at gives other logits than head \(by")
class ScoresOtherPlaces(TinyTower):
    def head_at(self, hidden: Tensor, context: Any, places: Tensor) -> Tensor:
        return self.head(hidden, context)[:, places - 1]


@BROKEN.of("shapes", r"head_at gives \(2, 1, 16\) for two places")
class ScoresOnePlace(TinyTower):
    def head_at(self, hidden: Tensor, context: Any, places: Tensor) -> Tensor:
        return self.head(hidden, context)[:, places[:1]]


@BROKEN.of("shapes", "is not what embed, layer and head give", alone=True)
class RunsOtherwise(TinyTower):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + 1


@BROKEN.of("packing", "an example in a row with others gets other logits than alone")
class MixesExamples(TinyTower):
    def embed(self, tokens: Tensor, *, positions: Tensor | None = None) -> tuple[Tensor, Any]:
        return super().embed(tokens)


@BROKEN.of("padding", "a row of nothing but zeros.* not finite")
class MasksTokenZero(TinyTower):
    """Masks token 0 as padding, so rows of zeros have nothing to attend to."""

    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens), tokens != 0

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        weights = torch.zeros(context.shape, dtype=hidden.dtype).masked_fill(~context, -torch.inf)
        return super().layer(index, hidden, None) + 0 * weights.softmax(1)[:, :, None]


@BROKEN.of("padding", "zeros on the right change the logits before")
class CountsFromTheRight(TinyTower):
    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        padding = (tokens == 0).sum(1)[:, None, None]
        return self.table(tokens) + (0.1 * padding * torch.arange(8)).to(self.table.weight), None


@BROKEN.of("bfloat16", "RuntimeError", alone=True)
class IsOfOneDtype(TinyTower):
    packs = False

    def embed(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.table(tokens) + torch.zeros(8), None


@BROKEN.of("decoding", r"6 tokens up to position 5 stand at \[1, 2, 3, 4, 5, 6\]", alone=True)
class DecodesElsewhere(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        return super().decoder(lambda layer, state, positions: inject(layer, state, positions + 1))


@BROKEN.of("decoding", "injects after layer 1 where layer 0 is due")
class DecodesWithoutEmbedding(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        return super().decoder(
            lambda layer, state, positions: inject(layer, state, positions) if layer else state
        )


@BROKEN.of("decoding", "injects after layer 2 where layer 0 is due")
class DecodesAnotherLayer(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        return super().decoder(lambda layer, state, positions: inject(2 - layer, state, positions))


@BROKEN.of("decoding", "decoding 6 tokens after 0 of padding differs from a forward")
class DecodesWithoutLinks(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        def ignore(layer: int, state: Tensor, positions: Tensor) -> Tensor:
            inject(layer, state, positions)
            return state

        return super().decoder(ignore)


class Caches(TinyTower):
    """A tiny tower whose layers attend to all earlier tokens, with a decoding cache."""

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


@BROKEN.of("cache", r"embed\(tokens, cache\), a layer or the head fails with TypeError")
class TakesNoCache(TinyTower):
    caches = True


@BROKEN.of("cache", "after 3 tokens the cache holds 0: each layer must hand")
class ForgetsItsCache(Caches):
    def all_of(self, index: int, new: list[Tensor], cache: Any) -> Any:
        return new


@BROKEN.of("cache", "after 3 tokens the cache holds 6: each layer must hand")
class CachesTwice(Caches):
    def all_of(self, index: int, new: list[Tensor], cache: Any) -> Any:
        super().all_of(index, new, cache)
        return super().all_of(index, new, cache)


@BROKEN.of("cache", "1 tokens after 3 in a cache get other logits than without")
class CountsFromTheFirst(Caches):
    def embed(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        places = torch.outer(torch.arange(tokens.shape[1]), torch.arange(8)).to(self.table.weight)
        return self.table(tokens) + 0.1 * places, cache


@BROKEN.of("cache", "3 tokens after 4 in a cache of reordered rows get other logits than without", alone=True)
class MasksFromTheFirst(Caches):
    def mask(self, new: int, total: int) -> Tensor:
        return torch.ones(new, total, dtype=torch.bool).tril() if new > 1 else super().mask(new, total)


@BROKEN.of("cache", "after 4 in a cache of reordered rows get other logits than without", alone=True)
class RemembersElsewhere(Caches):
    def all_of(self, index: int, new: list[Tensor], cache: Any) -> Any:
        if cache is not None:
            cache.update(*new, index - 1)
            kept = cache.__dict__.setdefault("others", {})
            new = [torch.cat(parts, 2) for parts in zip(kept.get(index, []), new, strict=False)] or new
            kept[index] = new
        return new


@BROKEN.of("left padding", "decoding 3 tokens after 3 of padding differs from a forward", alone=True)
class CannotPadLeft(TinyTower):
    def decoder(self, inject: Inject) -> Any:
        decoder = super().decoder(inject)
        forward = decoder.forward
        decoder.forward = lambda input_ids, attention_mask=None, **unused: forward(input_ids)
        return decoder
