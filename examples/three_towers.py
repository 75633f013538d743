"""Bimodal data, trimodal model: speech and text, text and images, and what follows for speech and images.

    python examples/three_towers.py            # spoken and handwritten digits, about a quarter of an hour
    python examples/three_towers.py --quick    # the same path in less than a minute, too short to learn

Three small decoders are pretrained, each on its own modality. One graph links all of them with each other,
and every batch holds two: spoken phrases and their text, or text and rows of handwritten digits. No phrase
stands in both kinds of pairs, and nothing pairs speech with images. The report asks for all six directions.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

import multitower as mt
from digit_images import ImageJudge, handwriting, write
from image_strips import ImageModality
from judge import Judge
from multitower_speech import SpeechModality
from multitower_text import TextModality
from phrases import number_phrases
from pictures import plot_losses
from report import write_results
from spoken_corpus import speak
from three_report import ROUTES, Phrase, Readers, as_markdown, ceilings, draw_answers, follow, write_audio
from training import (
    Budget,
    Example,
    Run,
    directed,
    endless,
    in_turn,
    perplexity,
    pretrain_decoders,
    target_losses,
    train,
)

PAIRED = (("speech", "text"), ("text", "image"))


@dataclass(frozen=True)
class Size:
    """How much of everything; times are shares of the minutes that the caller allows."""

    spoken_per_minute: int = 250
    unpaired_speech_per_minute: int = 40
    drawn: int = 5_000
    unpaired_texts: int = 20_000
    unpaired_images: int = 5_000
    held_out: int = 60
    units: int = 512
    unit_clips: int = 300
    rate: float = 50 / 3
    strips: int = 256
    strip_width: int = 4
    width: int = 128
    depth: int = 4
    batch: int = 32
    lr: float = 1.5e-3
    pretraining: float = 0.03
    fusing: float = 0.75
    steps: int | None = None


QUICK = Size(
    spoken_per_minute=60,
    unpaired_speech_per_minute=20,
    drawn=60,
    unpaired_texts=200,
    unpaired_images=60,
    held_out=3,
    units=64,
    strips=32,
    width=64,
    steps=12,
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """The modalities and what they encoded: pairs by the two towers they join, rows of one tower alone."""

    modalities: dict[str, mt.Modality]
    pairs: dict[tuple[str, str], list[tuple[Tensor, Tensor]]]
    unpaired: dict[str, list[Tensor]]
    held_out: list[Phrase]

    @property
    def longest(self) -> int:
        """Give a generous limit for what is decoded."""
        return 10 + max(len(row) for phrase in self.held_out for row in phrase.tokens.values())


def main() -> None:
    options = parse()
    size = QUICK if options.quick else Size()
    torch.manual_seed(options.seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = Path(options.out)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    corpus, image_judge = make_corpus(options, size)
    folders = pretrain_decoders(
        {name: (corpus.modalities[name], rows) for name, rows in corpus.unpaired.items()},
        Budget(60 * options.minutes * size.pretraining, size.steps),
        out,
        width=size.width,
        depth=size.depth,
        batch=size.batch,
        seed=options.seed,
        device=options.device,
    )
    model = fuse(folders).to(options.device)
    print(f"\n{model.graph}\n")

    texts = [phrase.tokens["text"] for phrase in corpus.held_out]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untouched = perplexity(model.unimodal("text"), texts, options.device)
    left = 60 * options.minutes - (time.monotonic() - started)
    budget = Budget(None if size.steps else size.fusing * left, size.steps)
    run = fit(model, corpus, budget, size, options)
    reuse = {
        "text perplexity before": untouched,
        "text perplexity after": perplexity(model.unimodal("text"), texts, options.device),
        "tensors that changed": changed(model, before),
        "widest gate": widest_gates(model),
    }
    model.save_pretrained(out / "fused", modalities=corpus.modalities)
    table = report(model, corpus, Readers(image_judge, Judge()), out)
    print_reuse(reuse)
    mt.draw_graph(model).savefig(out / "pictures/graph.png", dpi=150)
    plot_losses(run.history, out / "pictures/losses.png", title="Losses of the four directions")
    seconds = round(time.monotonic() - started)
    settings = {**vars(options), **asdict(size), "steps": run.steps, "seconds": seconds}
    write_results(out, settings, table=table, reuse=reuse)
    print(f"\n{seconds} s in all. Audio, pictures, checkpoints and figures are in {out}/")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15, help="about how long the whole run takes")
    parser.add_argument("--quick", action="store_true", help="a smoke run of the whole path")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/three_towers", help="where to keep everything")
    options = parser.parse_args()
    if options.quick:
        options.minutes = 1.0
    return options


def make_corpus(options: argparse.Namespace, size: Size) -> tuple[Corpus, ImageJudge]:
    """Deal out phrases so that none is both spoken and drawn, speak and draw them, and encode everything."""
    spoken = int(size.spoken_per_minute * options.minutes)
    paired = number_phrases(spoken + size.drawn + size.held_out, seed=options.seed)
    random.Random(options.seed).shuffle(paired)
    held_out_from = spoken + size.drawn
    to_speak, to_draw, unseen = paired[:spoken], paired[spoken:held_out_from], paired[held_out_from:]
    alone = number_phrases(
        int(size.unpaired_speech_per_minute * options.minutes), seed=options.seed + 1, exclude=paired
    )
    texts = number_phrases(size.unpaired_texts, seed=options.seed + 2, exclude=unseen)
    rows = number_phrases(size.unpaired_images, seed=options.seed + 3, exclude=unseen)

    sounds = [one.waveform for one in speak([*to_speak, *alone, *unseen], seed=options.seed)]
    rng = np.random.default_rng(options.seed)
    hand, judged_by, unseen_hand = handwriting(options.seed)
    text = TextModality()
    print("fitting speech units and image strips", flush=True)
    unpaired_sounds = sounds[spoken : spoken + len(alone)]
    speech = SpeechModality.fit(
        [*unpaired_sounds, *sounds][: size.unit_clips], units=size.units, rate=size.rate, seed=options.seed
    )
    image = ImageModality.fit(hand.pixels, strips=size.strips, width=size.strip_width, seed=options.seed)
    modalities = {"speech": speech, "text": text, "image": image}
    with threadpool_limits(1):  # clips are short: threads would spend their time waiting for each other
        units = [speech.encode(sound) for sound in tqdm(sounds, desc="encoding", unit="clip")]
    held_out = []
    for words, sound in zip(unseen, sounds[spoken + len(alone) :], strict=True):
        raw = {"speech": sound, "text": words, "image": write(words, unseen_hand, rng)}
        held_out.append(Phrase(words, raw, {name: modalities[name].encode(raw[name]) for name in modalities}))
    pairs = {
        ("speech", "text"): [(row, text.encode(words)) for row, words in zip(units, to_speak, strict=False)],
        ("text", "image"): [(text.encode(words), image.encode(write(words, hand, rng))) for words in to_draw],
    }
    unpaired = {
        "speech": units[spoken : spoken + len(alone)],
        "text": [text.encode(words) for words in texts],
        "image": [image.encode(write(words, hand, rng)) for words in rows],
    }
    return Corpus(modalities, pairs, unpaired, held_out), ImageJudge(judged_by)


def fuse(folders: dict[str, str]) -> mt.FusedModel:
    """Declare the fusion: every tower may read every other; text stays frozen, the others learn on."""
    graph = mt.FusionGraph()
    graph.add_tower("speech", folders["speech"], train="all")
    graph.add_tower("text", folders["text"])
    graph.add_tower("image", folders["image"], train="all")
    for source, target in permutations(graph.towers, 2):
        graph.add_link(source, target, interleave=1, position="rotary")
    return graph.compile()


def fit(model: mt.FusedModel, corpus: Corpus, budget: Budget, size: Size, options: argparse.Namespace) -> Run:
    """Train the four directions that have pairs, in turn: each batch holds two of the three towers."""
    by_tower = target_losses(model)

    def losses(batch: dict) -> dict[str, Tensor]:
        return {
            f"{source}→{target}": loss
            for target, loss in by_tower(batch).items()
            for source in set(batch["streams"]) - {target}
        }

    tasks: list[list[Example]] = []
    for (one, other), pairs in corpus.pairs.items():
        tasks.append(directed(pairs, one, other))
        tasks.append(directed([(second, first) for first, second in pairs], other, one))
    supply = in_turn(*(endless(task, size.batch, options.seed, options.device) for task in tasks))
    return train(model, losses, supply, model.parameter_groups(lr=size.lr), budget, title="fusing")


def changed(model: mt.FusedModel, before: Mapping[str, Tensor]) -> dict[str, str]:
    """Count the tensors of each tower and link that are not, bit for bit, what they were before."""
    counts: dict[str, list[bool]] = {}
    for key, value in model.state_dict().items():
        part = "/".join(key.split(".")[:2])
        counts.setdefault(part, []).append(not torch.equal(value, before[key]))
    return {part: f"{sum(differ)} of {len(differ)}" for part, differ in counts.items()}


def widest_gates(model: mt.FusedModel) -> dict[str, float]:
    """Give, for each link, how far the widest of its gates is open."""
    widest: dict[str, float] = dict.fromkeys(model.graph.links, 0.0)
    for name, gate in model.gates().items():
        if (link := name.split()[0]) in widest:
            widest[link] = max(widest[link], abs(gate))
    return widest


def report(model: mt.FusedModel, corpus: Corpus, readers: Readers, out: Path) -> list[dict[str, Any]]:
    """Follow every route, print the table, draw the images, write the sounds."""
    phrases, modalities = corpus.held_out, corpus.modalities
    answers = ceilings(phrases, modalities, readers)
    for route in ROUTES:
        answers.append(
            follow(model, route, phrases, modalities, readers, limit=corpus.longest, paired=PAIRED)
        )
    rows = [answer.row(phrases) for answer in answers]
    print(f"\n{as_markdown(rows)}")
    draw_answers(phrases, answers, out / "pictures/digits.png")
    write_audio(out / "audio", phrases, answers)
    return rows


def print_reuse(reuse: Mapping[str, Any]) -> None:
    before, after = reuse["text perplexity before"], reuse["text perplexity after"]
    print(f"\nperplexity of the text decoder: {before:.4f} before, {after:.4f} after")
    print(f"\n{'part':24}{'tensors that changed':>22}{'widest gate':>14}")
    for part, count in reuse["tensors that changed"].items():
        gate = reuse["widest gate"].get(part.removeprefix("links/"))
        print(f"{part:24}{count:>22}" + ("" if gate is None else f"{gate:14.3f}"))


if __name__ == "__main__":
    main()
