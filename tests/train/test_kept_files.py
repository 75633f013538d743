"""Cached states that are damaged or of another model raise an error."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import multitower as mt
import savers
from frozen_sources import brought, data, fused
from models import segment
from multitower.batch.collate import Batch
from multitower.testing import tiny_tower


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "place" / "states"


def test_a_pickle_is_small_and_knows_when_the_folder_was_replaced(folder: Path) -> None:
    model, batches = fused(), data()
    kept = mt.train.KeptStates.compute(model, batches, folder)
    pickled = pickle.dumps(kept)
    assert len(pickled) < 2000
    before = kept(batches[0])["streams"]["speech"]["layer 3"]
    assert torch.equal(pickle.loads(pickled)(batches[0])["streams"]["speech"]["layer 3"], before)
    other = fused(speech=tiny_tower(9, depth=4, width=12, vocab_size=14))
    mt.train.KeptStates.compute(other, batches, folder)
    assert torch.equal(kept(batches[0])["streams"]["speech"]["layer 3"], before)  # still mapped
    with pytest.raises(mt.errors.CheckpointError, match="was replaced by other states"):
        pickle.loads(pickled)


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
    mt.train.KeptStates.compute(fused(), data(1), folder)
    with pytest.raises(mt.errors.CheckpointError, match=message):
        mt.train.KeptStates(folder, fused(**changed))


def test_a_source_that_reads_others_is_refused(folder: Path) -> None:
    model, batches = fused(), data(1)
    ready = mt.train.KeptStates.compute(model, batches, folder)(batches[0])
    graph = model.graph
    graph.add_link("text", "speech", taps=[(1, 4)])
    bigger = model.extend(graph)
    with pytest.raises(
        mt.errors.CheckpointError, match="in this model it reads others through 'text->speech'"
    ):
        mt.train.KeptStates(folder, bigger)
    with pytest.raises(ValueError, match=r"'speech' brings states, but tower 'speech' reads others through"):
        bigger(**ready)
    assert "image layer 2" in brought(mt.train.KeptStates.compute(bigger, batches, folder)(batches[0]))


def test_a_tower_that_is_thawed_by_hand_is_refused(folder: Path) -> None:
    model = fused()
    mt.train.KeptStates.compute(model, data(1), folder)
    for change, undo, reason in (
        (
            lambda tower: tower.requires_grad_(True),
            lambda tower: tower.requires_grad_(False),
            "requires_grad",
        ),
        (lambda tower: tower.train(), lambda tower: tower.eval(), "is in training mode"),
    ):
        change(model.tower("image"))
        with pytest.raises(
            mt.errors.CheckpointError, match=f"tower 'image', but in this model it .*{reason}"
        ):
            mt.train.KeptStates(folder, model)
        undo(model.tower("image"))
    assert mt.train.KeptStates(folder, model)


def test_a_model_without_such_sources_is_told_why(folder: Path) -> None:
    model = fused(adapter="gated").drop("image")
    with pytest.raises(ValueError, match=r"'speech' has an input adapter.*; tower 'text' is trained"):
        mt.train.KeptStates.compute(model, data(1), folder)
    with pytest.raises(ValueError, match="no tokens of tower 'image', 'speech'"):
        mt.train.KeptStates.compute(fused(), [mt.collate([[segment("text", 3)]])], folder)
    assert os.listdir(folder.parent) == []


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layer 3", (3, 5, 12), r"layer 3 has shape \(3, 5, 12\) and tokens has .* \(batch, length, width\)"),
        ("layer 3", None, r"stream 'speech': layer 3 has shape"),
        ("layer 3", 11, r"brings states of shape .*, but tower 'speech' is 12 wide"),
        ("layer 5", 12, r"brings states of 'layer 5', but tower 'speech' has layers 0 to 4"),
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


@pytest.mark.parametrize("damage", ["index", "file", "other file", "version", "no file", "no index"])
def test_damaged_folders_are_refused(folder: Path, damage: str) -> None:
    model = fused()
    mt.train.KeptStates.compute(model, data(1), folder)
    index, file = folder / "kept.json", folder / "speech-00001.safetensors"
    if damage == "index":
        index.write_text(index.read_text().replace('"files"', '"flies"'))
    elif damage == "file":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "other file":
        file.write_bytes((folder / "image-00001.safetensors").read_bytes())
    elif damage == "version":
        index.write_text(index.read_text().replace('"format_version": 1', '"format_version": 2'))
    else:
        (file if damage == "no file" else index).unlink()
    with pytest.raises(
        mt.errors.CheckpointError, match=f"{folder}.* (damaged|missing|version 2|contains no states)"
    ):
        mt.train.KeptStates(folder, model)


def test_broken_off_nothing_is_there_or_what_was_there(folder: Path) -> None:
    model, batches = fused(), data()

    def broken() -> Iterator[Batch]:
        yield from batches
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mt.train.KeptStates.compute(model, broken(), folder, max_shard_size=100)
    assert os.listdir(folder.parent) == []
    mt.train.KeptStates.compute(model, batches, folder)
    with pytest.raises(KeyboardInterrupt):
        mt.train.KeptStates.compute(model, broken(), folder, max_shard_size=100)
    assert os.listdir(folder.parent) == ["states"]
    assert brought(mt.train.KeptStates(folder, model)(batches[0]))


def compute_and_die(folder: Path, file_size: int | None) -> None:
    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))

    def batches() -> Iterator[Batch]:
        yield from data()
        if file_size is None:
            os._exit(9)

    try:
        mt.train.KeptStates.compute(fused(), batches(), folder, max_shard_size=100)
    except mt.errors.CheckpointError as error:
        os._exit(7 if str(error).startswith(f"cannot keep states in {folder}, which is as it was: ") else 1)


@pytest.mark.parametrize(("file_size", "code"), [(None, 9), (200, 7)])
def test_killed_or_out_of_space_what_was_there_stays(folder: Path, file_size: int | None, code: int) -> None:
    model = fused()
    mt.train.KeptStates.compute(model, data(1), folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    child = savers.CONTEXT.Process(target=compute_and_die, args=(folder, file_size))
    child.start()
    child.join()
    assert child.exitcode == code
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    mt.train.KeptStates.compute(model, data(), folder)
    assert os.listdir(folder.parent) == ["states"]


def test_other_folders_are_not_replaced(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis").write_text("mine")
    with pytest.raises(mt.errors.CheckpointError, match=r"is not empty and contains no kept\.json"):
        mt.train.KeptStates.compute(fused(), data(1), folder)
    with pytest.raises(mt.errors.CheckpointError, match="thesis is a file"):
        mt.train.KeptStates.compute(fused(), data(1), folder / "thesis")
