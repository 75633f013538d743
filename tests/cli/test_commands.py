"""Each command on a checkpoint of speech and text, and on bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import multitower as mt
from multitower.cli import main
from spoken_fusion import RATE

soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
yaml = pytest.importorskip("yaml", reason="recipes need PyYAML")

QUIET = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


def recipe(parts: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe that trains the parts, with changed entries."""
    return {
        "output": str(folder / "out"),
        "towers": {
            "speech": {"source": str(parts / "speech"), "train": "all", "modality": str(parts / "units")},
            "text": {"source": str(parts / "text"), "modality": str(parts / "letters")},
        },
        "links": [
            {"source": "speech", "target": "text", "interleave": [1, 2], "embeddings": True},
            {"source": "text", "target": "speech", "interleave": 1},
        ],
        "data": {
            "folder": str(parts / "clips"),
            "columns": {"file_name": "speech", "transcription": "text"},
            "tasks": [["transcription"], ["file_name"]],
            "held_out": 1,
        },
        "history_noise": {"speech": 0.15},
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 2, **QUIET},
        **changes,
    }


def write(folder: Path, document: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    """Check a command's exit status, and that it prints no traceback; return its error message."""
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join("".join(" " if sign in "│╭╮╰╯─" else sign for sign in error).split())


def test_a_checkpoint_is_inspected(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(fused), "--schedule"]) == 0
    shown = " ".join(said(capsys).split())
    for expected in (
        "LlamaForCausalLM",
        "speech->text",
        "gate tanh",
        "stored here",
        "source layer to target layer",
    ):
        assert expected in shown
    assert main(["inspect", str(fused), "--json"]) == 0
    summary = json.loads(said(capsys))
    assert summary["towers"]["text"]["trained"] == 0 < summary["towers"]["speech"]["trained"]
    assert summary["towers"]["speech"]["modality"] == "speech"
    assert list(summary["links"]["text->speech"]["taps"]) == ["0-0", "1-1", "2-2"]
    assert all(opened > 0 for link in summary["links"].values() for opened in link["taps"].values())
    model = mt.FusedModel.from_pretrained(fused)
    assert summary["parameters"] == sum(each.numel() for each in model.parameters())


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify", "check", "draw"):
        assert "fusion.json is missing" in refused(capsys, 1, command, str(tmp_path))


@pytest.mark.parametrize("ending", ["svg", "png", "mmd"])
def test_a_checkpoint_is_drawn(ending: str, fused: Path, tmp_path: Path) -> None:
    picture = tmp_path / f"graph.{ending}"
    assert main(["draw", str(fused), "--output", str(picture)]) == 0
    assert picture.stat().st_size > (60 if ending == "mmd" else 1000)


def test_an_unknown_picture_is_refused(
    fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "abc" in refused(capsys, 1, "draw", str(fused), "--output", str(tmp_path / "graph.abc"))


@pytest.mark.slow
def test_a_graph_is_estimated_as_its_checkpoint(
    fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = tmp_path / "graph.json"
    graph.write_text(mt.FusedModel.from_pretrained(fused).graph.to_json())
    found = []
    for source in (str(fused), str(graph)):
        assert main(["estimate", source, "--tokens", "speech=9", "--tokens", "text=4", "--json"]) == 0
        found.append(json.loads(said(capsys)))
    assert found[0]["links"] == found[1]["links"]
    assert found[0]["total"]["forward_flops"] > 0
    refusal = refused(capsys, 2, "estimate", str(fused), "--tokens", "speach=9")
    assert "'speach=9' is not of the form TOWER=LENGTH with one of the towers speech, text" in refusal


def test_clips_are_transcribed(fused: Path, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [str(parts / "clips" / f"{number}.wav") for number in range(2)]
    assert main(["transcribe", str(fused), *clips, "--json", "--option", "max_new_tokens=4"]) == 0
    rows = json.loads(said(capsys))
    pipe = mt.Pipeline.from_pretrained(fused)
    expected = [pipe([("speech", clip)], output="text", max_new_tokens=4, do_sample=False) for clip in clips]
    assert rows == [{"file": clip, "text": text.strip()} for clip, text in zip(clips, expected, strict=True)]
    assert "there is none at 'nothing.wav'" in refused(capsys, 1, "transcribe", str(fused), "nothing.wav")
    refusal = refused(capsys, 2, "transcribe", str(fused), clips[0], "--from", "smell")
    assert "there is no tower 'smell' with a modality; there are speech, text" in refusal


def test_a_text_is_spoken(fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = tmp_path / "said.wav"
    limit = ["--option", "max_new_tokens=9", "--option", "min_new_tokens=9"]
    assert main(["speak", str(fused), "two", "--save", str(sound), *limit]) == 0
    assert said(capsys) == f"wrote {sound}\n"
    samples, rate = soundfile.read(sound)
    assert rate == RATE
    assert len(samples)
    refusal = refused(capsys, 1, "speak", str(fused), "two", "--save", str(tmp_path / "no" / "said.wav"))
    assert "said.wav cannot be written" in refusal


def test_a_tower_is_decoded(
    fused: Path, parts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["--input", f"speech:{parts / 'clips' / '0.wav'}", "--input", "text:two"]
    options = ["--option", "max_new_tokens=3", "--option", "do_sample=false"]
    assert main(["generate", str(fused), *given, "--output", "text", *options]) == 0
    assert said(capsys)
    answer = tmp_path / "answer.txt"
    told = ["--save", str(answer), "--json"]
    assert main(["generate", str(fused), *given, "--output", "text", *options, *told]) == 0
    assert json.loads(said(capsys)) == {
        "tower": "text",
        "text": answer.read_text(encoding="utf-8"),
        "file": str(answer),
    }
    refusal = refused(capsys, 2, "generate", str(fused), "--input", "two", "--output", "text")
    assert "'two' is not of the form TOWER:VALUE with one of the towers speech, text" in refusal
    refusal = refused(capsys, 1, "generate", str(fused), *given, "--output", "smell")
    assert "there is no tower 'smell'" in refusal
    refusal = refused(capsys, 2, "generate", str(fused), *given, "--output", "text", "--option", "fast")
    assert "'fast' is not of the form NAME=VALUE" in refusal
    refusal = refused(capsys, 1, "generate", str(fused), *given, "--output", "text", "--option", "fats=1")
    assert "fats" in refusal


def test_promises_are_checked(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(fused), "--promise", "identity", "--promise", "causality"]) == 0
    assert [line.split() for line in said(capsys).splitlines()] == [
        ["identity", "holds"],
        ["causality", "holds"],
    ]
    assert "there is no promise 'speed'" in refused(capsys, 1, "check", str(fused), "--promise", "speed")


def test_broken_promises_are_a_failure(
    fused: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from multitower.testing.model import check_model

    def broken(model: Any, examples: Any) -> None:
        raise AssertionError("it is not")

    monkeypatch.setitem(check_model.MODEL_PROMISES, "identity", broken)
    assert main(["check", str(fused), "--promise", "identity", "--json"]) == 1
    assert json.loads(said(capsys)) == {"identity": "it is not"}


def test_a_recipe_is_trained(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    path = write(tmp_path, recipe(parts, tmp_path))
    assert main(["train", path]) == 0
    shown = said(capsys)
    assert "eval_speech_loss" in shown
    assert f"wrote {tmp_path / 'out' / 'fused'}" in shown
    pipe = mt.Pipeline.from_pretrained(tmp_path / "out" / "fused")
    assert pipe.model.is_open("speech->text")
    assert pipe.model.is_open("text->speech")
    assert sorted(pipe.modalities) == ["speech", "text"]
    assert (tmp_path / "out" / "recipe.yaml").read_text() == Path(path).read_text()
    assert "is there already" in refused(capsys, 1, "train", path)


def test_the_kept_recipe_is_trained_again(parts: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    (tmp_path / "out").mkdir()
    document = recipe(parts, tmp_path)
    document["data"]["folder"] = str(shutil.copytree(parts / "clips", tmp_path / "clips"))
    table = tmp_path / "clips/metadata.csv"
    table.write_text("\ufeff" + table.read_text(), encoding="utf-8")  # as Excel does
    document["trainer"] |= {"save_strategy": "steps", "save_steps": 1}
    path = write(tmp_path / "out", {**document, "trainer": {**document["trainer"], "learning_rate": "RATE"}})
    Path(path).write_text(Path(path).read_text().replace("RATE", "3e-3"))
    assert main(["train", path]) == 0


def test_an_earlier_run_is_not_gone_on_with_by_mistake(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    (tmp_path / "out/run/checkpoint-4").mkdir(parents=True)
    path = write(tmp_path, recipe(parts, tmp_path))
    assert "has checkpoints of an earlier run: go on with --resume" in refused(capsys, 1, "train", path)


def test_training_goes_on(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    trainer = {**recipe(parts, tmp_path)["trainer"], "save_strategy": "steps", "save_steps": 1}
    whole = {**recipe(parts, tmp_path, trainer=trainer), "output": str(tmp_path / "whole")}
    assert main(["train", write(tmp_path, whole)]) == 0
    rest = {**whole, "output": str(tmp_path / "rest")}
    (tmp_path / "rest" / "run").mkdir(parents=True)
    (tmp_path / "whole" / "run" / "checkpoint-1").rename(tmp_path / "rest" / "run" / "checkpoint-1")
    assert main(["train", write(tmp_path, rest), "--resume"]) == 0
    capsys.readouterr()
    one, other = (mt.FusedModel.from_pretrained(tmp_path / name / "fused") for name in ("whole", "rest"))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tower": {}}, "there is no entry 'tower'; the entries are output, towers, links, data"),
        ({"links": None}, "'links' is missing"),
        ({"links": [{"source": "speech", "target": "text", "interleaf": 1}]}, "no entry 'interleaf'"),
        ({"links": [{"source": "speech", "target": "smell", "interleave": 1}]}, "there is no tower 'smell'"),
        ({"data": {"folder": "x"}}, "'columns' is missing; 'tasks' is missing"),
        ({"data": {"columns": {"a": "text"}, "tasks": [["a"]]}}, "give either folder or dataset"),
        ({"data": {"folder": "x", "columns": {"a": "text"}, "tasks": [["b"]]}}, "no list of columns among a"),
        (
            {"data": {"folder": "x", "columns": {"a": "smell"}, "tasks": [["a"]]}},
            "'smell', which is no tower",
        ),
        ({"trainer": {"max_stepps": 2}}, "max_stepps"),
        ({"trainer": 3}, "trainer is 3, and no mapping"),
        ({"towers": {"speech": None}}, "'speech' is None, and no mapping"),
        ({"links": {"source": "speech"}}, "and no list"),
        ({"data": {"folder": "x", "columns": {"a": "text"}, "tasks": []}}, "give at least one task"),
        (
            {"data": {"folder": "x", "columns": {"a": "text"}, "tasks": [["a"]], "held_out": -2}},
            "held_out is a number of rows, not -2",
        ),
        (
            {"data": {"dataset": {"path": "x"}, "columns": {"a": "text"}, "tasks": [["a"]]}},
            "dataset needs a split",
        ),
        ({"source_noise": {"smell": 0.1}}, "noise for tower 'smell': the towers are speech, text"),
    ],
)
def test_mistakes_in_a_recipe_are_named(
    changes: dict, message: str, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    path = write(tmp_path, recipe(parts, tmp_path, **changes))
    assert message in refused(capsys, 1, "train", path)
    assert not (tmp_path / "out" / "fused").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "No such file or directory"),
        ("file,transcription\n", "has no column 'file_name'; its first line names file, transcription"),
        ("file_name,transcription\nmissing.wav,one\n", "missing.wav, which is not there"),
        ("file_name,transcription\n", "has 0 rows, of which 1 are held out"),
    ],
)
def test_mistakes_in_the_data_are_named(
    table: str | None, message: str, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = recipe(parts, tmp_path)
    document["data"]["folder"] = str(tmp_path)
    if table is not None:
        (tmp_path / "metadata.csv").write_text(table)
    assert message in refused(capsys, 1, "train", write(tmp_path, document))


def test_what_is_no_yaml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("output: [")
    assert "recipe.yaml is no YAML" in refused(capsys, 1, "train", str(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text("trainer: {max_steps: 1, max_steps: 3}")
    assert "'max_steps' is there twice" in refused(capsys, 1, "train", str(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text("- 1")
    assert "expected the entries" in refused(capsys, 1, "train", str(tmp_path / "recipe.yaml"))
    assert "No such file" in refused(capsys, 1, "train", str(tmp_path / "none.yaml"))
