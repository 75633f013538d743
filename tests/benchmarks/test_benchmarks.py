"""Run each benchmark with tiny settings, and check its counts; its times mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT

pytest.importorskip("matplotlib", reason="the benchmarks need matplotlib")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "modalities", "benchmarks")),
}
TWO_POLICIES = ["--policies", "all trained", "frozen, first tap at the top"]
RUNS = {
    "decode": "--sources 20 --rows 2 --new 4",
    "train_step": "--towers 2 --rows 1 --length 8",
    "saved_bytes": "--length 32",
    "conversation": "--turns 2 --said 5 --new 4",
    "serve": "--clients 3 --seconds 2 --requests 8 --most 8 --width 16 --depth 2",
    "packed": "--rows 3 --lengths 8 --shortest 0.5 1",
}
ONE_AFTER_THE_OTHER = """
import json, runpy, sys
for script, *options in json.load(sys.stdin):
    sys.argv = [script, *options]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the benchmarks in one process, to import only once; return the folder of results."""
    folder = tmp_path_factory.mktemp("benchmarks")
    commands = [
        [
            str(ROOT / "benchmarks" / f"{name}.py"),
            "--repeats",
            "2",
            "--out",
            str(folder / name),
            *line.split(),
        ]
        for name, line in RUNS.items()
    ]
    run([sys.executable, "-c", ONE_AFTER_THE_OTHER], json.dumps(commands))
    return folder


def run(command: list[str], given: str = "") -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def results(folder: Path) -> list[dict[str, Any]]:
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert document["versions"]["torch"]
    assert list(folder.glob("*.png"))
    return document["results"]


@pytest.mark.slow
def test_growth(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "growth.py")
    few = "--towers 2 3 4 --taps 1 2 6 --sources 20 30 50 --rows 1 2 4 --length 8 --new 4 --repeats 2"
    run([sys.executable, script, "--out", str(tmp_path), *few.split()])
    found = results(tmp_path)
    assert [(each["axis"], each["kind"]) for each in found] == [
        (axis, kind) for axis in ("towers", "taps", "source", "rows") for kind in ("step", "token")
    ]
    for each in found:
        for held in each["bytes"]:
            assert each["fits"][held]["worst"] < 0.01, f"{held} is not linear in {each['axis']}"
        assert all(one["median"] > 0 for series in each["ms"].values() for one in series)


@pytest.mark.slow
def test_decode(ran: Path) -> None:
    (found,) = results(ran / "decode")
    assert set(found["ms"]) == {"fused", "native", "links", "alternating"}
    assert found["cache_bytes"] == 2 * 20 * (3 * 2 * 128 * 4 + 8 + 1)  # keys and values of 3 taps, time, mask


@pytest.mark.slow
def test_train_step(ran: Path) -> None:
    assert [(each["kind"], each["train"]) for each in results(ran / "train_step")] == [
        (kind, f"train={train}") for train in ("none", "all") for kind in ("step", "forward")
    ]


@pytest.mark.slow
def test_conversation(ran: Path) -> None:
    found = results(ran / "conversation")
    assert [each["turn"] for each in found] == [1, 2]
    assert (ran / "conversation" / "turns.png").stat().st_size > 0


@pytest.mark.slow
def test_serve(ran: Path) -> None:
    *found, memory = results(ran / "serve")
    assert [each["clients"] for each in found] == [1, 3]
    for each in found:
        assert each["answers"] > 0
        assert (each["lost"], each["mixed_up"]) == (0, 0)
    assert memory["memory"]["mib"]


@pytest.mark.slow
def test_saved_bytes(ran: Path) -> None:
    found = results(ran / "saved_bytes")
    assert [each["ratio"] for each in found if "ratio" in each] == pytest.approx([1, 1, 1], abs=0.02)
    counted = [each["bytes"] for each in found]
    assert counted == sorted(counted, reverse=True)


@pytest.mark.slow
def test_packed(ran: Path) -> None:
    assert [each["real"] for each in results(ran / "packed")] == [0.75, 1]


@pytest.mark.slow
def test_compile_decoding(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "compile_decoding.py")
    few = "--backend eager --rows 2 --calls 6 --longest 40 --source 20 --new 4 --repeats 1"
    run([sys.executable, script, "--out", str(tmp_path), *few.split()])
    (found,) = results(tmp_path)
    assert (found["graph_breaks"], found["recompilations"]) == (0, 0)


@pytest.mark.slow
def test_peak_memory(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "peak_memory.py")
    run([sys.executable, script, "--repeats", "1", "--out", str(tmp_path), *TWO_POLICIES])
    found = results(tmp_path)
    assert found[1]["of_first"] < 0.5
    for each in found:
        assert each["saved"] < each["peak"]["fused"]["median"] < 2 * each["saved"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_and_send_what_parameter_counts_say(processes: int, tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "parallel.py")
    few = f"--processes {processes} --repeats 1 --rows 1 --length 8"
    run([sys.executable, script, *few.split(), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    sent = {each["engine"]: (each["sent"], each["plan"]) for each in found if each["kind"] == "bytes"}
    assert sent.keys() == {"ddp", "per_layer", "root", "replicate"}
    most, plan = sent.pop("per_layer")
    assert 0.9 < most["gathered"] / plan["gathered"] <= 1
    assert all(each == expected for each, expected in sent.values())
    held = [each for each in found if each["kind"] == "held"]
    assert [each["engine"] for each in held] == ["root", "per_layer", "replicate"]
    assert all(each["found"] == each["plan"] for each in held)
    (times,) = [each for each in found if each["kind"] == "time"]
    assert set(times["ms"]) == {"ddp", "alone", "bare ddp", "bare"}
    assert min(times[key]["median"] for key in ("ratio", "bare_ratio")) > 0


@pytest.mark.slow
def test_the_page_on_scaling_has_the_tables_that_the_script_prints() -> None:
    script = str(ROOT / "benchmarks" / "scaling.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    tables = done.stdout.strip().split("\n\n")
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert len(tables) == 3
    assert all(f"\n\n{table}\n" in page for table in tables)
