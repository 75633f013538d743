"""Fuse decoders that are not from transformers: one in plain PyTorch, one from x-transformers.

A tower has three methods: what the decoder does before its layers, one layer, and what it does after them.
Here, two decoders are pretrained on different languages, letters and signs, and then frozen. Links between
them learn from pairs which sign each letter means:

    python examples/custom_tower.py
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import DynamicCache
from x_transformers import Decoder, TransformerWrapper
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import LayerIntermediates, ShiftTokens

import multitower as mt
from multitower.testing import check_tower

BEGIN, END = 0, 1
LETTERS, SIGNS = "abcdefghijkl", "αβγδεζηθικλμ"
SYMBOLS = len(LETTERS)
VOCABULARY = 2 + SYMBOLS


class Block(nn.Module):
    """Causal attention and a feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: DynamicCache | None = None, place: int = 0) -> Tensor:
        query, keys, values = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        if cache is not None:
            keys, values = cache.update(keys, values, place)
        causal = causal_lower_right(query.shape[2], keys.shape[2])
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


class GPT(nn.Module):
    """A small decoder with learned positions, as an example of your own model."""

    def __init__(self, *, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.unembed = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.norm(x))


class GPTTower(mt.Tower):
    """The same decoder as a tower: its forward, split into methods.

    ``native`` is optional: ``check_tower`` compares the tower with it, and ``unimodal`` returns it. So is
    ``caches``: without it, every decoding step runs all tokens again.
    """

    begin, end = BEGIN, (END,)
    caches = True

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        self.depth, self.width = len(model.blocks), model.tokens.embedding_dim
        self.vocab_size = model.tokens.num_embeddings
        self.max_length = self.hard_limit = model.positions.num_embeddings

    @property
    def native(self) -> nn.Module:
        return self.model

    def embed(self, tokens: Tensor, cache: DynamicCache | None = None) -> tuple[Tensor, DynamicCache | None]:
        before = 0 if cache is None else cache.get_seq_length()
        positions = self.model.positions.weight[before : before + tokens.shape[1]]
        return self.model.tokens(tokens) + positions, cache

    def layer(self, index: int, hidden: Tensor, cache: DynamicCache | None) -> Tensor:
        return self.model.blocks[index - 1](hidden, cache, index - 1)

    def head(self, hidden: Tensor, cache: DynamicCache | None) -> Tensor:
        return self.model.unembed(self.model.norm(hidden))


class XTransformersTower(mt.Tower):
    """A decoder from x-transformers as a tower; each attention with its feed-forward is a layer.

    The package's own forward runs a range of layers, including norms, positions and residuals. Options that
    pass other state between layers, or change what happens around them, are refused.
    """

    begin, end = BEGIN, (END,)

    def __init__(self, model: TransformerWrapper) -> None:
        super().__init__()
        self.model = model
        stack = model.attn_layers
        order = stack.layers_execute_order
        size = 1 if stack.has_custom_layer_types else stack.len_default_block
        self.blocks = [order[start : start + size] for start in range(0, len(order), size)]
        self.depth, self.width = len(self.blocks), stack.dim
        self.vocab_size, self.max_length = model.num_tokens, model.max_seq_len or None
        attends_first = any(stack.layer_types[place] == "a" for place in self.blocks[0])
        shifts = any(isinstance(module, ShiftTokens) for module in stack.modules())
        self.caches = model.can_cache_kv and attends_first and not shifts
        self._refuse_what_differs()

    @property
    def native(self) -> nn.Module:
        return self.model

    def embed(self, tokens: Tensor, cache: DynamicCache | None = None) -> tuple[Tensor, DynamicCache | None]:
        model, before = self.model, 0 if cache is None else cache.get_seq_length()
        x = model.post_emb_norm(model.token_emb(tokens) + model.pos_emb(tokens, offset=before))
        return model.project_emb(model.emb_dropout(x)), cache

    def layer(self, index: int, hidden: Tensor, cache: DynamicCache | None) -> Tensor:
        before, new = self._before(index, cache), hidden.shape[1]
        _, seen = self.model.attn_layers(
            hidden,
            layers_execute_order=self.blocks[index - 1],
            return_hiddens=True,
            cache=before,
            cache_age=new,
        )
        if cache is not None:
            for each in seen.attn_intermediates:
                cache.update(*(part[:, :, -new:] for part in each.cached_kv), index - 1)
        return seen.layer_hiddens[-1]  # output of the last block, before the final norm

    def head(self, hidden: Tensor, cache: DynamicCache | None) -> Tensor:
        return self.model.to_logits(self.model.attn_layers(hidden, layers_execute_order=()))

    def _before(self, index: int, cache: DynamicCache | None) -> LayerIntermediates | None:
        """Return a layer's cache in the format of x-transformers."""
        if cache is None or not cache.get_seq_length(index - 1):
            return None
        kept = cache.layers[index - 1]
        attention = Intermediates(cached_kv=(kept.keys, kept.values))
        return LayerIntermediates(attn_intermediates=[attention], cache_length=kept.get_seq_length())

    @torch.no_grad()
    def _refuse_what_differs(self) -> None:
        """Compare with the model's forward under perturbed weights: some options have no effect at init."""
        twin = copy.deepcopy(self).eval()
        for parameter in twin.parameters():
            places = torch.arange(parameter.numel(), device=parameter.device)
            parameter.add_(0.1 * torch.sin(places).view_as(parameter))
        tokens = torch.arange(6, device=self.device).expand(2, -1) % self.vocab_size
        tokens = torch.cat([tokens, tokens.new_tensor([[BEGIN], [END]])], dim=1)
        try:
            found, expected = twin(tokens), twin.model(tokens)
        except Exception as error:
            raise mt.errors.TowerError(
                f"this TransformerWrapper cannot be run layer by layer: {error!r}"
            ) from error
        if not torch.equal(found, expected) or self.model.emb_frac_gradient != 1:
            raise mt.errors.TowerError(
                "this TransformerWrapper has an option that carries more than the state from layer to layer "
                "(add_value_residual, residual_attn, unet_skips, ...) or changes what is around the layers "
                "(num_memory_tokens, mixture_of_softmax, emb_frac_gradient, ...)"
            )
        if found.shape[-1] != self.vocab_size:
            raise mt.errors.TowerError(f"it scores {found.shape[-1]} tokens, but embeds {self.vocab_size}")
        if not torch.allclose(found[0, :-1], found[1, :-1], rtol=1e-3, atol=1e-4):
            raise mt.errors.TowerError(
                "this TransformerWrapper is not causal: earlier logits see the last token"
            )


def phrases(count: int, length: int = 8) -> Tensor:
    """Draw phrases of letters, each with two possible successors: shape (count, length + 2)."""
    symbols = [torch.randint(SYMBOLS, (count,))]
    for _ in range(length - 1):
        symbols.append((symbols[-1] * 5 + 3 + torch.randint(2, (count,))) % SYMBOLS)
    return F.pad(F.pad(torch.stack(symbols, dim=1) + 2, (1, 0), value=BEGIN), (0, 1), value=END)


def translated(letters: Tensor) -> Tensor:
    """Translate phrases of letters to signs."""
    meaning = torch.randperm(SYMBOLS, generator=torch.Generator().manual_seed(7)) + 2
    return torch.cat([torch.tensor([BEGIN, END]), meaning])[letters]


def pretrain(model: nn.Module, corpus: Tensor, steps: int, batch: int = 64) -> float:
    """Pretrain a decoder on its language; return the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = corpus[torch.randint(len(corpus), (batch,))]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def fuse(letters: mt.Tower, signs: mt.Tower) -> mt.FusedModel:
    """Link two frozen towers in both directions."""
    graph = mt.FusionGraph()
    graph.add_tower("letters", letters)
    graph.add_tower("signs", signs)
    graph.add_link("letters", "signs", interleave=1)
    graph.add_link("signs", "letters", interleave=1)
    return graph.compile()


def examples(letters: Tensor) -> list[list[mt.Segment]]:
    """Pair phrases with their translations, half of them in the opposite direction."""
    pairs = list(zip(letters, translated(letters), strict=True))
    half = len(pairs) // 2
    return [
        *(
            [mt.Segment("letters", one), mt.Segment("signs", other, target=True)]
            for one, other in pairs[:half]
        ),
        *(
            [mt.Segment("signs", other), mt.Segment("letters", one, target=True)]
            for one, other in pairs[half:]
        ),
    ]


def train(model: mt.FusedModel, steps: int, batch: int = 64) -> None:
    """Train the links."""
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=2e-3))
    model.train()
    for _ in range(steps):
        loss = model(**mt.collate(examples(phrases(batch)))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def losses(model: mt.FusedModel) -> str:
    found = model(**mt.collate(examples(phrases(256)))).losses
    return ", ".join(f"{name} {loss:.3f}" for name, loss in found.items())


def read(tokens: Tensor, alphabet: str) -> str:
    return "".join(alphabet[token - 2] for token in tokens.tolist() if token > END)


def towers() -> tuple[GPTTower, XTransformersTower]:
    letters = GPT(vocabulary=VOCABULARY, length=32, width=48, depth=2, heads=4)
    layers = Decoder(dim=64, depth=3, heads=4, attn_dim_head=16, rotary_pos_emb=True, verbose=False)
    signs = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=32, attn_layers=layers)
    return GPTTower(letters.eval()), XTransformersTower(signs.eval())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=120, help="of training, for each decoder and for the links"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    letters, signs = towers()
    for tower in (letters, signs):
        check_tower(tower)
    corpus = phrases(4096)
    print(f"letters, alone: loss {pretrain(letters.model, corpus, options.steps):.3f}")
    print(f"signs, alone: loss {pretrain(signs.model, translated(corpus), options.steps):.3f}")

    model = fuse(letters, signs)
    print(f"fused, before training: {losses(model)}")
    train(model, options.steps)
    print(f"fused, links trained: {losses(model)}")

    phrase = phrases(1)[0]
    given = [mt.Segment("letters", phrase)]
    ((answer,),) = model.generate([given], output=["signs"], num_beams=2)
    print(f"in letters: {read(phrase, LETTERS)}")
    print(f"meant by it: {read(translated(phrase), SIGNS)}")
    print(f"read as signs: {read(answer.tokens, SIGNS)}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/fused")
        fresh = dict(zip(("letters", "signs"), towers(), strict=True))
        again = mt.FusedModel.from_pretrained(f"{folder}/fused", towers=fresh)
    ((same,),) = again.generate([given], output=["signs"], num_beams=2)
    print(f"saved and loaded: {read(same.tokens, SIGNS)}")


if __name__ == "__main__":
    main()
