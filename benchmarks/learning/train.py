"""Train one variant for a number of steps, decode held-out phrases, and add the result to a file.

    export PYTHONPATH=benchmarks:examples OMP_NUM_THREADS=1
    python benchmarks/learning/train.py --data runs/learning/short --variant base --steps 800 --seed 0

Batches of recognition and synthesis alternate. A result is one line of JSON: the settings, the training and
held-out losses, word errors in both directions, the contribution of each link, and the seconds of processor
time. A run that has a result is skipped; an interrupted one resumes from its last checkpoint, in the folder
``runs`` next to the results.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import resource
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import trials
from data import BATCH, JUDGED, Corpus, Pair, load_corpus
from score import score
from torch import Tensor, nn
from variants import Variant, read_variant

import multitower as mt
from judge import Judge
from measure import processor
from training import Example, directed, endless, in_turn, noisy, train

RESULTS = Path(__file__).with_name("results.jsonl")
TASKS = {"asr": ("speech", "text"), "tts": ("text", "speech")}
DECODED = 50


Model = mt.FusedModel | mt.baseline.VocabularyExpansion


def run(
    corpus: Corpus,
    variant: Variant,
    *,
    steps: int,
    seed: int,
    pairs: int | None,
    split: str,
    judged: int,
    folder: Path,
) -> dict[str, Any]:
    """Train and evaluate one variant; return the results."""
    trials.change_library(variant.trials, corpus)
    torch.manual_seed(seed)
    model = make_model(corpus, variant, pairs)
    found = teach(model, corpus, variant, steps=steps, seed=seed, pairs=pairs, folder=folder)
    options = trials.guidance(model, variant.trials["guidance"]) if "guidance" in variant.trials else {}
    if corpus.kept:
        found["before"] = what_is_kept(unlinked(corpus), corpus)
    return found | scored(model, corpus, split, judged, **options)


def teach(
    model: Model,
    corpus: Corpus,
    variant: Variant,
    *,
    steps: int,
    seed: int,
    pairs: int | None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train a model on the first pairs; return time, memory, trained parameters and losses."""
    groups = (
        model.parameter_groups(variant.lr, **variant.rates)
        if isinstance(model, mt.FusedModel)
        else [{"params": [each for each in model.parameters() if each.requires_grad], "lr": variant.lr}]
    )
    trained: nn.Module = model
    if "alignment" in variant.trials:
        trained = trials.Aligned(model, variant.trials["alignment"], steps)
    batches = training_batches(corpus.train[:pairs], variant, seed)
    collate = noisy({"speech": variant.noise, "text": variant.text_noise}, seed, variant.sources)
    done = train(trained, batches, groups, steps, title=str(steps), collate=collate, folder=folder)
    return {
        "seconds": round(done.processor, 1),
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "trained": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "curve": averaged(done.history),
    }


def scored(model: Model, corpus: Corpus, split: str, judged: int, **options: Any) -> dict[str, Any]:
    """Evaluate a model on held-out pairs; the options are those of ``generate`` for synthesis."""
    held_out = getattr(corpus, split)
    found: dict[str, Any] = {
        "held-out loss": {task: held_out_loss(model, held_out, *ends) for task, ends in TASKS.items()},
        "text perplexity": text_perplexity(model, held_out),
    }
    if corpus.kept:
        found["kept"] = what_is_kept(model, corpus)
    if isinstance(model, mt.FusedModel):
        found["contributions"] = contributions(model, held_out)
    truth = [pair.transcript for pair in held_out]
    written = decoded(model, held_out, "speech", "text", corpus.longest("text"))
    found["asr"] = score(truth, [corpus.text.decode(each) for each in written])
    if corpus.human:
        written = decoded(model, corpus.human, "speech", "text", corpus.longest("text"))
        said = [corpus.text.decode(each) for each in written]
        found["human"] = score([pair.transcript for pair in corpus.human], said)
    spoken = decoded(model, held_out[:judged], "text", "speech", corpus.longest("speech"), **options)
    waveforms = [corpus.speech.decode(each) for each in spoken]
    found["tts"] = score(truth[:judged], Judge(workers=1).transcribe(waveforms, progress=False))
    return found


def unlinked(corpus: Corpus) -> mt.FusedModel:
    """Return a model of both pretrained decoders, without links."""
    graph = mt.FusionGraph()
    for name, folder in corpus.decoders.items():
        graph.add_tower(name, folder)
    return graph.compile()


def make_model(corpus: Corpus, variant: Variant, pairs: int | None) -> Model:
    """Return the model of a variant, to be trained on the first pairs."""
    method, _, what = variant.method.partition(" ")
    if method == "expansion":
        native = transformers.AutoModelForCausalLM.from_pretrained(corpus.decoders["text"])
        train: Any = what
        if what == "lora":
            from peft import LoraConfig

            train = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return mt.baseline.VocabularyExpansion(
            native, {"text": corpus.text, "speech": corpus.speech}, train=train
        )
    graph = mt.FusionGraph()
    for name, folder in corpus.decoders.items():
        decoder: Any = folder
        if name in variant.random:
            config = transformers.AutoConfig.from_pretrained(folder)
            decoder = transformers.AutoModelForCausalLM.from_config(config)
        graph.add_tower(name, decoder, train=variant.train[name], adapter=variant.adapter)
    rows = [
        [mt.Segment("text", pair.text), mt.Segment("speech", pair.speech)] for pair in corpus.train[:pairs]
    ]
    for source, target in TASKS.values():
        pace = mt.batch.measure_pace(rows, source, target) if variant.paced else 1.0
        options = variant.link | variant.links.get(f"{source}->{target}", {})
        graph.add_link(source, target, **options, pace=pace)
    model = graph.compile()
    if variant.trials.get("warm start"):
        trials.start_warm(model)
    return model


def training_batches(pairs: Sequence[Pair], variant: Variant, seed: int) -> Iterator[list[Example]]:
    """Return alternating batches of recognition and of synthesis."""
    supplies = [
        endless(
            directed([(getattr(pair, source), getattr(pair, target)) for pair in pairs], source, target),
            variant.batch,
            seed,
        )
        for source, target in TASKS.values()
    ]
    batches = in_turn(*supplies)
    if "drop" not in variant.trials:
        return batches
    learning = {name for name, kind in variant.train.items() if kind != "none"}
    return trials.with_dropped_links(batches, variant.trials["drop"], seed, learning)


def averaged(history: Sequence[dict[str, float]], every: int = 40) -> dict[str, list[float]]:
    """Average each logged value over every ``every`` entries."""
    names = {name for entry in history for name in entry if name != "step"}
    curves: dict[str, list[float]] = {}
    for name in sorted(names):
        for start in range(0, len(history), every):
            values = [entry[name] for entry in history[start : start + every] if name in entry]
            curves.setdefault(name, []).append(round(sum(values) / max(1, len(values)), 4))
    return curves


@torch.no_grad()
def held_out_loss(model: nn.Module, pairs: Sequence[Pair], source: str, target: str) -> float:
    """Return the loss per token of held-out pairs in one direction."""
    rows = directed([(getattr(pair, source), getattr(pair, target)) for pair in pairs], source, target)
    batch = mt.collate(rows)
    return round(float(model(**batch).losses[target]), 4)


@torch.no_grad()
def text_perplexity(model: Model, pairs: Sequence[Pair]) -> float:
    """Return the perplexity of held-out text without a source."""
    batch = mt.collate([[mt.Segment("text", pair.text, target=True)] for pair in pairs])
    return round(float(model(**batch).losses["text"].exp()), 3)


@torch.no_grad()
def what_is_kept(model: Model, corpus: Corpus) -> dict[str, float]:
    """Return the perplexity per token of each modality alone, and the accuracy of the cloze in per cent.

    A cloze item is correct if the true ending has the smallest loss of the four.
    """
    found = {}
    for name, rows in corpus.kept.items():
        losses = [_losses(model, name, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
        total, count = (sum(values) for values in zip(*losses, strict=True))
        found[f"{name} perplexity"] = math.exp(total / count)
    right = 0
    for endings in corpus.cloze:
        losses = [_losses(model, "text", [ending]) for ending in endings]
        right += min(losses) == losses[0]
    found["cloze"] = 100 * right / max(1, len(corpus.cloze))
    return found


def _losses(model: nn.Module, name: str, rows: Sequence[Tensor]) -> tuple[float, int]:
    """Return the summed loss of all tokens but the first of each row, and their number."""
    batch = mt.collate([[mt.Segment(name, row, target=True)] for row in rows])
    count = sum(len(row) - 1 for row in rows)
    return float(model(**batch).losses[name]) * count, count


def contributions(model: mt.FusedModel, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the contribution of each link, relative to the state that it is added to."""
    found: dict[str, float] = {}
    for source, target in TASKS.values():
        rows = [[mt.Segment(name, getattr(pair, name)) for name in (source, target)] for pair in pairs[:32]]
        found |= model.contributions(**mt.collate(rows))
    return {name: round(value, 4) for name, value in found.items() if not name.endswith("adapter")}


def decoded(
    model: Model,
    pairs: Sequence[Pair],
    source: str,
    target: str,
    limit: int,
    **options: Any,
) -> list[Tensor]:
    """Decode the target greedily after the source."""
    found = []
    for start in range(0, len(pairs), DECODED):
        given = [[mt.Segment(source, getattr(pair, source))] for pair in pairs[start : start + DECODED]]
        rows = model.generate(given, output=[target], max_new_tokens=limit, do_sample=False, **options)
        found += [torch.as_tensor(row[0].tokens) for row in rows]
    return found


def key_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return the values that identify a run."""
    return tuple(entry[key] for key in ("data", "variant", "steps", "pairs", "seed", "split"))


def read_results(file: Path) -> list[dict[str, Any]]:
    """Read a file of results, one per line."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def has_result(entry: dict[str, Any], variant: Variant, file: Path) -> bool:
    """Return whether a file has the result of a run.

    Raises:
        ValueError: It has one with other settings under the same name.
    """
    settings = json.loads(json.dumps(asdict(variant)))
    for earlier in read_results(file):
        if key_of(earlier) == key_of(entry):
            if other := [key for key, value in earlier["settings"].items() if value != settings[key]]:
                raise ValueError(
                    f"{file} has a result of {entry['variant']!r} with another {', '.join(other)}: rename "
                    "the method, or use another file of results"
                )
            return True
    return False


def append(file: Path, entry: dict[str, Any]) -> None:
    """Append a line to a file to which other processes may append at the same time."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(json.dumps(entry, separators=(",", ":")) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder that data.py made")
    parser.add_argument("--variant", required=True, help="a name in variants.py, or a TOML file")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, help="train on the first so many pairs (default: all)")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--judged", type=int, default=JUDGED, help="how many spoken answers are judged")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Do the run of the command line, unless it has a result."""
    options = parse()
    name, variant = read_variant(options.variant)
    chosen = {key: getattr(options, key) for key in ("steps", "pairs", "seed", "split")}
    entry = {"data": options.data.name, "variant": name, **chosen}
    if has_result(entry, variant, options.results):
        print(f"{name}: {options.results} has this run")
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = {key: getattr(options, key) for key in ("steps", "seed", "pairs", "split", "judged")}
    identity = (*key_of(entry), f"{zlib.crc32(json.dumps(asdict(variant)).encode()):08x}")
    folder = options.results.parent / "runs" / "-".join(map(str, identity))
    found = run(load_corpus(options.data), variant, folder=folder, **settings)
    machine = {
        "processor": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    append(options.results, {**entry, "settings": asdict(variant), "machine": machine, **found})
    shutil.rmtree(folder)
    print(name, options.steps, options.seed, *(found[task]["wer"] for task in TASKS))


if __name__ == "__main__":
    main()
