"""Training in several processes, each of whose batches lacks another tower."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import multitower as mt
from models import causal_lm, pair, segment
from parallel_training import ENGINES, ROWS
from paths import ROOT

SCRIPT = ROOT / "tests" / "helpers" / "parallel_training.py"
LIMIT = 120


def run(processes: int, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    commands = [
        [
            sys.executable,
            "-W",
            "error::UserWarning:multitower",
            str(SCRIPT),
            str(rank),
            str(processes),
            str(folder),
        ]
        for rank in range(processes)
    ]
    children = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        assert [child.wait(LIMIT) for child in children] == [0] * processes
    finally:
        for child in children:
            child.kill()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="towers are of transformers")
    folder = tmp_path_factory.mktemp("runs")
    run(1, folder)
    run(2, folder)
    return folder


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(rows: str, engine: str, weights: Path) -> None:
    alone = load_file(weights / f"{rows}, alone.1.0.safetensors")
    for rank in range(2):
        found = load_file(weights / f"{rows}, {engine}.2.{rank}.safetensors")
        for name, expected in alone.items():
            torch.testing.assert_close(
                found[name], expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text
            )


@pytest.mark.parametrize("logits", [True, False])
def test_all_is_run_where_it_is_asked_for(logits: bool) -> None:
    model = pair(causal_lm("llama"), causal_lm("llama", depth=4, vocab_size=14, seed=4), train="all").train()
    batch = mt.collate([[segment("speech", 5, 6, target=True)]])
    alone, full = model(**batch), model(**batch, run_all=True, logits=logits)
    torch.testing.assert_close(full.losses["speech"], alone.losses["speech"])
    assert full.losses["text"] == 0
    full.loss.backward()
    trained = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    assert all(gradient is not None for gradient in trained.values())
    assert not any(gradient.any() for name, gradient in trained.items() if name.startswith("links.text"))


@pytest.mark.parametrize("engine", ENGINES)
def test_divided_models_decode_and_are_saved_as_whole_ones(engine: str, weights: Path) -> None:
    alone = mt.FusedModel.from_pretrained(weights / "alone.1")
    found = mt.FusedModel.from_pretrained(weights / f"{engine}.2").state_dict()
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    expected = load_file(weights / "answer, alone.1.0.safetensors")["answer"]
    for rank in range(2):
        answer = load_file(weights / f"answer, {engine}.2.{rank}.safetensors")["answer"]
        assert answer.tolist()[: len(expected)] == expected.tolist()[: len(answer)]
