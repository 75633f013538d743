from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import failing_training
import multitower as mt
import sharded_training
from models import EXAMPLES, causal_lm, segment
from multitower.testing import tiny_tower
from multitower.train.optimizer_state import trained_state
from multitower.train.resume import load_training, save_training
from processes import together

Run = tuple[mt.FusedModel, torch.optim.Optimizer, Any]


def llama(seed: int = 3) -> torch.nn.Module:
    return causal_lm("llama", seed=seed)


def build(
    train: Any = "none",
    speech: Callable[[], torch.nn.Module] = lambda: causal_lm("gpt2", width=12, depth=4, vocab_size=14),
    text: Callable[[], Any] = llama,
) -> mt.FusedModel:
    torch.manual_seed(0)
    graph = mt.FusionGraph()
    graph.add_tower("speech", speech(), train="all")
    graph.add_tower("text", text(), train=train)
    graph.add_link("speech", "text", interleave=(2, 1))
    graph.add_link("text", "speech", interleave=(1, 2))
    return graph.compile()


def adam(model: mt.FusedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameter_groups(lr=1e-2))


def sgd(model: mt.FusedModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def steps(model: mt.FusedModel, optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> None:
    for _ in range(count):
        model.train()
        optimizer.zero_grad()
        model(**mt.collate(EXAMPLES)).loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))


def at_milestones(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, expected), found in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.parametrize(
    ("train", "make", "schedule"),
    [
        ("none", adam, None),
        ("none", sgd, warm_up),
        ("lora", adam, at_milestones),
        (peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, bias="all"), adam, None),
        (peft.VeraConfig(target_modules=["q_proj"], r=4), adam, None),
    ],
    ids=["adam", "sgd", "lora", "bias", "vera"],
)
def test_a_resumed_run_is_the_unbroken_one(
    tmp_path: Path, train: Any, make: Callable[..., Any], schedule: Callable[..., Any] | None
) -> None:
    def start() -> Run:
        model = build(train)
        optimizer = make(model)
        return model, optimizer, schedule(optimizer) if schedule else None

    model, optimizer, scheduler = start()
    steps(model, optimizer, scheduler, 2)
    save_training(tmp_path / "run", model, optimizer, scheduler=scheduler, step=2)
    steps(model, optimizer, scheduler, 2)
    again, fresh, plan = start()
    assert load_training(tmp_path / "run", again, fresh, scheduler=plan) == 2
    steps(again, fresh, plan, 2)
    assert_same(model, again)
    assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_checkpointed_layers_have_the_names_that_they_have_without(tmp_path: Path) -> None:
    model = build()
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "GPT2Block")
    optimizer = adam(model)
    steps(model, optimizer, None, 1)
    save_training(tmp_path / "run", model, optimizer, step=1)
    model.save_pretrained(tmp_path / "fused")
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused"))
    again = build()
    fresh = adam(again)
    assert load_training(tmp_path / "run", again, fresh) == 1
    for each in ((model, optimizer), (again, fresh)):
        torch.manual_seed(1)
        steps(*each, None, 1)
    assert_same(model, again)


def test_compiled_models_are_saved_and_renamed_layers_refused(tmp_path: Path) -> None:
    model = build()
    optimizer = adam(model)
    layers = model.unimodal("speech").transformer.h
    layers[1].compile(backend="eager")
    torch.compile(model, backend="eager").save_pretrained(tmp_path / "fused")
    save_training(tmp_path / "run", torch.compile(model, backend="eager"), optimizer)
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused"))
    layers[0] = torch.compile(layers[0], backend="eager")
    renamed = r"towers\.speech\..*h\.0 was replaced by torch\.compile\(module\)"
    with pytest.raises(mt.errors.CheckpointError, match=renamed):
        model.save_pretrained(tmp_path / "fused")
    with pytest.raises(mt.errors.CheckpointError, match=renamed):
        save_training(tmp_path / "run", model, optimizer)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for saves in (True, False):
        model = build("lora")
        optimizer = adam(model)
        if saves:
            save_training(tmp_path / "run", model, optimizer)
        steps(model, optimizer, None, 1)
        if saves:
            save_training(tmp_path / "run", model, optimizer)
        steps(model, optimizer, None, 1)
        runs.append(model)
    assert_same(*runs)


def test_parameters_without_gradients_so_far_have_no_state(tmp_path: Path) -> None:
    text_only = mt.collate([[segment("text", 5, 6, target=True)]])

    def start() -> tuple[mt.FusedModel, torch.optim.Optimizer]:
        model = build("lora")
        return model, adam(model)

    model, optimizer = start()
    model(**text_only).loss.backward()
    optimizer.step()
    save_training(tmp_path / "run", model, optimizer)
    again, fresh = start()
    load_training(tmp_path / "run", again, fresh)
    assert len(fresh.state) == len(optimizer.state) < len(list(model.parameters()))
    for each in ((model, optimizer), (again, fresh)):
        torch.manual_seed(1)
        steps(*each, None, 2)
    assert_same(model, again)


def test_nothing_is_pickled_and_no_frozen_tower_copied(tmp_path: Path) -> None:
    model = build()
    optimizer = adam(model)
    steps(model, optimizer, None, 1)
    save_training(tmp_path / "run", model, optimizer)
    tensors, others = {}, []
    for file in (tmp_path / "run").iterdir():
        tensors |= load_file(file) if file.suffix == ".safetensors" else {}
        others += [] if file.suffix == ".safetensors" else [file.name]
    assert others == ["training.json"]
    assert not any(".towers.text." in name for name in tensors)
    assert {name.partition(".")[0] for name in tensors} == {"model", "optimizer", "random"}
    stored = [name for name in tensors if name.startswith("model.")]
    assert len(stored) == len(trained_state(model)) == len(set(map(id, trained_state(model).values())))


def test_what_a_scheduler_keeps_may_be_infinite(tmp_path: Path) -> None:
    model = build()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    scheduler.step(float("nan"))
    save_training(tmp_path / "run", model, optimizer, scheduler=scheduler, step=2)
    other = adam(model)
    loaded = torch.optim.lr_scheduler.ReduceLROnPlateau(other)
    loaded.best = 3.0
    assert load_training(tmp_path / "run", model, other, scheduler=loaded) == 2
    assert str(loaded.state_dict()) == str(scheduler.state_dict())
    assert "inf" in str(loaded.state_dict())


def test_another_scheduler_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    model = build()
    optimizer = adam(model)
    save_training(tmp_path / "run", model, optimizer, scheduler=at_milestones(optimizer))
    with torch.no_grad():
        model.tower("speech").native.lm_head.weight.zero_()
    with pytest.raises(mt.errors.CheckpointError, match="the scheduler is LambdaLR; MultiStepLR was saved"):
        load_training(tmp_path / "run", model, optimizer, scheduler=warm_up(optimizer))
    with pytest.raises(ValueError, match="a scheduler is loaded with its optimizer"):
        load_training(tmp_path / "run", model, scheduler=at_milestones(optimizer))
    assert not model.tower("speech").native.lm_head.weight.any()


def test_what_does_not_fit_is_all_listed_and_nothing_changed(tmp_path: Path) -> None:
    model = build()
    optimizer = adam(model)
    steps(model, optimizer, None, 1)
    save_training(tmp_path / "run", model, optimizer)
    other = build("lora", text=lambda: llama(4))
    other.links["text->speech"]["1-2"].bfloat16()
    fresh = sgd(other)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(mt.errors.CheckpointError) as caught:
        load_training(tmp_path / "run", other, fresh, scheduler=warm_up(fresh))
    for part in (
        "model.towers.text.model.model.layers.0.self_attn.q_proj.lora_A.default.weight is not there, but",
        "model.links.text->speech.1-2.key.weight is [[12, 16], 'float32'], but the model has",
        "tower 'text': what is not trained of it is not what it was",
        "the optimizer is SGD; AdamW was saved",
        "the optimizer's groups hold other parameters",
        "the scheduler is LambdaLR; None was saved",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in before.items())
    assert not fresh.state


@pytest.mark.parametrize("damage", ["half", "gone", "other", "json", "newer", "key"])
def test_damage_is_an_error_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    model = build()
    optimizer = adam(model)
    steps(model, optimizer, None, 1)
    save_training(tmp_path / "run", model, optimizer)
    (shard,), file = (tmp_path / "run").glob("*.safetensors"), tmp_path / "run/training.json"
    if damage == "half":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif damage == "gone":
        shard.unlink()
    elif damage == "other":
        shard.write_bytes(b"\0" * 100)
    elif damage == "json":
        file.write_text(file.read_text()[:1000])
    else:
        change = {"training_version": 99} if damage == "newer" else {"tensors": None}
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    again = build()
    before = {name: tensor.clone() for name, tensor in again.state_dict().items()}
    match = "upgrade multitower" if damage == "newer" else r"is damaged"
    with pytest.raises(mt.errors.CheckpointError, match=match):
        load_training(tmp_path / "run", again, adam(again))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in before.items())


def test_a_training_checkpoint_becomes_an_ordinary_one(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "text")
    causal_lm("gpt2", width=12, depth=4, vocab_size=14).save_pretrained(tmp_path / "speech")
    model = build("lora", lambda: tmp_path / "speech", lambda: tmp_path / "text")
    optimizer = adam(model)
    steps(model, optimizer, None, 2)
    save_training(tmp_path / "run", model, optimizer)
    again = mt.FusedModel.from_training(tmp_path / "run")
    assert_same(model, again)
    again.save_pretrained(tmp_path / "fused")
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused"))
    (tmp_path / "text").rename(tmp_path / "moved")
    moved = {"text": str(tmp_path / "moved")}
    assert_same(model, mt.FusedModel.from_training(tmp_path / "run", towers=moved))
    with pytest.raises(mt.errors.CheckpointError, match="the model has the towers speech, text"):
        mt.FusedModel.from_training(tmp_path / "run", towers={"txt": "x"})


def test_plain_towers_are_given_anew(tmp_path: Path) -> None:
    towers = {"speech": lambda: tiny_tower(1, depth=4, vocab_size=14), "text": lambda: tiny_tower(2)}
    model = build("none", towers["speech"], towers["text"])
    optimizer = adam(model)
    steps(model, optimizer, None, 1)
    save_training(tmp_path / "run", model, optimizer)
    with pytest.raises(mt.errors.TowerError, match="tower 'speech' was declared with a module"):
        mt.FusedModel.from_training(tmp_path / "run")
    made = {name: make() for name, make in towers.items()}
    assert_same(model, mt.FusedModel.from_training(tmp_path / "run", towers=made))


@pytest.mark.slow
def test_where_one_process_cannot_save_all_fail_at_once(tmp_path: Path) -> None:
    together(failing_training.__file__, 2, tmp_path)


@pytest.mark.slow
def test_a_model_divided_among_four_is_saved_in_parts_and_loaded_by_one_and_by_two(tmp_path: Path) -> None:
    together(sharded_training.__file__, 4, tmp_path, limit=900)
    parts = sorted((tmp_path / "run").glob("*.safetensors"))
    assert len(parts) == 4
    sharded_training.check(tmp_path)
    together(sharded_training.__file__, 2, tmp_path, limit=900)
    model, optimizer = sharded_training.start()
    parts[1].unlink()
    with pytest.raises(mt.errors.CheckpointError, match="is damaged, or not wholly copied"):
        load_training(tmp_path / "run", model, optimizer)


def test_other_random_numbers_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    save_training(tmp_path / "run", model, adam(model))
    state = {"random.cpu.1": torch.get_rng_state()}
    monkeypatch.setattr("multitower.train.resume.random_state", lambda: state)
    monkeypatch.setattr("multitower.train.optimizer_state.random_state", lambda: state)
    with pytest.warns(UserWarning, match=r"no random\.cpu\.1"):
        load_training(tmp_path / "run", model, adam(model))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = build()
    optimizer = adam(model)
    optimizer.param_groups[0]["note"] = object()
    with pytest.raises(mt.errors.CheckpointError, match=r"cannot be saved: .* is not plain data"):
        save_training(tmp_path / "run", model, optimizer)
    with pytest.raises(ValueError, match="that is not the model's"):
        save_training(tmp_path / "run", model, adam(build()))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("one")
    with pytest.raises(mt.errors.CheckpointError, match=r"contains no training\.json"):
        save_training(tmp_path / "thesis", model, adam(model))
    assert not (tmp_path / "run").exists()


def test_other_files_stay_and_the_step_is_an_integer(tmp_path: Path) -> None:
    model = build()
    save_training(tmp_path / "run", model, sgd(model), step=np.int64(1))
    (tmp_path / "run/logs").mkdir()
    (tmp_path / "run/logs/loss.csv").write_text("1.5")
    save_training(tmp_path / "run", model, sgd(model), step=2)
    assert (tmp_path / "run/logs/loss.csv").read_text() == "1.5"
    assert load_training(tmp_path / "run", model) == 2
    with pytest.raises(TypeError):
        save_training(tmp_path / "run", model, sgd(model), step=3.0)
