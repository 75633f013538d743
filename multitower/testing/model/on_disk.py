"""Checks that JSON and checkpoints preserve a model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...batch.collate import Example
from ...checkpoint.load import load_tower
from ...declare.graph import FusionGraph
from ...model import FusedModel
from ...tower import Tower
from ...tower.peft_tower import base_model, is_peft_model
from ..compare import assert_close, assert_equal
from .case import opened, rounding, streams_of


@torch.no_grad()
def check_saved(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that saving and loading preserves a model's graph, every tensor, and its logits.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_saved(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    Towers in plain PyTorch are passed to the loader with all weights set to zero. Tensors must be equal bit
    for bit; logits up to rounding, because loaded tensors may have another memory layout. Each tower is also
    loaded alone, and the loaded model is saved again, in small shards.

    Raises:
        AssertionError: Something differs.
    """
    assert FusionGraph.from_json(model.graph.to_json()) == model.graph, "the graph is another one after JSON"
    model = opened(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/fused")
        again = FusedModel.from_pretrained(f"{folder}/fused", towers=_blanks(model))
        _check_same(model, again)
        for name in model.towers:
            alone = load_tower(f"{folder}/fused", name, tower=_blanks(model).get(name))
            _check_tensors(model.unimodal(name), alone, f"tower {name!r} alone")
        again.save_pretrained(f"{folder}/again", max_shard_size=1000)
        _check_same(model, FusedModel.from_pretrained(f"{folder}/again", towers=_blanks(model)))
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    found = {key for key, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == found, f"trained before or after, not both: {sorted(trained ^ found)}"
    for name in model.towers:
        again.tower(name).to(model.tower(name).device)
    streams = streams_of(model, examples)
    expected = model(streams).logits
    for name, logits in _placed_as(again, model)(streams).logits.items():
        what = f"tower {name!r} has other logits when it is loaded"
        assert_close(logits, expected[name], what, rounding(model))


def _check_same(model: FusedModel, again: FusedModel) -> None:
    assert again.graph == model.graph, f"the graph is another one when it is loaded:\n{again.graph}"
    assert again.schedule == model.schedule, "the schedule is another one when the model is loaded"
    _check_tensors(model, again, "the model")


def _check_tensors(module: nn.Module, again: nn.Module, what: str) -> None:
    before, after = module.state_dict(), again.state_dict()
    assert set(before) == set(after), f"{what}: other tensors are loaded: {sorted(set(before) ^ set(after))}"
    for key, value in before.items():
        assert value.dtype == after[key].dtype, f"{key} is loaded as {after[key].dtype}, not {value.dtype}"
        assert_equal(after[key].to(value.device), value, f"{key} is another one when it is loaded")


def _blanks(model: FusedModel) -> dict[str, nn.Module]:
    """Return copies of the towers in plain PyTorch without peft adapters, with all weights zero."""
    natives = {
        id(model.unimodal(name)): model.unimodal(name)
        for name in model.towers
        if _is_plain(model.tower(name))
    }
    blanks = {key: _blank(native) for key, native in natives.items()}
    return {name: blanks[id(model.unimodal(name))] for name in model.towers if _is_plain(model.tower(name))}


def _is_plain(tower: Tower) -> bool:
    return isinstance(base_model(tower.native), Tower)


def _blank(native: nn.Module) -> nn.Module:
    """Return a copy of a tower in plain PyTorch without peft adapters, with all weights zero."""
    module: Any = copy.deepcopy(native)
    module = module.unload() if is_peft_model(module) else module
    for parameter in module.parameters():
        parameter.zero_()
    blank: nn.Module = module
    return blank


def _placed_as(again: FusedModel, model: FusedModel) -> FusedModel:
    """Move links and adapters to their original devices, which a checkpoint does not store."""
    for (_, module), (_, placed) in zip(again.named_modules(), model.named_modules(), strict=True):
        for key, parameter in module.named_parameters(recurse=False):
            parameter.data = parameter.data.to(placed.get_parameter(key).device)
    return again
