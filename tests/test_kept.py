"""Training from kept states of frozen sources is training with the sources, only faster."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import multitower as mt
import savers
from models import causal_lm, segment
from multitower.graph import redeclared
from multitower.stream import Batch
from multitower.testing import open_gates, tiny_tower
from multitower.testing.strategies import examples, graphs

FEWER = settings(max_examples=settings().max_examples // 2)


def fused(
    dtype: torch.dtype = torch.float32,
    *,
    speech: torch.nn.Module | None = None,
    adapter: str | None = None,
    train: str = "none",
    layers: tuple[int, ...] = (1, 3),
) -> mt.FusedModel:
    """Two frozen sources, of which "speech" is read by two links, and a trained tower."""
    graph = mt.FusionGraph()
    speech = speech or tiny_tower(1, depth=4, width=12, vocab_size=14).to(dtype)
    graph.add_tower("speech", speech, adapter=adapter, train=train)
    graph.add_tower("image", tiny_tower(2, depth=2, width=6).to(dtype), adapter=None)
    graph.add_tower("text", tiny_tower(3, depth=3, width=8, vocab_size=20).to(dtype), train="all")
    graph.add_link("speech", "text", taps=[(layer, 1 + layer % 3) for layer in layers])
    graph.add_link("speech", "text", taps=[(layers[0], 1)], name="again", position="rotary")
    graph.add_link("image", "text", taps=[(2, 3)], window=5)
    torch.manual_seed(5)
    return open_gates(graph.compile(), seed=7)


def row(seed: int) -> list[mt.Segment]:
    """One of a few rows, of unlike length, some without one of the sources; the same for the same seed."""
    draw = random.Random(seed)
    parts = [
        segment("speech", *(draw.randint(2, 13) for _ in range(draw.randint(0, 9)))),
        segment("text", *(draw.randint(2, 19) for _ in range(draw.randint(1, 7))), target=True),
        segment("image", *(draw.randint(2, 15) for _ in range(draw.randint(0, 5)))),
        segment("text", *(draw.randint(2, 19) for _ in range(draw.randint(1, 7))), target=True),
    ]
    return parts if draw.random() < 0.8 else parts[1:]


def data(batches: int = 4, rows: int = 3) -> list[Batch]:
    return [mt.collate([row(rows * number + each) for each in range(rows)]) for number in range(batches)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "place" / "states"


def brought(batch: Batch) -> set[str]:
    return {f"{name} {key}" for name, each in batch["streams"].items() for key in each if key[:5] == "layer"}


def trained(model: mt.FusedModel, batches: list[Batch], *, logits: bool = True) -> list[torch.Tensor]:
    """Train a copy for a step a batch; give all its parameters."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    for batch in batches:
        optimizer.zero_grad()
        model(**batch, logits=logits).loss.backward()
        optimizer.step()
    return list(model.parameters())


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_the_same_bit_for_bit_in_any_order(
    folder: Path, dtype: torch.dtype, logits: bool
) -> None:
    model, batches = fused(dtype), data()
    kept = mt.KeptStates.compute(model, batches, folder)
    order = random.Random(3).choices(batches, k=9)
    assert all("speech layer 3" in brought(kept(batch)) for batch in batches)
    expected = trained(model, order, logits=logits)
    assert same(trained(model, list(map(kept, order)), logits=logits), expected)
    assert not same(expected, list(model.parameters()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_transformers_towers_are_kept(folder: Path, family: str) -> None:
    model, batches = fused(speech=causal_lm(family, depth=4, vocab_size=14)), data()
    kept = mt.KeptStates.compute(model, batches, folder)
    assert same(trained(model, list(map(kept, batches))), trained(model, batches))


def test_of_kept_towers_nothing_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fused(), data(1)[0]
    ready = mt.KeptStates.compute(model, [batch], folder)(batch)
    for name in ("speech", "image"):
        for part in ("embed", "layer", "head"):
            monkeypatch.setattr(model.tower(name), part, lambda *_: pytest.fail("a kept tower runs"))
    out = model(**ready, output_attentions=True)
    assert list(out.logits) == ["text"]
    assert out.losses["speech"] == 0
    assert set(out.attentions) == set(model.graph.links)


def test_only_layers_that_taps_read_are_kept_and_no_padding(folder: Path) -> None:
    model, batches = fused(), data()
    kept = mt.KeptStates.compute(model, [*batches, *batches], folder)
    assert brought(kept(batches[0])) == {"speech layer 1", "speech layer 3", "image layer 2"}
    tokens = sum(int(batch["streams"]["speech"]["mask"].sum()) for batch in batches)
    assert json.loads((folder / "kept.json").read_text())["towers"]["speech"]["shards"] == [tokens]
    size = (folder / "speech-00001.safetensors").stat().st_size
    assert 0 < size - tokens * 2 * 12 * 4 < 300


def test_states_may_be_in_many_files(folder: Path) -> None:
    model, batches = fused(), data()
    mt.KeptStates.compute(model, batches, folder, max_shard_size=200)
    assert len(list(folder.glob("speech-*"))) > 3
    kept = mt.KeptStates(folder, model)
    assert same(trained(model, list(map(kept, batches))), trained(model, batches))


def test_rows_in_other_company_agree_to_rounding(folder: Path) -> None:
    model = fused(torch.float64)
    kept = mt.KeptStates.compute(model, data(4, rows=3), folder)
    for batch in data(3, rows=4):
        torch.testing.assert_close(model(**kept(batch)).loss, model(**batch).loss)


class Moody(mt.Tower):
    """Its states depend a little on who else is in the batch, as rounding does on some machines."""

    depth, width, vocab_size, begin, end = 1, 4, 14, 0, (1,)

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(14, 4)

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(len(tokens))[:, None, None]
        return self.table(tokens), 1 + (tokens.numel() + places) * 2**-20

    def layer(self, index: int, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return hidden * context

    def head(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return hidden @ self.table.weight.T


def test_a_row_has_in_each_batch_what_the_batch_gave_it(folder: Path) -> None:
    model = fused(speech=Moody(), layers=(1,))
    batches = [mt.collate([row(1), row(2)]), mt.collate([row(2), row(1), row(2)])]
    kept = mt.KeptStates.compute(model, batches, folder)
    for batch in batches:
        assert torch.equal(model(**kept(batch)).loss, model(**batch).loss)
    alone = kept(mt.collate([row(2)]))["streams"]["speech"]["layer 1"][0]
    first = kept(batches[0])["streams"]["speech"]["layer 1"][1]
    assert torch.equal(alone, first[: len(alone)])


@st.composite
def cases(draw: st.DrawFn) -> tuple[mt.FusedModel, list[Batch]]:
    """Draw any graph, its towers that read no other frozen and without adapter, and batches."""
    declared = draw(graphs())
    towers = dict(declared.compile().towers.items())
    links = declared.links.values()
    targets = {link.target for link in links}
    sources = sorted({link.source for link in links} - targets)
    assume(sources)
    torch.manual_seed(0)
    model = mt.FusedModel(redeclared(declared, sources, train="none", adapter=None), towers)  # type: ignore[arg-type]
    vocabularies = {name: tower.vocab_size for name, tower in towers.items()}
    rows = draw(st.lists(examples(vocabularies), min_size=1, max_size=3))
    return open_gates(model, seed=1), list(map(mt.collate, rows))


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
        kept = mt.KeptStates.compute(model, batches, place)
        for batch in batches:
            ready = kept(batch)
            for logits in (True, False):
                found, expected = (gradients(model, each, logits) for each in (ready, batch))
                assert found.keys() == expected.keys()
                assert same(list(found.values()), list(expected.values()))


def constant(model: mt.FusedModel, name: str) -> bool:
    links = model.graph.links.values()
    return any(link.source == name for link in links) and not any(link.target == name for link in links)


def gradients(model: mt.FusedModel, batch: Batch, logits: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**batch, logits=logits)
    if out.loss.requires_grad:
        out.loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": out.loss.detach(), **out.losses, **found}


def test_kept_once_for_all_rows_that_are_the_same(folder: Path) -> None:
    model = fused()
    states = [segment("speech", 3, 4), segment("text", 5, target=True)]
    kept = mt.KeptStates.compute(model, [mt.collate([states, states, states])], folder)
    assert json.loads((folder / "kept.json").read_text())["towers"]["speech"]["shards"] == [4]
    assert len(kept(mt.collate([states]))["streams"]["speech"]["layer 1"]) == 1


def test_a_stream_with_labels_is_left_as_it_is(folder: Path) -> None:
    model, batch = (
        fused(),
        mt.collate([[segment("speech", 3, 4, target=True), segment("text", 5, target=True)]]),
    )
    kept = mt.KeptStates.compute(model, [batch], folder)
    assert not brought(kept(batch))
    assert kept(batch)["streams"]["speech"] is batch["streams"]["speech"]


def test_an_unknown_row_is_described(folder: Path) -> None:
    kept = mt.KeptStates.compute(fused(), data(), folder)
    batch = mt.collate([[segment("text", 5)], [segment("speech", 9, 9, 9, 9), segment("text", 5)]])
    with pytest.raises(
        ValueError, match=r"states of row 1 \(6 tokens, the first of them 0, 9, 9, 9\) of stream 'speech'"
    ):
        kept(batch)


def test_workers_of_a_loader_read_the_files(folder: Path) -> None:
    model = fused()
    kept = mt.KeptStates.compute(model, data(2), folder)
    loader = DataLoader(
        [row(number) for number in range(6)],  # type: ignore[arg-type]  # a list is a data set
        batch_size=3,
        collate_fn=Ready(kept),
        num_workers=2,
        multiprocessing_context=savers.CONTEXT,
    )
    assert same(trained(model, list(loader)), trained(model, data(2)))


class Ready:
    """What a user writes as a function."""

    def __init__(self, kept: mt.KeptStates) -> None:
        self.kept = kept

    def __call__(self, rows: list[list[mt.Segment]]) -> Batch:
        return self.kept(mt.collate(rows))


def test_a_pickle_is_small_and_knows_when_the_folder_was_replaced(folder: Path) -> None:
    model, batches = fused(), data()
    kept = mt.KeptStates.compute(model, batches, folder)
    pickled = pickle.dumps(kept)
    assert len(pickled) < 2000
    before = kept(batches[0])["streams"]["speech"]["layer 3"]
    assert torch.equal(pickle.loads(pickled)(batches[0])["streams"]["speech"]["layer 3"], before)
    mt.KeptStates.compute(model, batches[:1], folder)
    assert torch.equal(kept(batches[0])["streams"]["speech"]["layer 3"], before)  # still mapped
    with pytest.raises(mt.CheckpointError, match="was replaced by other states"):
        pickle.loads(pickled)


@pytest.mark.parametrize("use", [True, False])
def test_the_trainer_takes_batches_with_states(folder: Path, use: bool) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    model, rows = fused(), [row(number) for number in range(6)]
    kept = mt.KeptStates.compute(model, data(2), folder)
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": "all"}, r"tower 'speech', but in this model it is trained \(train='all'\)"),
        ({"adapter": "gated"}, r"tower 'speech', but in this model it has an input adapter"),
        ({"layers": (1, 2, 4)}, r"of layers 1, 3, but this model also reads 2, 4"),
        ({"dtype": torch.bfloat16}, "its weights or their dtype are others in this model"),
        (
            {"speech": tiny_tower(9, depth=4, width=12, vocab_size=14)},
            "its weights or their dtype are others",
        ),
    ],
)
def test_another_model_is_refused(folder: Path, changed: dict, message: str) -> None:
    mt.KeptStates.compute(fused(), data(1), folder)
    with pytest.raises(mt.CheckpointError, match=message):
        mt.KeptStates(folder, fused(**changed))


def test_a_source_that_reads_others_is_refused(folder: Path) -> None:
    model, batches = fused(), data(1)
    ready = mt.KeptStates.compute(model, batches, folder)(batches[0])
    graph = model.graph
    graph.add_link("text", "speech", taps=[(1, 4)])
    bigger = graph.extend(model)
    with pytest.raises(mt.CheckpointError, match="in this model it reads others through 'text->speech'"):
        mt.KeptStates(folder, bigger)
    with pytest.raises(ValueError, match=r"'speech' brings states, but tower 'speech' reads others through"):
        bigger(**ready)
    assert "image layer 2" in brought(mt.KeptStates.compute(bigger, batches, folder)(batches[0]))


def test_a_tower_that_is_thawed_by_hand_is_refused(folder: Path) -> None:
    model = fused()
    mt.KeptStates.compute(model, data(1), folder)
    for change, undo, reason in (
        (
            lambda tower: tower.requires_grad_(True),
            lambda tower: tower.requires_grad_(False),
            "requires_grad",
        ),
        (lambda tower: tower.train(), lambda tower: tower.eval(), "is in training mode"),
    ):
        change(model.tower("image"))
        with pytest.raises(mt.CheckpointError, match=f"tower 'image', but in this model it .*{reason}"):
            mt.KeptStates(folder, model)
        undo(model.tower("image"))
    assert mt.KeptStates(folder, model)


def test_a_model_without_such_sources_is_told_why(folder: Path) -> None:
    model = fused(adapter="gated").drop("image")
    with pytest.raises(ValueError, match=r"'speech' has an input adapter.*; tower 'text' is trained"):
        mt.KeptStates.compute(model, data(1), folder)
    with pytest.raises(ValueError, match="no tokens of tower 'image', 'speech'"):
        mt.KeptStates.compute(fused(), [mt.collate([[segment("text", 3)]])], folder)
    assert os.listdir(folder.parent) == []


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layer 3", (3, 5, 12), r"layer 3 has shape \(3, 5, 12\) and tokens has .* \(batch, length, width\)"),
        ("layer 3", None, r"stream 'speech': layer 3 has shape"),
        ("layer 3", 11, r"brings states of shape .*, but tower 'speech' is 12 wide"),
        ("layer 5", 12, r"brings states of 'layer 5', but tower 'speech' has layers 1 to 4"),
        ("layer one", 12, r"brings states of 'layer one'"),
    ],
)
def test_states_that_do_not_fit_are_named(name: str, shape: tuple | int | None, message: str) -> None:
    stream = (batch := data(1)[0])["streams"]["speech"]
    own = tuple(stream["tokens"].shape)
    full = shape if isinstance(shape, tuple) else own if shape is None else (*own, shape)
    stream[name] = torch.zeros(full)
    with pytest.raises(ValueError, match=message):
        fused()(**batch)


def test_states_beside_labels_are_refused(folder: Path) -> None:
    model, batch = (
        fused(),
        mt.collate([[segment("speech", 3, 4, target=True), segment("text", 5, target=True)]]),
    )
    batch["streams"]["speech"]["layer 1"] = torch.zeros(1, 4, 12)
    with pytest.raises(
        ValueError, match="'speech' brings states, so that tower 'speech' does not run, and has"
    ):
        model(**batch)


@pytest.mark.parametrize("damage", ["index", "rows", "shard", "version", "no shard", "no index"])
def test_damaged_folders_are_refused(folder: Path, damage: str) -> None:
    model = fused()
    mt.KeptStates.compute(model, data(1), folder)
    index, rows, shard = (
        folder / name for name in ("kept.json", "rows.safetensors", "speech-00001.safetensors")
    )
    if damage == "index":
        index.write_text(index.read_text().replace('"shards"', '"shreds"'))
    elif damage == "rows":
        rows.write_bytes(rows.read_bytes()[:-1] + b"?")
    elif damage == "shard":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "version":
        index.write_text(index.read_text().replace('"format_version": 1', '"format_version": 2'))
    else:
        (shard if damage == "no shard" else index).unlink()
    with pytest.raises(mt.CheckpointError, match=f"{folder}.* (damaged|missing|version 2|holds no states)"):
        mt.KeptStates(folder, model)


def test_broken_off_nothing_is_there_or_what_was_there(folder: Path) -> None:
    model, batches = fused(), data()

    def broken() -> Iterator[Batch]:
        yield from batches
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mt.KeptStates.compute(model, broken(), folder, max_shard_size=100)
    assert os.listdir(folder.parent) == []
    mt.KeptStates.compute(model, batches, folder)
    with pytest.raises(KeyboardInterrupt):
        mt.KeptStates.compute(model, broken(), folder, max_shard_size=100)
    assert os.listdir(folder.parent) == ["states"]
    assert brought(mt.KeptStates(folder, model)(batches[0]))


def compute_and_die(folder: Path, file_size: int | None) -> None:
    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))

    def batches() -> Iterator[Batch]:
        yield from data()
        if file_size is None:
            os._exit(9)

    try:
        mt.KeptStates.compute(fused(), batches(), folder, max_shard_size=100)
    except mt.CheckpointError as error:
        os._exit(7 if str(error).startswith(f"cannot keep states in {folder}, which is as it was: ") else 1)


@pytest.mark.parametrize(("file_size", "code"), [(None, 9), (200, 7)])
def test_killed_or_out_of_space_what_was_there_stays(folder: Path, file_size: int | None, code: int) -> None:
    model = fused()
    mt.KeptStates.compute(model, data(1), folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    child = savers.CONTEXT.Process(target=compute_and_die, args=(folder, file_size))
    child.start()
    child.join()
    assert child.exitcode == code
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    mt.KeptStates.compute(model, data(), folder)
    assert os.listdir(folder.parent) == ["states"]


def test_other_folders_are_not_replaced(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis").write_text("mine")
    with pytest.raises(mt.CheckpointError, match=r"is not empty and holds no kept\.json"):
        mt.KeptStates.compute(fused(), data(1), folder)
    with pytest.raises(mt.CheckpointError, match="is a file"):
        mt.KeptStates.compute(fused(), data(1), folder / "thesis")
