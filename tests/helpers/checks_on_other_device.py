"""Tests of fused models on a device other than the CPU; test_other_device.py runs them in a new process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._pytree import tree_map_only

import multitower as mt
import other_device
from frozen_sources import data, fused
from models import EXAMPLES, causal_lm, pair
from multitower.testing import MODEL_PROMISES
from other_device import DEVICE, OtherDevice, Wait


@pytest.fixture
def device() -> Iterator[OtherDevice]:
    # Keep parameters the same objects, as on real devices; otherwise tied ones come apart.
    torch.__future__.set_swap_module_params_on_conversion(True)
    with OtherDevice() as device:
        yield device
    torch.__future__.set_swap_module_params_on_conversion(False)


def custom() -> mt.FusedModel:
    return pair(train="all", gates=True)


def ready_made() -> mt.FusedModel:
    return pair(causal_lm("llama", width=8), causal_lm("gpt2", width=12, depth=4, vocab_size=14), gates=True)


UNMOVED = {"saved"}  # its check copies values from the device into parameters on the CPU
QUICK = {"definition", "identity", "schedule", "sight", "unimodal"}
"""The other promises run a model many times; a step and decoding are tested below, on one batch."""

MODELS = pytest.mark.parametrize("make", [custom, ready_made])


def there(batch: Any, device: torch.device = DEVICE) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), batch)


def ours(waits: list[Wait]) -> list[Wait]:
    """Return the waits that transformers' own code does not cause."""
    folders = tuple(str(Path(package.__file__).parent) for package in (mt, transformers))
    packages = [[line for line in wait.lines if line.startswith(folders)] for wait in waits]
    return [wait for wait, lines in zip(waits, packages, strict=True) if lines[-1].startswith(folders[0])]


def test_devices_do_not_mix(device: OtherDevice) -> None:
    with pytest.raises(RuntimeError, match=r"add.* mixes devices: \(2,\) on other:0, \(2,\) on cpu"):
        torch.ones(2, device=DEVICE) + torch.ones(2)


@pytest.mark.parametrize(
    "look",
    [
        lambda tensor: bool((tensor > 0).any()),
        lambda tensor: tensor.tolist(),
        torch.Tensor.cpu,
        torch.nonzero,
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.ones(2).copy_(tensor),
    ],
)
def test_a_look_at_values_is_a_wait(device: OtherDevice, look: Callable[[torch.Tensor], Any]) -> None:
    tensor = torch.ones(2).to(DEVICE) + 1
    assert not device.waits
    look(tensor)
    assert any(__file__ in line for line in device.waits[0].lines)


@pytest.mark.parametrize("make", [pytest.param(custom, marks=pytest.mark.slow), ready_made])
@pytest.mark.parametrize(
    "promise",
    [
        pytest.param(promise, marks=() if promise in QUICK else pytest.mark.slow)
        for promise in sorted(MODEL_PROMISES.keys() - UNMOVED)
    ],
)
def test_promises_hold(device: OtherDevice, make: Callable[[], mt.FusedModel], promise: str) -> None:
    MODEL_PROMISES[promise](make().to(DEVICE), EXAMPLES)


def test_the_default_device_makes_no_difference(device: OtherDevice) -> None:
    model, rows = custom().to(DEVICE), [row[:1] for row in EXAMPLES[:2]]
    found = []
    for default in ("cpu", DEVICE):
        with torch.device(default):
            session = model.session(len(rows))
            session.append(rows)
            answers = session.generate([("text", "speech")], max_new_tokens=3)
            answers += model.generate(rows, ["text"], max_new_tokens=3)
        found.append(str(answers))
    assert found[0] == found[1]


@MODELS
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_that_of_the_cpu(
    device: OtherDevice, make: Callable[[], mt.FusedModel], packed: bool
) -> None:
    model, batch = make().train(), mt.collate(EXAMPLES)
    batch = mt.pack(batch) if packed else batch
    model(**batch).loss.backward()
    expected = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    model.to(DEVICE)
    out = model(**there(batch))
    out.loss.backward()
    found = {name: each.grad.raw for name, each in model.named_parameters() if each.grad is not None}
    assert out.loss.device == DEVICE
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "places", [pytest.param("other:0", marks=pytest.mark.slow), {"speech": "other:0", "text": "cpu"}]
)
def test_a_checkpoint_is_loaded_onto_devices(
    device: OtherDevice, tmp_path: Path, places: str | dict[str, str]
) -> None:
    model, rows = ready_made(), [row[:1] for row in EXAMPLES[:2]]
    model.save_pretrained(tmp_path / "fused")
    loaded = mt.FusedModel.from_pretrained(tmp_path / "fused", device_map=places)
    assert all(loaded.tower(name).device.type in str(places) for name in model.towers)
    batch = mt.collate(EXAMPLES)
    moved = {name: there(stream, loaded.tower(name).device) for name, stream in batch["streams"].items()}
    expected, found = model(**batch), loaded(streams=moved)
    torch.testing.assert_close(found.loss.cpu(), expected.loss)
    for one in (expected, found):
        one.loss.backward()
    for name, parameter in loaded.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad.cpu(), model.get_parameter(name).grad)
    options = {"output": ["text", "speech"], "max_new_tokens": 5, "do_sample": False}
    decoded = [
        [segment.tokens.tolist() for row in one.generate(rows, **options) for segment in row]
        for one in (model, loaded)
    ]
    assert decoded[0] == decoded[1]
    loaded.save_pretrained(tmp_path / "again")
    again = mt.FusedModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**batch).loss, expected.loss)


@MODELS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_a_step_waits_for_nothing(
    device: OtherDevice, make: Callable[[], mt.FusedModel], packed: bool, logits: bool
) -> None:
    model, batch = make().train().to(DEVICE), mt.collate(EXAMPLES)
    batch = there(mt.pack(batch) if packed else batch)
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-3), foreach=True)
    model(**batch, logits=logits)  # the check for packing runs once
    device.waits.clear()
    model(**batch, logits=logits).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not ours(device.waits)


def test_a_model_of_transformers_waits_in_a_step_as_often_as_alone(device: OtherDevice) -> None:
    model = ready_made().to(DEVICE)
    batch = there(mt.collate(EXAMPLES))
    model(**batch).loss.backward()
    fused = len(device.waits)
    device.waits.clear()
    for name, stream in batch["streams"].items():
        model.unimodal(name)(stream["tokens"], use_cache=False)
    assert fused == len(device.waits) > 0


def waits_by_tokens(
    device: OtherDevice, model: mt.FusedModel, output: list[Any], **options: Any
) -> list[int]:
    """Return how often ``generate`` waits for 4 and for 12 tokens, without transformers' own waits."""
    counts = []
    options = {"eos_token_id": None, "do_sample": False, **options}
    for tokens in (4, 4, 12):  # the first call also checks the decoding
        device.waits.clear()
        model.generate([row[:1] for row in EXAMPLES[:2]], output, max_new_tokens=tokens, **options)
        counts.append(len(ours(device.waits)))
    return counts[1:]


@MODELS
@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_waits_for_nothing_until_its_end(
    device: OtherDevice, make: Callable[[], mt.FusedModel], cache: str | None
) -> None:
    model = make().eval().to(DEVICE)
    few, many = waits_by_tokens(device, model, ["text"], cache_implementation=cache)
    assert few == many == len(EXAMPLES[:2])


@pytest.mark.parametrize("make", [custom, pytest.param(ready_made, marks=pytest.mark.slow)])
def test_towers_side_by_side_wait_once_a_token_to_see_whether_all_rows_have_ended(
    device: OtherDevice, make: Callable[[], mt.FusedModel]
) -> None:
    few, many = waits_by_tokens(device, make().eval().to(DEVICE), [("text", "speech")])
    assert many - few == 2 * (12 - 4)


def test_kept_states_are_those_of_the_cpu(device: OtherDevice, tmp_path: Path) -> None:
    model, batches = fused(), data()
    kept = mt.train.KeptStates.compute(model, batches, tmp_path / "cpu")
    expected = [model(**kept(batch)).loss for batch in batches]
    model = copy.deepcopy(model).to(DEVICE)
    batches = there(batches)
    kept = mt.train.KeptStates.compute(model, batches, tmp_path / "other")
    found = [model(**kept(batch)).loss.cpu() for batch in batches]
    torch.testing.assert_close(found, expected)


def test_vocabulary_expansion_is_that_of_the_cpu(device: OtherDevice) -> None:
    class Codec:
        vocab_size, begin, end = 20, 1, 2

    model = mt.baseline.VocabularyExpansion(causal_lm("llama"), {"text": Codec(), "speech": Codec()})
    batch = mt.collate(EXAMPLES)
    with torch.no_grad():
        expected = model(**batch).loss
    torch.testing.assert_close(model.to(DEVICE)(**there(batch)).loss.cpu(), expected)


def test_the_simulation_is_documented_by_what_runs() -> None:
    import doctest

    assert doctest.testmod(other_device).failed == 0
