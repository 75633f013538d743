"""Training with cached states of frozen sources equals training with the sources."""

from __future__ import annotations

import copy
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import multitower as mt
import savers
from frozen_sources import brought, data, fused, row
from models import causal_lm, segment
from multitower.batch.collate import Batch
from multitower.declare.graph import redeclared
from multitower.run.request import why_not_constant
from multitower.testing import open_links
from multitower.testing.compare import assert_close
from multitower.testing.model.case import rounding
from multitower.testing.strategies import examples, graphs

FEWER = settings(max_examples=settings().max_examples // 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "place" / "states"


def trained(model: mt.FusedModel, batches: list[Batch], *, logits: bool = True) -> list[torch.Tensor]:
    """Train a copy, one step per batch; return all its parameters."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    for batch in batches:
        optimizer.zero_grad()
        model(**batch, logits=logits).loss.backward()
        optimizer.step()
    return list(model.parameters())


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.filterwarnings(
    "ignore:.*is trained in torch.bfloat16:UserWarning"
)  # equality counts, not learning
@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_the_same_bit_for_bit_in_any_order(
    folder: Path, dtype: torch.dtype, logits: bool
) -> None:
    model, batches = fused(dtype), data()
    kept = mt.train.KeptStates.compute(model, batches, folder)
    order = random.Random(3).choices(batches, k=9)
    assert all("speech layer 3" in brought(kept(batch)) for batch in batches)
    expected = trained(model, order, logits=logits)
    assert same(trained(model, list(map(kept, order)), logits=logits), expected)
    assert not same(expected, list(model.parameters()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_transformers_towers_are_kept(folder: Path, family: str) -> None:
    model, batches = fused(speech=causal_lm(family, depth=4, vocab_size=14)), data()
    kept = mt.train.KeptStates.compute(model, batches, folder)
    assert same(trained(model, list(map(kept, batches))), trained(model, batches))


def test_of_kept_towers_nothing_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fused(), data(1)[0]
    ready = mt.train.KeptStates.compute(model, [batch], folder)(batch)
    for name in ("speech", "image"):
        for part in ("embed", "layer", "head"):
            monkeypatch.setattr(model.tower(name), part, lambda *_: pytest.fail("a kept tower runs"))
    out = model(**ready, output_attentions=True)
    assert list(out.logits) == ["text"]
    assert out.losses["speech"] == 0
    assert set(out.attentions) == set(model.graph.links)


def test_only_layers_that_taps_read_are_kept_and_no_padding(folder: Path) -> None:
    model, batches = fused(), data()
    kept = mt.train.KeptStates.compute(model, [*batches, *batches], folder)
    assert brought(kept(batches[0])) == {"speech layer 1", "speech layer 3", "image layer 2"}
    tokens = sum(int(batch["streams"]["speech"]["mask"].sum()) for batch in batches)
    stored = load_file(folder / "speech-00001.safetensors")
    assert {name: tuple(each.shape) for name, each in stored.items() if name.startswith("layer")} == {
        "layer 1": (tokens, 12),
        "layer 3": (tokens, 12),
    }
    assert int(stored["lengths"].sum()) == tokens


def test_states_may_be_in_many_files(folder: Path) -> None:
    model, batches = fused(), data()
    mt.train.KeptStates.compute(model, batches, folder, max_shard_size=200)
    assert len(list(folder.glob("speech-*"))) > 3
    kept = mt.train.KeptStates(folder, model)
    assert same(trained(model, list(map(kept, batches))), trained(model, batches))


def test_rows_in_other_company_agree_to_rounding(folder: Path) -> None:
    model = fused(torch.float64)
    kept = mt.train.KeptStates.compute(model, data(4, rows=3), folder)
    for batch in data(3, rows=4):
        torch.testing.assert_close(model(**kept(batch)).loss, model(**batch).loss)


def test_a_row_has_what_the_first_batch_with_it_gave(folder: Path) -> None:
    model = fused()
    batches = [mt.collate([row(1), row(2)]), mt.collate([row(2), row(4), row(2)])]
    kept = mt.train.KeptStates.compute(model, batches, folder)
    first, later = (kept(batch)["streams"]["speech"]["layer 1"] for batch in batches)
    real = [batch["streams"]["speech"]["mask"] for batch in batches]
    assert torch.equal(first[real[0]], model.run(batches[0]["streams"]).given["speech", 1][real[0]])
    assert torch.equal(later[0][real[1][0]], first[1][real[0][1]])
    assert not first[~real[0]].any()
    assert not later[~real[1]].any()


@st.composite
def cases(draw: st.DrawFn) -> tuple[mt.FusedModel, list[Batch]]:
    """Draw a graph, freeze its towers that read no other, without input adapters, and draw batches."""
    declared = draw(graphs())
    towers = dict(declared.compile().towers.items())
    links = declared.links.values()
    targets = {link.target for link in links}
    sources = sorted({link.source for link in links} - targets)
    assume(sources)
    torch.manual_seed(0)
    model = mt.FusedModel(redeclared(declared, sources, train="none", adapter=None), towers)  # type: ignore[arg-type]  # a ModuleDict's values are towers here
    vocabularies = {name: tower.vocab_size for name, tower in towers.items()}
    rows = draw(st.lists(examples(vocabularies), min_size=1, max_size=3))
    return open_links(model.eval(), seed=1), list(map(mt.collate, rows))


@FEWER
@given(cases())
def test_over_all_graphs_losses_and_gradients_are_the_same(
    case: tuple[mt.FusedModel, list[Batch]],
) -> None:
    model, batches = case
    assume(
        any(name in batch["streams"] for batch in batches for name in model.towers if constant(model, name))
    )
    with tempfile.TemporaryDirectory() as place:
        kept = mt.train.KeptStates.compute(model, batches, place)
        for batch in batches:
            ready = kept(batch)
            for logits in (True, False):
                found, expected = (gradients(model, each, logits) for each in (ready, batch))
                assert found.keys() == expected.keys()
                for name, value in found.items():
                    assert_close(value, expected[name], name, rounding(model))


def constant(model: mt.FusedModel, name: str) -> bool:
    read = any(link.source == name for link in model.graph.links.values())
    return read and not why_not_constant(model.graph, name)


def gradients(model: mt.FusedModel, batch: Batch, logits: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**batch, logits=logits)
    if out.loss.requires_grad:
        out.loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": out.loss.detach(), **out.losses, **found}


def test_kept_once_for_all_rows_that_are_the_same(folder: Path) -> None:
    twin = [segment("speech", 3, 4), segment("text", 5, target=True)]
    kept = mt.train.KeptStates.compute(fused(), [mt.collate([twin, twin]), mt.collate([twin])], folder)
    assert load_file(folder / "speech-00001.safetensors")["layer 1"].shape == (4, 12)
    assert kept(mt.collate([twin, twin]))["streams"]["speech"]["layer 1"].shape == (2, 4, 12)


def test_a_stream_with_labels_is_left_as_it_is(folder: Path) -> None:
    model, batch = (
        fused(),
        mt.collate([[segment("speech", 3, 4, target=True), segment("text", 5, target=True)]]),
    )
    kept = mt.train.KeptStates.compute(model, [batch], folder)
    assert not brought(kept(batch))
    assert kept(batch)["streams"]["speech"] is batch["streams"]["speech"]


def test_an_unknown_row_is_described(folder: Path) -> None:
    kept = mt.train.KeptStates.compute(fused(), data(), folder)
    batch = mt.collate([[segment("text", 5)], [segment("speech", 9, 9, 9, 9), segment("text", 5)]])
    with pytest.raises(
        ValueError, match=r"states of row 1 \(6 tokens, the first of them 1, 9, 9, 9\) of stream 'speech'"
    ):
        kept(batch)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on machines with one core
def test_workers_of_a_loader_read_the_files(folder: Path) -> None:
    model = fused()
    kept = mt.train.KeptStates.compute(model, data(2), folder)
    groups = [[row(number) for number in range(3)], [row(number) for number in range(3, 6)]]
    loader = DataLoader(
        groups,  # type: ignore[arg-type]  # a list is a data set
        batch_size=None,
        collate_fn=Ready(kept),
        num_workers=2,
        multiprocessing_context=savers.CONTEXT,
    )
    assert same(trained(model, list(loader)), trained(model, data(2)))


class Ready:
    """A collate function that adds the cached states."""

    def __init__(self, kept: mt.train.KeptStates) -> None:
        self.kept = kept

    def __call__(self, rows: list[list[mt.Segment]]) -> Batch:
        return self.kept(mt.collate(rows))


@pytest.mark.parametrize("use", [True, False])
def test_the_trainer_takes_batches_with_states(folder: Path, use: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the Trainer needs transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    model, rows = fused(), [row(number) for number in range(6)]
    kept = mt.train.KeptStates.compute(model, data(2), folder)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder.parent / "run"),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["streams"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    collator = Ready(kept) if use else mt.collate
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
