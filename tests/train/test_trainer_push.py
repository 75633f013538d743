"""What the Trainer pushes to the Hub, which is a folder here."""

from __future__ import annotations

import inspect
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import multitower as mt
from letters import Letters
from models import EXAMPLES, causal_lm, pair
from multitower.errors import CheckpointError

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the Trainer pushes to the Hub")
transformers = pytest.importorskip("transformers", reason="the Trainer needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from multitower.train import Trainer  # an extra

REPO = "me/fused"


class Uploads:
    """A fake HfApi that keeps a copy of each uploaded folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.messages, self.private = root, [], None

    def create_repo(self, repo_id: str, *, token: Any, private: bool | None, exist_ok: bool) -> Any:
        self.private = private
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, **options: Any) -> Any:
        inspect.signature(huggingface_hub.HfApi.upload_folder).bind(self, **options)
        assert options["repo_id"] == REPO
        place = self.root / str(len(self.messages))
        shutil.copytree(
            options["folder_path"], place, ignore=shutil.ignore_patterns(*options["ignore_patterns"])
        )
        self.messages.append(options["commit_message"])
        done: Future[None] = Future()
        done.set_result(None)
        return done if options["run_as_future"] else "https://huggingface.co/me/fused/commit/1"

    def pushed(self, number: int) -> mt.FusedModel:
        return mt.FusedModel.from_pretrained(self.root / str(number))


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uploads:
    found = Uploads(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: found)
    return found


def trainer(folder: Path, **options: Any) -> Trainer:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        push_to_hub=True,
        hub_model_id=REPO,
        hub_private_repo=True,
        **options,
    )
    torch.manual_seed(0)
    model = pair(causal_lm("llama"), causal_lm("qwen3", depth=4, vocab_size=14), train="all")
    return Trainer(model, arguments, train_dataset=EXAMPLES, modalities={"speech": Letters()})


def assert_same(found: mt.FusedModel, expected: mt.FusedModel) -> None:
    state = found.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_each_push_is_a_fused_checkpoint_that_is_read(tmp_path: Path, uploads: Uploads) -> None:
    run = trainer(tmp_path / "run")
    run.train()
    assert uploads.private is True
    assert uploads.messages == ["Training in progress, step 1", "Training in progress, step 2"]
    for number in range(2):
        assert_same(
            uploads.pushed(number),
            mt.FusedModel.from_pretrained(tmp_path / "run" / f"checkpoint-{number + 1}"),
        )
    run.save_model()
    assert uploads.messages[-1] == "Model save"
    assert_same(uploads.pushed(2), run.model)
    assert "# fused" in (uploads.root / "2" / "README.md").read_text()
    run.push_to_hub(license="apache-2.0")
    assert uploads.messages[-1] == "End of training"
    assert "license: apache-2.0" in (uploads.root / "3" / "README.md").read_text()
    assert_same(uploads.pushed(3), run.model)
    pipe = mt.Pipeline.from_pretrained(uploads.root / "3", modalities={"speech": Letters()})
    assert pipe.modalities.keys() == {"speech"}


def test_what_is_pushed_at_the_end_alone_is_not_saved_before(tmp_path: Path, uploads: Uploads) -> None:
    run = trainer(tmp_path / "run", hub_strategy="end")
    run.train()
    assert not uploads.messages
    assert not (tmp_path / "run" / "fusion.json").exists()
    run.push_to_hub()
    assert_same(uploads.pushed(0), run.model)


def test_no_path_is_published(tmp_path: Path, uploads: Uploads) -> None:
    causal_lm("llama").save_pretrained(tmp_path / "secret")
    graph = mt.FusionGraph()
    graph.add_tower("text", tmp_path / "secret", train="all")
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), push_to_hub=True, hub_model_id=REPO, report_to=[], use_cpu=True
    )
    Trainer(graph.compile(), arguments).save_model()
    written = [file for file in (tmp_path / "run").rglob("*.json") if "secret" in file.read_text()]
    assert uploads.messages
    assert not written


def test_frozen_towers_from_folders_are_not_published_unasked(tmp_path: Path, uploads: Uploads) -> None:
    causal_lm("llama").save_pretrained(tmp_path / "mine")
    graph = mt.FusionGraph()
    graph.add_tower("text", tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"'text' \(.*mine\) come from paths.*embed_towers=True"):
        Trainer(graph.compile(), transformers.TrainingArguments(str(tmp_path / "run"), push_to_hub=True))
    assert not uploads.messages
