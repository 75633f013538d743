"""Training in several processes whose batches lack different towers."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import multitower as mt
from models import causal_lm, pair, segment
from processes import together

pytest.importorskip("transformers", reason="needs transformers")
parallel = pytest.importorskip(
    "parallel_training", reason="adapters need the lora extra", exc_type=ImportError
)


@functools.cache
def alone(towers: str) -> dict[str, torch.Tensor]:
    """Train in this process only; return the weights after the same steps and after one more."""
    model = parallel.make(towers)
    optimizer = parallel.sgd(model)
    parallel.train(model, optimizer, parallel.STEPS)
    found = parallel.whole(model)
    decoded = parallel.answer(model, 5)
    parallel.train(model, optimizer, parallel.STEPS[:1])
    later = {f"later.{name}": tensor for name, tensor in parallel.whole(model).items()}
    return {**found, **later, "answer": decoded}


def compare(processes: int, case: tuple[str, str], folder: Path) -> None:
    towers, engine = case
    expected = alone(towers)
    saved = mt.FusedModel.from_pretrained(folder / f"{towers}, {engine}").state_dict()
    for rank in range(processes):
        found = load_file(folder / f"{towers}, {engine}.{rank}.safetensors")
        assert found.keys() == expected.keys()
        answer = found.pop("answer").tolist()
        assert answer == expected["answer"].tolist()[: len(answer)]
        for name, tensor in found.items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
        for name, tensor in saved.items():
            assert torch.equal(tensor, found[name]), name


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    together(parallel.__file__, 2, folder)
    return folder


@pytest.mark.parametrize("case", parallel.CASES[2], ids=", ".join)
def test_two_processes_train_decode_and_save_as_one(case: tuple[str, str], two: Path) -> None:
    compare(2, case, two)


@pytest.mark.slow
def test_four_processes_train_decode_and_save_as_one(tmp_path: Path) -> None:
    together(parallel.__file__, 4, tmp_path, limit=1800)
    for case in parallel.CASES[4]:
        compare(4, case, tmp_path)


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
