from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import count, islice, repeat

import pytest
import torch
from torch import Tensor, nn

import multitower as mt
import training
from models import causal_lm, pair, segment
from training import (
    TIMED,
    WARM_UP,
    Run,
    endless,
    estimated_steps,
    in_turn,
    perplexity,
    pretrain,
    target_losses,
    to_device,
    train,
    watching,
)

OPTIONS = {"lr": 1e-2, "batch": 4, "seed": 0, "device": "cpu"}


def test_every_round_holds_every_example_once() -> None:
    examples = [[segment("text", *([3] * length))] for length in range(1, 12)]
    rounds = endless(examples, 4, seed=0, device="cpu")
    for _ in range(2):
        lengths = [
            int(row.sum()) - 2 for batch in islice(rounds, 3) for row in batch["streams"]["text"]["mask"]
        ]
        assert sorted(lengths) == list(range(1, 12))


def test_tasks_take_turns() -> None:
    texts = endless([[segment("text", 3)]], 2, 0, "cpu")
    speech = endless([[segment("speech", 3)]], 2, 0, "cpu")
    assert [next(iter(batch["streams"])) for batch in islice(in_turn(texts, speech), 4)] == [
        "text",
        "speech",
        "text",
        "speech",
    ]


def test_pretraining_learns_and_keeps_to_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    model = causal_lm("llama")
    rows = [torch.tensor([1, *range(3, 3 + length), 2]) for length in range(2, 10)]
    before = perplexity(model, rows, "cpu")
    run = pretrain(model, "text", rows, 30, **OPTIONS)
    assert perplexity(model, rows, "cpu") < before / 2
    assert run.steps == len(run.history) == 30
    assert not model.training
    assert "pretraining text" in capsys.readouterr().err


def error_of(module: nn.Module) -> Callable[[dict], dict[str, Tensor]]:
    return lambda batch: {"error": (module(batch["x"]) - 1).square().mean()}


def groups_of(module: nn.Module) -> list[dict]:
    return [{"params": list(module.parameters()), "lr": 0.1}]


def fit_line(steps: int, **options) -> tuple[nn.Module, Run]:
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    batches = repeat({"x": torch.ones(1, 2)})
    return module, train(module, error_of(module), batches, groups_of(module), steps, title="line", **options)


@pytest.mark.parametrize("slowness", [0.01, 1e6])
def test_how_long_a_step_takes_changes_nothing(monkeypatch: pytest.MonkeyPatch, slowness: float) -> None:
    expected, run = fit_line(20)
    ticks = count()
    monkeypatch.setattr(training.time, "monotonic", lambda: next(ticks) * slowness)
    module, slow = fit_line(20)
    assert torch.equal(module.weight, expected.weight)
    assert slow.history == run.history
    assert slow.steps == 20
    assert slow.seconds == pytest.approx(slowness)


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    module, rates = nn.Linear(2, 1), []
    groups = groups_of(module)

    def losses(batch: dict) -> dict[str, Tensor]:
        rates.append(groups[0]["lr"])
        return error_of(module)(batch)

    train(module, losses, repeat({"x": torch.ones(1, 2)}), groups, 100, title="line", warmup=0.1)
    assert rates[0] == 0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(0.1, rel=0.05)
    assert rates[-1] == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("steps", "seen"), [(1, [1]), (7, list(range(1, 8))), (103, [*range(2, 103, 2), 103])]
)
def test_what_is_watched_is_kept(steps: int, seen: list[int]) -> None:
    calls = count(1)
    _, run = fit_line(steps, watch=lambda: {"calls": float(next(calls))})
    assert run.contributions == [{"step": step, "calls": number} for number, step in enumerate(seen, start=1)]


def test_what_is_not_watched_is_not_kept() -> None:
    assert fit_line(3)[1].contributions == []


def test_contributions_of_links_are_watched_and_those_of_adapters_are_not() -> None:
    model = pair(train="all")
    modes = []
    examples = {
        "speech->text": [segment("speech", 3), segment("text", 4, target=True)],
        "text->speech": [segment("text", 4), segment("speech", 3, target=True)],
    }
    batches = [mt.collate([each]) for each in examples.values()]
    watch = watching(model, batches)

    def noted() -> dict[str, float]:
        modes.append(model.training)
        return watch()

    groups = model.parameter_groups(lr=1e-2)
    run = train(model, target_losses(model), in_turn(*map(repeat, batches)), groups, 4, title="", watch=noted)
    taps = {f"{tap.link} {tap.key}" for tap in model.schedule.taps}
    assert {name.split()[0] for name in taps} == set(examples)
    assert [entry.keys() - {"step"} for entry in run.contributions] == [taps] * 4
    assert not any(modes)
    first, last = run.contributions[0], run.contributions[-1]
    assert not any(first[name] for name in taps), "the first step has a rate of zero"
    assert all(last[name] for name in taps)


def test_steps_are_estimated_from_a_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 1)).eval()
    before, noise = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    clock, taken = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])

    def make_losses(twin: nn.Module) -> Callable[[dict], dict[str, Tensor]]:
        def losses(batch: dict) -> dict[str, Tensor]:
            taken.append(batch)
            clock[0] += 100 if len(taken) <= WARM_UP else 0.25
            return error_of(twin)(batch)

        return losses

    batches = repeat({"x": torch.ones(1, 2)})
    assert estimated_steps(10.1, module, make_losses, batches, groups_of) == 40
    assert len(taken) == WARM_UP + TIMED
    assert "a step takes 0.250 s here, so 10 s are enough for 40 steps" in capsys.readouterr().out
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module.training
    assert torch.equal(torch.get_rng_state(), noise)
    assert estimated_steps(-5.0, module, make_losses, batches, groups_of) == 1


def test_steps_of_a_fused_model_are_estimated() -> None:
    model = pair(train="all")
    batch = mt.collate([[segment("speech", 3), segment("text", 4, target=True)]])
    found = estimated_steps(
        5.0, model, target_losses, repeat(batch), lambda twin: twin.parameter_groups(lr=1.0)
    )
    assert found > 1
    assert not any(model.is_open(link) for link in model.links)


def test_batches_move_as_a_whole() -> None:
    batch = to_device(mt.collate([[segment("text", 3)]]), "meta")
    assert {value.device.type for value in batch["streams"]["text"].values()} == {"meta"}
