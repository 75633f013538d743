"""Measure time and peak memory of saving and loading checkpoints, compared with transformers.

    pip install -c constraints.txt -e '.[transformers]'
    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --model path/to/SmolLM2-135M --dtype bfloat16

The fused model has a frozen text tower and a small trained one, linked in both directions; both are stored.
transformers saves the text tower, and loads it, or both. Loading is measured with the default checks and with
``verify=True``. Without ``--model``, the text tower is a random Llama of the size of SmolLM2-135M. Each
figure comes from a new process; memory is the growth of its peak resident set, including mapped files. After
loading, every tensor is read once, which counts for the memory but not for the time. Files are in the page
cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from resident import child, peak

MEGABYTE = 10**6
TASKS = (
    "transformers save",
    "multitower save",
    "transformers load tower",
    "multitower load tower",
    "transformers load",
    "multitower load",
    "multitower load verified",
)
PACKAGES = ("torch", "transformers", "safetensors")


def main() -> None:
    """Run all tasks, each in new processes; print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or Hub id; default: a random Llama of 135 M parameters")
    parser.add_argument("--dtype", help="to what loading converts; default: each tensor keeps its own")
    parser.add_argument(
        "--runs", type=int, default=3, help="of so many the least time and the most memory are given"
    )
    parser.add_argument("--out", default="runs/checkpoint.json", help="where the figures go")
    parser.add_argument("--task", choices=("prepare", *TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        prepared = args.task == "prepare"
        result = prepare(args.folder, args.model) if prepared else measure(args.task, args.folder, args.dtype)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = do("prepare", folder, ["--model", args.model] if args.model else [])
        dtype = ["--dtype", args.dtype] if args.dtype else []
        results = {task: summary([do(task, folder, dtype) for _ in range(args.runs)]) for task in TASKS}
    report = {
        "model": args.model or "random Llama, 135 M parameters, float32",
        "dtype": args.dtype or "as stored",
        "runs": args.runs,
        "megabytes": weights,
        "results": results,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    print(table(report))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def prepare(folder: Path, source: str | None) -> dict[str, float]:
    """Write the text tower and the fused model; return their sizes in megabytes."""
    import torch
    import transformers

    import multitower as mt

    if source is None:
        torch.manual_seed(0)
        text: Any = transformers.LlamaForCausalLM(
            llama(hidden_size=576, num_hidden_layers=30, vocab_size=49152)
        )
    else:
        text = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    text.save_pretrained(folder / "text")
    speech = transformers.LlamaForCausalLM(llama(hidden_size=192, num_hidden_layers=6, vocab_size=1024))
    graph = mt.FusionGraph()
    graph.add_tower("speech", speech, train="all")
    graph.add_tower("text", folder / "text")
    graph.add_link("speech", "text", interleave=10)
    graph.add_link("text", "speech", interleave=2)
    model = graph.compile()
    model.save_pretrained(folder / "fused")
    return {name: size(folder / name) for name in ("text", "fused")}


def llama(**sizes: int) -> Any:
    """Return a Llama config like that of SmolLM2, with other sizes."""
    import transformers

    heads = sizes["hidden_size"] // 64
    return transformers.LlamaConfig(
        **sizes,
        intermediate_size=sizes["hidden_size"] * 8 // 3,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        tie_word_embeddings=True,
    )


def size(folder: Path) -> float:
    """Return the size of the weights in a folder, in megabytes."""
    return round(sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / MEGABYTE, 1)


def do(task: str, folder: Path, options: list[str]) -> dict[str, float]:
    """Run a task in a new process; return its measurements."""
    result: dict[str, float] = child(__file__, ["--task", task, "--folder", str(folder), *options])
    return result


def measure(task: str, folder: Path, dtype: str | None) -> dict[str, float]:
    """Run a task; return its seconds, and the growth of the peak resident set in megabytes."""
    import transformers

    transformers.logging.disable_progress_bar()
    warm_up()
    who, what = task.split(" ", 1)
    if what.startswith("save"):
        # Load the model first, so that only the memory of saving is measured.
        model: Any = load(who, "load tower" if who == "transformers" else "load", folder, None)
        touch(model)
        before, start = most(), time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            model.save_pretrained(place)
            return {"seconds": time.perf_counter() - start, "megabytes": most() - before}
    before, start = most(), time.perf_counter()
    model = load(who, what, folder, dtype)
    seconds = time.perf_counter() - start
    touch(model)
    held = sum(each.nbytes for each in model.parameters())
    return {
        "seconds": seconds,
        "megabytes": most() - before,
        "weights": held / MEGABYTE,
    }


def load(who: str, what: str, folder: Path, dtype: str | None) -> Any:
    """Load the fused model, its towers one by one with transformers, or only the text tower."""
    import torch
    import transformers

    import multitower as mt

    if who == "transformers":
        names = ("text",) if what == "load tower" else ("speech", "text")
        places = [folder / "fused/towers" / name for name in names]
        read = transformers.AutoModelForCausalLM.from_pretrained
        models = [read(place, dtype=dtype or "auto") for place in places]
        return models[0] if len(models) == 1 else torch.nn.ModuleList(models)
    if what == "load tower":
        return mt.load_tower(folder / "fused", "text", dtype=dtype)
    return mt.FusedModel.from_pretrained(folder / "fused", dtype=dtype, verify=what == "load verified")


def warm_up() -> None:
    """Import and run the code that loading needs, to exclude it from the measurement."""
    import torch
    import transformers

    import multitower as mt

    graph = mt.FusionGraph()
    tiny = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    graph.add_tower("text", tiny)
    model = graph.compile()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        touch(mt.FusedModel.from_pretrained(folder))
    torch.ones(512, 512) @ torch.ones(512, 512)


def touch(model: Any) -> float:
    """Read every value of a model."""
    return float(sum(each.detach().float().sum() for each in model.parameters()))


def most() -> float:
    """Return the peak resident set of this process, in megabytes."""
    return peak() / MEGABYTE


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the minimum time, as other programs only add to it, and the maximum memory."""
    return {key: round((min if key == "seconds" else max)(run[key] for run in runs), 2) for key in runs[0]}


def table(report: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| | seconds | peak memory, MB | weights, MB |", "|---|---:|---:|---:|"]
    for task, result in report["results"].items():
        weights = f"{result['weights']:.0f}" if "weights" in result else ""
        lines.append(f"| {task} | {result['seconds']:.2f} | {result['megabytes']:.0f} | {weights} |")
    seconds = {task: result["seconds"] for task, result in report["results"].items()}
    ratio = seconds["multitower load"] / seconds["transformers load"]
    return "\n".join([*lines, "", f"loading takes {ratio:.2f} times as long as transformers' of the towers"])


if __name__ == "__main__":
    main()
