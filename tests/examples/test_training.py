from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import count, islice, repeat
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import multitower as mt
from models import causal_lm, pair, segment

pytest.importorskip("accelerate", reason="the examples use transformers' Trainer")

import training  # needs accelerate
from training import (
    TIMED,
    WARM_UP,
    Run,
    directed,
    endless,
    estimated_steps,
    in_turn,
    noisy,
    perplexity,
    pretrain,
    scale,
    train,
    watching,
)

TASKS = {
    "text": [[segment("speech", *range(3, n)), segment("text", 4, target=True)] for n in range(4, 14)],
    "speech": [[segment("text", 4), segment("speech", *range(3, n), target=True)] for n in range(4, 14)],
}


def lengths(batch: list[training.Example]) -> list[int]:
    return [sum(len(each.tokens) for each in example) for example in batch]


def test_every_round_holds_every_example_once() -> None:
    examples = [[segment("text", *([3] * length))] for length in range(1, 12)]
    rounds = endless(examples, 4, seed=0)
    expected = sorted(lengths(examples))
    for _ in range(2):
        batches = list(islice(rounds, 3))
        assert sorted(map(len, batches)) == [3, 4, 4]
        assert sorted(length for batch in batches for length in lengths(batch)) == expected
        assert all(max(lengths(batch)) - min(lengths(batch)) < 4 for batch in batches)


def test_tasks_take_turns() -> None:
    supplies = [endless([[segment(name, 3)]], 2, 0) for name in ("text", "speech")]
    turns = [batch[0][0].tower for batch in islice(in_turn(*supplies), 4)]
    assert turns == ["text", "speech", "text", "speech"]


def test_noise_is_drawn_anew_and_changes_no_label() -> None:
    example = [segment("text", 4), mt.Segment("speech", [0, *range(2, 14), 1], target=True)]
    clean, collate = mt.collate([example])["streams"], noisy({"speech": 0.5}, seed=0)
    drawn = [collate([example])["streams"] for _ in range(2)]
    again = noisy({"speech": 0.5}, seed=0)([example])["streams"]
    assert torch.equal(again["speech"]["tokens"], drawn[0]["speech"]["tokens"])
    assert not torch.equal(drawn[0]["speech"]["tokens"], drawn[1]["speech"]["tokens"])
    for streams in drawn:
        assert torch.equal(streams["speech"]["labels"], clean["speech"]["labels"])
        assert torch.equal(streams["text"]["tokens"], clean["text"]["tokens"])


def test_pretraining_learns_and_keeps_to_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    model = causal_lm("llama")
    rows = [torch.tensor([1, *range(3, 3 + length), 2]) for length in range(2, 10)]
    before, noise = perplexity(model, rows, "cpu"), torch.get_rng_state()
    run = pretrain(model, "text", rows, 30, lr=1e-2, batch=4, seed=0)
    assert perplexity(model, rows, "cpu") < before / 2
    assert run.steps == len(run.history) == 30
    assert [entry["step"] for entry in run.history] == list(range(1, 31))
    assert run.seconds > 0
    assert not model.training
    assert model.config.use_cache
    assert torch.equal(torch.get_rng_state(), noise)
    shown = capsys.readouterr()
    assert "pretraining text" in shown.err
    assert f"text={run.history[-1]['text']:.3f}" in shown.err
    assert not shown.out


def by_hand(model: nn.Module, batches: list[dict], groups: list[dict]) -> list[float]:
    """Train with a plain loop that follows the recipe."""
    optimizer, found = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01), []
    rates = [group["lr"] for group in optimizer.param_groups]
    lean = {"logits": False} if isinstance(model, mt.FusedModel) else {}
    for step, batch in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale(step / len(batches))
        loss = model.train()(**batch, **lean).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([each for group in groups for each in group["params"]], 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def fused() -> tuple[nn.Module, list[dict]]:
    model = pair(train="all")
    return model, model.parameter_groups(lr=1e-2)


def rival() -> tuple[nn.Module, list[dict]]:
    text = pytest.importorskip("multitower_text", reason="needs multitower_text").TextModality()
    native = causal_lm("llama", vocab_size=text.vocab_size)
    model = mt.baseline.VocabularyExpansion(native, {"text": text, "speech": text})
    return model, [{"params": list(model.parameters()), "lr": 1e-2}]


@pytest.mark.parametrize("make", [fused, rival])
def test_losses_are_those_of_the_recipe(make: Callable[[], tuple[nn.Module, list[dict]]]) -> None:
    model, groups = make()
    twin, twin_groups = copy.deepcopy((model, groups))
    batches = list(islice(in_turn(*(endless(task, 4, seed=1) for task in TASKS.values())), 8))
    expected = by_hand(twin, list(map(noisy({"speech": 0.3}, 0), batches)), twin_groups)
    run = train(model, iter(batches), groups, 8, title="", collate=noisy({"speech": 0.3}, 0))
    assert [entry.keys() - {"step"} for entry in run.history] == [{"text"}, {"speech"}] * 4
    found = [loss for entry in run.history for name, loss in entry.items() if name != "step"]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    state = twin.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=3e-4)


class CutOffError(Exception):
    """Ends a run before its last step."""


@pytest.mark.parametrize("make", [fused, rival])
def test_a_run_that_is_cut_off_goes_on(
    make: Callable[[], tuple[nn.Module, list[dict]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVED", 3)
    batches = list(islice(in_turn(*(endless(task, 4, seed=1) for task in TASKS.values())), 8))

    def run(folder: Path | None, last: int | None = None) -> tuple[nn.Module, Run]:
        model, groups = make()
        noise, calls = noisy({"speech": 0.3}, 0), count(1)

        def collate(examples: list[training.Example]) -> dict:
            if next(calls) == last:
                raise CutOffError
            return noise(examples)

        return model, train(model, iter(batches), groups, 8, title="", collate=collate, folder=folder)

    whole, expected = run(None)
    with pytest.raises(CutOffError):
        run(tmp_path / "run", last=6)
    (tmp_path / "run/checkpoint-6").mkdir()  # as if cut off while it was written
    model, found = run(tmp_path / "run")
    assert found.history == expected.history
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name])
    assert found.processor > 0
    assert run(tmp_path / "run")[1].history == expected.history, "a finished run"


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [scale(step / 100, warmup=0.1) for step in range(101)]
    assert rates[0] == 0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1, rel=0.05)
    assert rates[-1] == pytest.approx(0.1)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.drop = nn.Linear(2, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return ((self.line(self.drop(x)) - 1).square().mean(),)


def fit_line(module: nn.Module, steps: int, **options) -> Run:
    groups = [{"params": list(module.parameters()), "lr": 0.1}]
    return train(
        module, ones(), groups, steps, title="line", collate=lambda _: {"x": torch.ones(1, 2)}, **options
    )


def ones() -> repeat:
    return repeat([[segment("text", 3)]])


@pytest.mark.parametrize(
    ("steps", "seen"), [(1, [1]), (7, list(range(1, 8))), (103, [*range(2, 103, 2), 103])]
)
def test_what_is_watched_is_kept(steps: int, seen: list[int]) -> None:
    calls = count(1)
    run = fit_line(Line(), steps, watch=lambda: {"calls": float(next(calls))})
    assert run.contributions == [{"step": step, "calls": number} for number, step in enumerate(seen, start=1)]


def test_what_is_not_watched_is_not_kept() -> None:
    assert fit_line(Line(), 3).contributions == []


def test_contributions_of_links_are_watched_and_those_of_adapters_are_not() -> None:
    model = pair(train="all")
    modes = []
    watch = watching(model, TASKS.values())

    def noted() -> dict[str, float]:
        modes.append(model.training)
        return watch()

    groups = model.parameter_groups(lr=1e-2)
    run = train(model, in_turn(*map(repeat, TASKS.values())), groups, 4, title="", watch=noted)
    taps = {f"{tap.link} {tap.key}" for tap in model.schedule.taps}
    assert {name.split()[0] for name in taps} == {"speech->text", "text->speech"}
    assert [entry.keys() - {"step"} for entry in run.contributions] == [taps] * 4
    assert not any(modes)
    first, last = run.contributions[0], run.contributions[-1]
    assert not any(first[name] for name in taps), "the first step has a rate of zero"
    assert all(last[name] for name in taps)


def test_steps_are_estimated_from_a_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Line().eval()
    before, noise = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    taken = []

    def timed(twin: nn.Module, batches: object, groups: list[dict], steps: int, *, title: str) -> Run:
        assert twin is not module
        assert groups[0]["params"][0] is twin.line.weight
        fit_line(twin, steps)
        taken.append(steps)
        return Run(steps, seconds=400.0 if len(taken) % 2 else 0.25 * steps)

    monkeypatch.setattr(training, "train", timed)

    def groups_of(twin: nn.Module) -> list[dict]:
        return [{"params": list(twin.parameters()), "lr": 0.1}]

    assert estimated_steps(10.1, module, ones(), groups_of) == 40
    assert taken == [WARM_UP, TIMED]
    assert "a step takes 0.250 s here, so 10 s are enough for 40 steps" in capsys.readouterr().out
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module.training
    assert torch.equal(torch.get_rng_state(), noise)
    assert estimated_steps(-5.0, module, ones(), groups_of) == 1


def test_steps_of_a_fused_model_are_estimated() -> None:
    model = pair(train="all")
    batches = in_turn(*(endless(task, 2, seed=0) for task in TASKS.values()))
    assert estimated_steps(60.0, model, batches, lambda twin: twin.parameter_groups(lr=1.0)) > 1
    assert not any(model.is_open(link) for link in model.links)


def test_examples_have_a_direction() -> None:
    ((given, asked),) = directed([(torch.tensor([1, 2]), torch.tensor([3, 4]))], "speech", "text")
    assert (given.tower, given.target, asked.tower, asked.target) == ("speech", False, "text", True)
