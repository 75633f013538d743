"""Models of unusual structure: plain modules with the attributes of a transformers causal LM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import multitower as mt

VOCAB_SIZE, WIDTH = 50, 8


class Output(NamedTuple):
    logits: Tensor


class Config:
    vocab_size = VOCAB_SIZE
    bos_token_id, eos_token_id = 0, [1, 2]

    def get_text_config(self, decoder: bool = False) -> Config:
        return self


class Mix(nn.Module):
    """A causal layer: a running sum of a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, dim: int = 1) -> Tensor:
        return hidden_states + self.linear(hidden_states).tanh().cumsum(dim)


class Model(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = Config()
        self.table = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)

    def block(self) -> nn.Module:
        return Mix()

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return Output(self.norm(self.body(self.table(input_ids))) @ self.table.weight.T)


def assert_is_a_tower(model: Model) -> mt.TransformersTower:
    tower = mt.TransformersTower(model)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 5))
    assert torch.equal(tower(tokens), model(tokens).logits)
    return tower


def test_the_plain_model_is_a_tower() -> None:
    tower = assert_is_a_tower(Model())
    assert (tower.depth, tower.width, tower.vocab_size, tower.begin, tower.end) == (3, 8, 50, 0, (1, 2))


def test_a_state_passed_by_keyword() -> None:
    class Keyword(Model):
        def body(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(dim=1, hidden_states=x)
            return x

    assert_is_a_tower(Keyword())


def test_layers_that_hand_on_more_than_a_state() -> None:
    class Carry(Mix):
        def forward(
            self, x: Tensor, before: Tensor | None, other: None = None
        ) -> tuple[Tensor, Tensor, None]:
            x = super().forward(x if before is None else x + before)
            return x, x.sin(), other

    class Carrying(Model):
        def block(self) -> nn.Module:
            return Carry()

        def body(self, x: Tensor) -> Tensor:
            carried = other = None
            for block in self.blocks:
                x, carried, other = block(x, carried, other=other)
            return x + carried

    assert_is_a_tower(Carrying())


def test_length_before_batch() -> None:
    class Turned(Model):
        def body(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1).contiguous()
            for block in self.blocks:
                x = block(x, dim=0)
            return x.transpose(0, 1)

    tower = assert_is_a_tower(Turned())
    assert tower.embed(torch.zeros(2, 5, dtype=torch.int64))[0].shape == (2, 5, WIDTH)


def test_several_residual_streams_are_one_wide_state() -> None:
    class Streams(Model):
        def body(self, x: Tensor) -> Tensor:
            x = torch.stack([x, -x])
            for block in self.blocks:
                x = block(x, dim=2)
            return x.sum(0)

    assert assert_is_a_tower(Streams()).width == 2 * WIDTH


def test_layers_that_never_run_are_no_part_of_the_tower() -> None:
    class Skipping(Model):
        def body(self, x: Tensor) -> Tensor:
            for block in self.blocks[::2]:
                x = block(x)
            return x

    assert assert_is_a_tower(Skipping()).depth == 2


def test_a_layer_that_runs_later_is_refused() -> None:
    class Growing(Model):
        running = 2

        def body(self, x: Tensor) -> Tensor:
            for block in self.blocks[: self.running]:
                x = block(x)
            return x

    model = Growing()
    tower = mt.TransformersTower(model)
    tower._shell.it.model.running = 3
    with pytest.raises(
        mt.errors.TowerError, match="layer 3 runs now, but did not when the model became a tower"
    ):
        tower(torch.zeros(1, 3, dtype=torch.int64))


def test_a_plain_tuple_of_logits() -> None:
    class Tuple(Model):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
            return tuple(super().forward(input_ids))

    tower = mt.TransformersTower(Tuple())
    tokens = torch.randint(0, VOCAB_SIZE, (2, 5))
    assert torch.equal(tower(tokens), tower.native(tokens)[0])


def test_the_mode_of_the_modules_above_the_layers_is_followed() -> None:
    class Noisy(Model):
        def body(self, x: Tensor) -> Tensor:
            return super().body(nn.functional.dropout(x, 0.5, training=self.training))

    model = Noisy().eval()
    tower = mt.TransformersTower(model).train()
    tokens = torch.randint(0, VOCAB_SIZE, (2, 5))
    for _ in range(2):
        torch.manual_seed(1)
        expected = model(tokens).logits
        torch.manual_seed(1)
        assert torch.equal(tower(tokens), expected)
        model.eval()


def refused(model: Model, match: str) -> None:
    with pytest.raises(mt.errors.TowerError, match=match):
        mt.TransformersTower(model)


def test_repeated_layers_are_refused() -> None:
    class Repeating(Model):
        def body(self, x: Tensor) -> Tensor:
            return super().body(super().body(x))

    refused(Repeating(2), r"Repeating runs the layers of 'blocks' in the order \[1, 2, 1, 2\]")


def test_layers_in_another_order_are_refused() -> None:
    class Reversed(Model):
        def body(self, x: Tensor) -> Tensor:
            for block in reversed(self.blocks):
                x = block(x)
            return x

    refused(Reversed(), r"in the order \[3, 2, 1\]")


def test_a_state_changed_between_layers_is_refused() -> None:
    class Between(Model):
        def body(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            return self.blocks[1](x / 2)

    refused(Between(2), "changes the state between its layers 1 and 2 of 'blocks'")


def test_arguments_made_of_what_layers_gave_are_refused() -> None:
    class Residual(Model):
        def body(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                last, x = x, block(x)
            return x + last

    refused(Residual(), "other logits than its own forward")


def test_a_bidirectional_model_is_refused() -> None:
    class Bidirectional(Model):
        def body(self, x: Tensor) -> Tensor:
            return super().body(x.flip(1)).flip(1)

    refused(Bidirectional(), r"is not causal.*is_decoder=True")


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    class Needy(Model):
        def forward(self, input_ids: Tensor, use_cache: bool = False, image: Tensor | None = None) -> Any:
            assert image is not None, "give an image"
            return super().forward(input_ids)

    refused(Needy(), r"does not run on tokens of shape \(3, 7\) alone.*give an image")


def test_logits_of_another_shape_are_refused() -> None:
    class Last(Model):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
            return Output(super().forward(input_ids).logits[:, -1:])

    refused(Last(), r"logits of shape \(3, 1, 50\) for tokens of shape \(3, 7\)")


def test_two_lists_of_layers_need_a_word() -> None:
    class Two(Model):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.ModuleList(self.block() for _ in range(2))

        def body(self, x: Tensor) -> Tensor:
            x = super().body(x)
            for block in self.more:
                x = block(x)
            return x

    refused(Two(), r"found blocks, more among blocks, more")
    model = Two()
    tower = mt.TransformersTower(model, layers="more")
    tokens = torch.randint(0, VOCAB_SIZE, (2, 5))
    assert tower.depth == 2
    assert torch.equal(tower(tokens), model(tokens).logits)


def test_a_tower_without_generate_says_so() -> None:
    tower = mt.TransformersTower(Model())
    with pytest.raises(mt.errors.TowerError, match="Model cannot decode: it has no generate"):
        tower.decoder(lambda layer, state, positions: state)


def test_a_model_without_a_head_is_refused() -> None:
    class Headless(Model):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
            return SimpleNamespace(last_hidden_state=super().forward(input_ids).logits)

    refused(Headless(), "returns no logits: load it with its head")
