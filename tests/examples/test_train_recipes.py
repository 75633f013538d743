"""Four engines train one recipe with the same losses at every step and the same final weights."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import multitower as mt
from letters import Letters
from models import causal_lm

for needed in ("transformers", "accelerate", "datasets"):
    pytest.importorskip(needed, reason="the recipes need transformers, accelerate and datasets")

from multitower_text import TextModality
from train_data import Recipe, fuse, loader, parse, read

ENGINES = ("accelerate", "lightning", "trainer")
ROWS = [("abc", "one"), ("b", "two and more"), ("cabbage", "3"), ("da", "four, five"), ("ebbeda", "six")]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipes")
    text = TextModality()
    rows = "".join(f'{name},"{words}"\n' for name, words in ROWS)
    (folder / "metadata.csv").write_text(f"file_name,transcription\n{rows}")
    causal_lm("llama", vocab_size=14).save_pretrained(folder / "speech")
    causal_lm("qwen3", depth=4, vocab_size=text.vocab_size).save_pretrained(folder / "text")
    return Recipe(
        str(folder / "metadata.csv"),
        decoders={name: str(folder / name) for name in ("speech", "text")},
        modalities={"speech": Letters(), "text": text},
        out=str(folder / "out"),
        steps=6,
        batch=2,
        accumulate=3,
        lr=1e-2,
        warm_up=0.2,
    )


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def train(engine: str, recipe: Recipe, out: Path) -> tuple[list[float], mt.FusedModel]:
    losses = importlib.import_module(f"train_{engine}").main(replace(recipe, out=str(out)))
    return losses, mt.FusedModel.from_pretrained(out)


@pytest.fixture(scope="module")
def plain(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], mt.FusedModel]:
    return train("plain", recipe, tmp_path_factory.mktemp("plain"))


def test_rows_of_a_step_are_unlike(recipe: Recipe) -> None:
    """Otherwise a mean of means equals the mean, and the tests below could not tell them apart."""
    steps = list(loader(recipe))
    assert [len(batches) for batches in steps] == [recipe.accumulate] * recipe.steps
    unlike = 0
    for batches in steps:
        counts = [mt.batch.count_targets([batch]) for batch in batches]
        unlike += (
            len({tuple(sorted((name, int(each)) for name, each in found.items())) for found in counts}) > 1
        )
    assert unlike == recipe.steps


def test_every_round_is_in_another_order(recipe: Recipe) -> None:
    rows = [str(row["segments"]) for row in read(recipe)]
    size = len(rows) // 6
    assert len(rows) == recipe.steps * recipe.batch * recipe.accumulate
    assert len({tuple(rows[start : start + size]) for start in range(0, size * 6, size)}) == 6
    assert len(set(rows)) <= 2 * len(ROWS)


def test_the_plain_loop_learns(plain: tuple[list[float], mt.FusedModel], recipe: Recipe) -> None:
    losses, trained = plain
    assert len(losses) == recipe.steps
    assert losses[-1] < losses[0]
    assert all(map(trained.is_open, trained.links))
    before = fuse(recipe)
    for name in ("speech", "text"):
        same = [
            torch.equal(*pair)
            for pair in zip(
                before.unimodal(name).parameters(), trained.unimodal(name).parameters(), strict=True
            )
        ]
        assert all(same) if name == "text" else not any(same)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # there may be no accelerator
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # lightning uses it
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # the frozen tower
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # nor is it slow
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_train_as_the_plain_loop(
    engine: str, plain: tuple[list[float], mt.FusedModel], recipe: Recipe, tmp_path: Path
) -> None:
    if engine == "lightning":
        pytest.importorskip("lightning", reason="needs lightning")
    expected, model = plain
    losses, found = train(engine, recipe, tmp_path)
    assert losses == pytest.approx(expected, rel=1e-4)
    state = found.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=3e-4)


def test_accumulated_batches_are_one_batch(
    plain: tuple[list[float], mt.FusedModel], recipe: Recipe, tmp_path: Path
) -> None:
    losses, _ = train("plain", replace(recipe, batch=6, accumulate=1), tmp_path)
    assert losses == pytest.approx(plain[0], rel=1e-3)


def test_the_command_line_says_what_is_fused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech = pytest.importorskip("multitower_speech", reason="needs multitower_speech").SpeechModality(
        torch.randn(1, 16, 160)
    )
    for name, modality in (("speech", speech), ("text", TextModality())):
        modality.save_pretrained(tmp_path / name)
    given = [f"--{name} {recipe.decoders[name]} {tmp_path / name}" for name in ("speech", "text")]
    command = ["train.py", recipe.metadata, "--steps", "7", "--lr", "0.5", *" ".join(given).split()]
    monkeypatch.setattr(sys, "argv", command)
    found = parse("Train.")
    assert found.decoders == recipe.decoders
    assert {name: each.vocab_size for name, each in found.modalities.items()} == {
        "speech": speech.vocab_size,
        "text": 258,
    }
    assert (found.metadata, found.steps, found.lr, found.batch) == (recipe.metadata, 7, 0.5, Recipe.batch)
