"""Measure how well trained links work with another decoder than the one that they were trained with.

    export PYTHONPATH=benchmarks:benchmarks/learning:examples OMP_NUM_THREADS=1
    python benchmarks/evidence/reuse.py --data runs/evidence/words

A fusion is trained on all pairs (``methods/links/zipper-absolute.toml``) and saved. Its frozen text
decoder is then replaced, by ``swap``, with one pretrained from another seed, and the links are trained
further on few pairs ("moved"). For comparison, new links are trained on the same pairs: with the
pretrained speech decoder ("new"), with the one that the fusion has trained ("new, trained speech"), and
with the latter frozen, as if the other text decoder were added to the fusion as a third tower ("added").
Each result is a line of ``reuse.jsonl``, from which ``document.py`` makes its table; runs that have one
are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from data import Corpus, load_corpus
from document import METHODS, REUSE, results_on
from train import append, make_model, scored, teach
from variants import Variant, read_variant
from words import OTHER

import multitower as mt

SHARES = (0.01, 0.1)
LINKS = ("moved", "new", "new, trained speech", "added")
KEY = ("links", "pairs", "seed", "steps", "first steps")


def pretrained(corpus: Corpus, variant: Variant, folder: Path, *, steps: int, seed: int) -> mt.FusedModel:
    """Load the fusion trained on all pairs; train and save it first if it does not exist."""
    if not folder.exists():
        torch.manual_seed(seed)
        model = make_model(corpus, variant, None)
        assert isinstance(model, mt.FusedModel)
        half = folder.with_name(f"{folder.name}-run")
        teach(model, corpus, variant, steps=steps, seed=seed, pairs=None, folder=half)
        model.save_pretrained(folder)
        shutil.rmtree(half)
    return mt.FusedModel.from_pretrained(folder)


def joined(links: str, folder: Path, other: str, corpus: Corpus, pairs: int) -> tuple[mt.FusedModel, Variant]:
    """Return a fusion with another text decoder, and how to train it.

    Args:
        links: One of ``LINKS``.
        folder: The fusion trained on all pairs.
        other: The folder of the other text decoder.
        corpus: The data, with the decoders that the fusion began with.
        pairs: How many of the pairs new links are made for.
    """
    method = "zipper-frozen-absolute" if links == "added" else "zipper-absolute"
    _, variant = read_variant(str(METHODS / f"links/{method}.toml"))
    if links == "moved":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about links trained with another decoder
            return mt.FusedModel.from_pretrained(folder).swap("text", other), variant
    decoders = {**corpus.decoders, "text": other}
    if links != "new":
        decoders["speech"] = str(folder.with_name(f"{folder.name}-speech"))
        mt.load_tower(folder, "speech").save_pretrained(decoders["speech"])
    model = make_model(replace(corpus, decoders=decoders), variant, pairs)
    assert isinstance(model, mt.FusedModel)
    return model, variant


def planned(counts: Sequence[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what identifies each run, for some numbers of pairs."""
    runs = [("as trained", 0), ("moved", 0), *itertools.product(LINKS, counts)]
    return [
        {
            "data": options.data.name,
            "links": links,
            "pairs": pairs,
            "seed": options.seed,
            "steps": options.further_steps,
            "first steps": options.steps,
        }
        for links, pairs in runs
    ]


def main() -> None:
    """Do the missing runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder that words.py made")
    parser.add_argument("--steps", type=int, default=4000, help="of the first training")
    parser.add_argument("--further-steps", type=int, default=400, help="with the other decoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judged", type=int, default=100)
    parser.add_argument("--results", type=Path, default=REUSE)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    corpus = load_corpus(options.data)
    _, variant = read_variant(str(METHODS / "links/zipper-absolute.toml"))
    there = {tuple(run[each] for each in KEY) for run in results_on(options.data, options.results, corpus)}
    counts = [math.ceil(share * len(corpus.train)) for share in SHARES]
    asked = planned(list(dict.fromkeys(counts)), options)
    lacking = [entry for entry in asked if tuple(entry[each] for each in KEY) not in there]
    if not lacking:
        print(f"{options.results} has all runs")
        return
    folder = options.data / f"fused-{options.steps}-{options.seed}"
    fused = pretrained(corpus, variant, folder, steps=options.steps, seed=options.seed)
    other = str(options.data / f"{OTHER}-decoder")
    for entry in lacking:
        links, pairs = entry["links"], entry["pairs"]
        torch.manual_seed(options.seed)
        model = fused
        if links in LINKS:
            model, variant = joined(links, folder, other, corpus, pairs)
        if pairs:
            teach(model, corpus, variant, steps=options.further_steps, seed=options.seed, pairs=pairs)
        found = scored(model, corpus, "test", options.judged)
        append(options.results, {**entry, **found})
        print(links, pairs, found["asr"]["wer"], found["tts"]["wer"])


if __name__ == "__main__":
    main()
