"""Columns of real data sets: mapped in processes, streamed, mixed, cached on disk, loaded, resumed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multitower as mt
from letters import Letters
from models import causal_lm, pair
from multitower.train import Collator, encode_columns

datasets = pytest.importorskip("datasets", reason="columns need datasets")

MODALITIES = {"speech": Letters(), "text": Letters()}
COLUMNS = {"heard": "speech", "said": "text"}
ROWS = [
    {"heard": ("abcdefgh" * 3)[: 1 + each * 5 % 19], "said": "hgf"[each % 3 :], "id": each}
    for each in range(24)
]
TARGETS = ["said"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def csv(tmp_path: Path) -> str:
    lines = [",".join(map(str, row.values())) for row in ROWS]
    (tmp_path / "metadata.csv").write_text("\n".join(["heard,said,id", *lines]) + "\n")
    return str(tmp_path / "metadata.csv")


def encoded(dataset: Any, targets: list[str] = TARGETS, **options: Any) -> Any:
    return encode_columns(dataset, COLUMNS, MODALITIES, targets=targets, **options)


EXPECTED = encoded(ROWS)


# Datasets forks.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_processes_encode_alike(csv: str) -> None:
    data = datasets.load_dataset("csv", data_files=csv, split="train")
    found = encoded(data, num_proc=2)
    assert found.column_names == ["segments", "length"]
    assert list(found) == EXPECTED
    assert [row["length"] for row in found] == [len(row["heard"]) + len(row["said"]) + 4 for row in ROWS]


def test_streams_of_files_are_encoded(csv: str) -> None:
    found = encoded(datasets.load_dataset("csv", data_files=csv, split="train", streaming=True))
    assert list(found) == EXPECTED


def test_streams_are_encoded_as_they_come() -> None:
    asked = []

    def rows() -> Iterator[dict[str, Any]]:
        for row in ROWS:
            asked.append(row["id"])
            yield row

    found = encoded(datasets.IterableDataset.from_generator(rows))
    assert not asked, "rows were read before they were requested"
    assert list(islice(found, 3)) == EXPECTED[:3]
    assert len(asked) < len(ROWS)
    assert list(found) == EXPECTED


@pytest.mark.parametrize("streamed", [False, True])
def test_tasks_are_mixed_by_weights(streamed: bool) -> None:
    data = datasets.Dataset.from_list(ROWS)
    if streamed:
        data = data.to_iterable_dataset()
    tasks = [encoded(data, TARGETS), encoded(data, ["heard"])]

    def mixed(seed: int) -> list[dict[str, Any]]:
        return list(datasets.interleave_datasets(tasks, probabilities=[0.8, 0.2], seed=seed))

    found = mixed(0)
    assert found == mixed(0) != mixed(1)
    written = [row["segments"][1]["target"] for row in found]
    assert len(ROWS) / 2 < sum(written) < len(written)
    batch = Collator()(found)
    for name, places in (("text", written), ("speech", [not each for each in written])):
        assert (batch["streams"][name]["labels"] >= 0).any(1).tolist() == places


def sounds_and_words(folder: str) -> list[Any]:
    """Encode the data of a folder twice; return the first's cache file, the file's time, and the rows."""
    from multitower_speech import SpeechModality
    from multitower_text import TextModality

    modalities = {
        "speech": SpeechModality.from_pretrained(f"{folder}/speech"),
        "text": TextModality.from_pretrained(f"{folder}/text"),
    }
    data = datasets.load_dataset("csv", data_files=f"{folder}/metadata.csv", split="train")
    found, again = (encode_columns(data, COLUMNS, modalities, targets=TARGETS) for _ in range(2))
    assert found._fingerprint == again._fingerprint
    file = found.cache_files[0]["filename"]
    return [file, Path(file).stat().st_mtime_ns, list(found)]


def test_what_was_encoded_is_kept_on_disk(tmp_path: Path, cache: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
    speech = pytest.importorskip("multitower_speech", reason="needs multitower_speech").SpeechModality
    text = pytest.importorskip("multitower_text", reason="needs multitower_text").TextModality
    tokenizers, transformers = (
        pytest.importorskip("tokenizers", reason="needs tokenizers"),
        pytest.importorskip("transformers", reason="needs transformers"),
    )
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "one": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    text(transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)).save_pretrained(
        tmp_path / "text"
    )
    speech(torch.randn(1, 16, 160)).save_pretrained(tmp_path / "speech")
    soundfile.write(tmp_path / "clip.wav", np.random.default_rng(0).normal(scale=0.1, size=16_000), 16_000)
    (tmp_path / "metadata.csv").write_text(f"heard,said\n{tmp_path / 'clip.wav'},one two\n")

    here = sounds_and_words(str(tmp_path))
    assert {each["tower"] for each in here[2][0]["segments"]} == {"speech", "text"}
    script = "import json, sys, test_columns; print(json.dumps(test_columns.sounds_and_words(sys.argv[1])))"
    environment = {
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "HF_DATASETS_CACHE": str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == here


def test_what_another_modality_gives_is_encoded_anew(csv: str) -> None:
    data = datasets.load_dataset("csv", data_files=csv, split="train")
    first, again = encoded(data), encoded(data)
    other = encode_columns(data, COLUMNS, {**MODALITIES, "text": Letters(12, 13)}, targets=TARGETS)
    assert first.cache_files == again.cache_files != other.cache_files
    assert first[0]["segments"][1]["tokens"] != other[0]["segments"][1]["tokens"]
    named = [encoded(data, new_fingerprint=name) for name in ("mine", "mine", "other")]
    assert [each._fingerprint for each in named] == ["mine", "mine", "other"]


def arguments(folder: Path, **options: Any) -> Any:
    import transformers

    settings: dict[str, Any] = {
        "max_steps": 6,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(str(folder), **{**settings, **options})


def model() -> mt.FusedModel:
    return pair(causal_lm("llama"), causal_lm("qwen3", depth=4, vocab_size=14), train="all")


def test_the_trainer_takes_rows_of_alike_length(csv: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from multitower.train import Trainer

    rows = encoded(datasets.load_dataset("csv", data_files=csv, split="train"))
    data, spread = datasets.concatenate_datasets([rows] * 10), {}
    for strategy in ("random", "group_by_length"):
        trainer = Trainer(model(), arguments(tmp_path, train_sampling_strategy=strategy), train_dataset=data)
        masks = [
            torch.cat([stream["mask"] for stream in batch["streams"].values()], 1)
            for batch in trainer.get_train_dataloader()
        ]
        assert sum(len(mask) for mask in masks) == len(data)
        lengths = [mask.sum(1) for mask in masks]
        spread[strategy] = sum(int(each.max() - each.min()) for each in lengths)
    assert spread["group_by_length"] < spread["random"] / 2
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_rows_are_packed_in_the_trainer(csv: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from multitower.train import Trainer

    data = encoded(datasets.load_dataset("csv", data_files=csv, split="train"))
    padded, seen = model(), []
    packed = copy.deepcopy(padded)
    collate = Collator(packed=True)

    def noted(rows: list[Any]) -> Any:
        batch = collate(rows)
        seen.append(len(batch["streams"]["text"]["tokens"]))
        return batch

    settings = arguments(tmp_path, max_steps=3, per_device_train_batch_size=8)
    Trainer(padded, settings, train_dataset=data).train()
    Trainer(packed, settings, train_dataset=data, data_collator=noted).train()
    assert min(seen) < 8, "no batch was packed"
    state = packed.state_dict()
    for name, tensor in padded.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
@pytest.mark.parametrize("streamed", [False, True])
def test_an_epoch_is_resumed_in_the_middle(csv: str, tmp_path: Path, streamed: bool) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    data = encoded(datasets.load_dataset("csv", data_files=csv, split="train", streaming=streamed))
    options = {} if streamed else {"shuffle": True, "generator": torch.Generator().manual_seed(5)}

    def loader() -> Any:
        return stateful.StatefulDataLoader(data, batch_size=5, collate_fn=Collator(), **options)

    def tokens(batches: Any) -> list[Any]:
        return [
            {name: stream["tokens"].tolist() for name, stream in batch["streams"].items()}
            for batch in batches
        ]

    first = loader()
    begun = iter(first)
    before = tokens(islice(begun, 2))
    torch.save(first.state_dict(), tmp_path / "loader.pt")
    rest = tokens(begun)
    second = loader()
    second.load_state_dict(torch.load(tmp_path / "loader.pt"))
    assert tokens(second) == rest
    assert len(before) == 2
    assert len(rest) == 3
    rows = [row for batch in before + rest for row in batch["text"]]
    assert len(rows) == len(ROWS)


def test_columns_that_nothing_encodes_are_refused() -> None:
    for value in ("a.wav", 3, [1.5], []):
        with pytest.raises(
            TypeError, match=r"no modality for 'speech', and this \w+ is no list of token ids"
        ):
            encode_columns([{"audio": value}], {"audio": "speech"}, targets=[])
    with pytest.raises(ValueError, match=r"targets \['answer'\] are none of the columns \['audio'\]"):
        encode_columns([], {"audio": "speech"}, {"speech": None}, targets=["answer"])
    with pytest.raises(ValueError, match="a row has no column 'said'; it has 'heard'"):
        encoded([{"heard": "a"}])


def test_token_ids_are_taken_as_they_are() -> None:
    rows = [{"units": list(torch.tensor([1, 5, 2]).numpy()), "words": torch.tensor([1, 7, 2])}]
    (row,) = encode_columns(rows, {"units": "speech", "words": "text"}, targets=["words"])
    assert [(each["tower"], each["tokens"]) for each in row["segments"]] == [
        ("speech", [1, 5, 2]),
        ("text", [1, 7, 2]),
    ]


def test_a_segment_of_no_tower_is_named() -> None:
    batch = mt.collate([[mt.Segment("unit", [1, 2])]])
    with pytest.raises(ValueError, match="there is a stream for 'unit', but the towers are speech, text"):
        mt.batch.to_device(batch, {"speech": "cpu", "text": "cpu"})


def test_what_is_imported_late_stays_what_it_is() -> None:
    import multitower.train

    for _ in range(2):
        assert multitower.train.shard.__name__ == "shard"
        assert multitower.train.Trainer.__name__ == "Trainer"


def test_a_tokenizer_is_a_modality_of_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "h": 3}, "<unk>")
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    rows = [{"heard": "ab", "said": "h"}]
    (row,) = encode_columns(rows, COLUMNS, {"speech": Letters(), "text": tokenizer}, targets=TARGETS)
    assert row["segments"][1] == {"tower": "text", "tokens": [0, 3, 1], "target": True}
    pair().save_pretrained(tmp_path / "fused", modalities={"text": tokenizer})
    saved = json.loads((tmp_path / "fused/fusion.json").read_text())["modalities"]
    assert saved["text"]["modality"] == "text"


def test_mistakes_are_told() -> None:
    with pytest.raises(TypeError, match=r"targets is a list of columns: targets=\['said'\]"):
        encode_columns(ROWS, COLUMNS, MODALITIES, targets="said")
    with pytest.raises(ValueError, match="columns says which tower each column of the data set goes to"):
        encode_columns(ROWS, {"speech": "heard"}, MODALITIES, targets=["heard"])
    with pytest.raises(TypeError, match=r"the modality of 'text' is a str.*TextModality\('text'\)"):
        encode_columns(ROWS, COLUMNS, {**MODALITIES, "text": "a/folder"}, targets=TARGETS)
    with pytest.raises(TypeError, match=r"num_proc: options are those of Dataset\.map; this is list"):
        encode_columns(ROWS, COLUMNS, MODALITIES, targets=TARGETS, num_proc=2)
    with pytest.raises(ValueError, match="no 'segments'; have multitower"):
        Collator()(ROWS)
    with pytest.raises(ValueError, match="there is no letter") as caught:
        encoded([{"heard": "", "said": "h"}])
    assert caught.value.__notes__ == ["raised for tower 'speech' in column 'heard'"]


def test_a_dictionary_of_splits_is_refused() -> None:
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"units": [1, 2]}])})
    with pytest.raises(ValueError, match=r"one split.* train"):
        encode_columns(rows, {"units": "speech"}, targets=["units"])
