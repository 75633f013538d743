from __future__ import annotations

from itertools import islice

import pytest
import torch

import multitower as mt
from models import causal_lm, pair, segment
from training import Budget, endless, in_turn, perplexity, pretrain, to_device, train

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
    rows = [torch.tensor([0, *range(2, 2 + length), 1]) for length in range(2, 10)]
    before = perplexity(model, rows, "cpu")
    run = pretrain(model, "text", rows, Budget(steps=30), **OPTIONS)
    assert perplexity(model, rows, "cpu") < before / 2
    assert run.steps == len(run.history) == 30
    assert not model.training
    assert "pretraining text" in capsys.readouterr().err


def test_gates_are_logged_and_time_is_kept_to() -> None:
    model = pair(train="all")
    batches = endless([[segment("speech", 3), segment("text", 4, target=True)]], 1, 0, "cpu")
    groups = model.parameter_groups(lr=1e-2)
    run = train(model, lambda batch: model(**batch).losses, batches, groups, Budget(seconds=0.5), title="zip")
    assert 0.5 <= run.seconds < 5
    assert run.gates[0].keys() == {"step", *model.gates()}
    assert any(model.gates().values())


def test_batches_move_as_a_whole() -> None:
    batch = to_device(mt.collate([[segment("text", 3)]]), "meta")
    assert {value.device.type for value in batch["streams"]["text"].values()} == {"meta"}
