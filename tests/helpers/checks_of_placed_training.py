"""Tests of training with towers on different devices; test_other_device.py runs them in a new process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import multitower as mt
from models import causal_lm, segment
from multitower.testing import open_links
from other_device import COPIES, Remote, run

transformers = pytest.importorskip("transformers", reason="needs transformers")

PLACES = {"speech": "other:0", "text": "cpu", "music": "other:0"}
EXAMPLES = [
    [segment("speech", 5, 6, 7), segment("text", 3, 4, target=True), segment("music", 4, 8, target=True)],
    [segment("music", 9, 3), segment("text", 9, target=True)],
    [segment("text", 5, 6, 7, 8), segment("music", 3, target=True)],
    [segment("speech", 8), segment("text", 7, 7, target=True)],
]


class Crossings(TorchDispatchMode):
    """Counts the bytes copied between devices, separately for floating-point and other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = run(func, args, kwargs or {})
        if func in COPIES:
            given = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if isinstance(given, Remote) != isinstance(made, Remote):
                self.bytes["states" if given.is_floating_point() else "times and masks"] += given.nbytes
        return made


@pytest.fixture
def crossings() -> Iterator[Crossings]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    with Crossings() as crossings:
        yield crossings
    torch.__future__.set_swap_module_params_on_conversion(False)


def make() -> mt.FusedModel:
    """Link two towers, one with LoRA, to each other and to a frozen source that reads nothing."""
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("llama", depth=3, width=12, seed=1), adapter=None)
    graph.add_tower("text", causal_lm("gpt2", seed=2), train="lora")
    graph.add_tower("music", causal_lm("qwen3", depth=4, width=24, seed=3), train="all")
    graph.add_link("speech", "text", taps=[(1, 1), (1, 2), (2, 2)])
    graph.add_link("speech", "text", taps=[(2, 1)], name="again")
    graph.add_link("speech", "music", taps=[(2, 1)])
    graph.add_link("text", "music", taps=[(1, 2), (1, 3)])
    graph.add_link("music", "text", taps=[(1, 1)])
    torch.manual_seed(0)
    return open_links(graph.compile(), seed=7).train()


def place(model: mt.FusedModel, folder: Path) -> mt.FusedModel:
    model.save_pretrained(folder)
    return mt.FusedModel.from_pretrained(folder, device_map=PLACES).train()


def planned(model: mt.FusedModel, batch: mt.batch.Batch) -> int:
    """Return the bytes that must cross: each state that is read on other devices, once per device, and as
    many bytes of gradients, except for the frozen source. The losses are summed on one device.
    """
    streams, total = batch["streams"], 0
    reads = {(tap.source, tap.source_layer, PLACES[tap.target]) for tap in model.schedule.taps}
    for source, _, there in reads:
        if PLACES[source] != there:
            state = streams[source]["tokens"].numel() * model.tower(source).width * 4
            total += state if source == "speech" else 2 * state
    first, *others = [name for name, stream in streams.items() if "labels" in stream]
    return total + sum(2 * 4 for name in others if PLACES[name] != PLACES[first])


def test_only_states_that_taps_read_cross(crossings: Crossings, tmp_path: Path) -> None:
    batch = mt.collate(EXAMPLES)
    model = place(make(), tmp_path)
    assert {name: str(device) for name, device in model.devices.items()} == PLACES
    moved = mt.batch.to_device(batch, model.devices)
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2), foreach=False)
    model(**moved).loss.backward()  # one-time checks of the towers
    optimizer.zero_grad()
    crossings.bytes.clear()
    loss = model(**moved).loss
    loss.backward()
    optimizer.step()
    assert crossings.bytes["states"] == planned(model, batch)
    tokens = sum(stream["tokens"].numel() for stream in batch["streams"].values())
    assert 0 < crossings.bytes["times and masks"] <= 2 * len(model.links) * tokens * (8 + 1)


@pytest.mark.slow
def test_a_model_on_two_devices_learns_what_one_learns(crossings: Crossings, tmp_path: Path) -> None:
    alone = make()
    placed = place(alone, tmp_path)
    for model in (alone, placed):
        torch.manual_seed(3)  # for dropout
        optimizer = torch.optim.SGD(model.parameter_groups(lr=0.1), foreach=False)
        for start in range(3):
            batch = mt.batch.to_device(mt.collate(EXAMPLES[start : start + 2]), model.devices)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(placed, alone)


@pytest.mark.slow
def test_the_trainer_leaves_towers_where_they_are(crossings: Crossings, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from multitower.train import Trainer

    alone = make()
    placed = place(alone, tmp_path / "fused")
    measured = []
    for name, model in (("alone", alone), ("placed", placed)):
        arguments = transformers.TrainingArguments(
            str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        run = Trainer(model, arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES)
        run.train()
        measured.append(run.evaluate())
    assert {name: str(device) for name, device in placed.devices.items()} == PLACES
    assert_same(placed, alone)
    assert measured[1]["eval_music_loss"] == pytest.approx(measured[0]["eval_music_loss"], rel=1e-3)
    assert_same(mt.FusedModel.from_pretrained(tmp_path / "placed" / "checkpoint-3"), alone)


def test_a_model_on_one_device_has_no_map_of_devices() -> None:
    assert not hasattr(make(), "hf_device_map")


def assert_same(found: mt.FusedModel, expected: mt.FusedModel) -> None:
    tensors = dict(found.named_parameters())
    for name, tensor in expected.named_parameters():
        torch.testing.assert_close(values(tensors[name]), values(tensor), rtol=1e-3, atol=1e-4)


def values(tensor: Tensor) -> Tensor:
    (leaf,) = tree_leaves(tensor.detach().cpu())
    return leaf
