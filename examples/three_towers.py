"""Train a model of speech, text and images on pairs with text only, and evaluate speech and images.

    python examples/three_towers.py            # spoken and handwritten digits, about a quarter of an hour
    python examples/three_towers.py --quick    # a smoke test of less than a minute

Three small decoders are pretrained, each on its own modality. A graph links each with every other. A batch
has pairs of two modalities: spoken phrases and their text, or text and rows of handwritten digits. No phrase
is in both kinds of pairs, and there are no pairs of speech and images. The report covers all six directions.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
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
from pictures import plot_contributions, plot_losses
from report import write_results
from spoken_corpus import speak
from three_report import ROUTES, Phrase, Readers, as_markdown, ceilings, draw_answers, follow, write_audio
from training import (
    FOR_TRAINING,
    WATCHED,
    Example,
    Run,
    directed,
    endless,
    estimated_steps,
    in_turn,
    noisy,
    perplexity,
    pretrain_decoders,
    train,
    watching,
)

PAIRED = (("speech", "text"), ("text", "image"))


@dataclass(frozen=True)
class Size:
    """Sizes: number of phrases, tokens, training steps (of the units' refiner, decoders, all), ..."""

    spoken: int = 3750
    unpaired_speech: int = 600
    drawn: int = 5000
    unpaired_texts: int = 20_000
    unpaired_images: int = 5000
    held_out: int = 60
    units: int = 512
    unit_clips: int = 300
    rate: float = 50 / 3
    strips: int = 256
    strip_width: int = 4
    width: int = 128
    depth: int = 4
    batch: int = 32
    refining: int = 1000
    pretraining: int = 300
    fusing: int = 1500
    lr: float = 3e-3
    noise: float = 0.15


QUICK = Size(
    spoken=60,
    unpaired_speech=20,
    drawn=60,
    unpaired_texts=200,
    unpaired_images=60,
    held_out=3,
    units=64,
    strips=32,
    width=64,
    refining=12,
    pretraining=12,
    fusing=12,
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """The modalities and the encoded data: pairs by their two towers, unpaired rows by tower."""

    modalities: dict[str, mt.Modality]
    pairs: dict[tuple[str, str], list[tuple[Tensor, Tensor]]]
    unpaired: dict[str, list[Tensor]]
    held_out: list[Phrase]

    @property
    def longest(self) -> int:
        """Return a generous limit for decoding."""
        return 10 + max(len(row) for phrase in self.held_out for row in phrase.tokens.values())


def main() -> None:
    options = parse()
    size = QUICK if options.quick else Size()
    size = replace(size, fusing=options.steps or size.fusing)
    torch.manual_seed(options.seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = Path(options.out)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    corpus, image_judge = make_corpus(options, size)
    folders = pretrain_decoders(
        {name: (corpus.modalities[name], rows) for name, rows in corpus.unpaired.items()},
        size.pretraining,
        out,
        width=size.width,
        depth=size.depth,
        batch=size.batch,
        seed=options.seed,
        device=options.device,
    )
    model = fuse(folders, relative=options.relative).to(options.device)
    print(f"\n{model.graph}\n")

    texts = [phrase.tokens["text"] for phrase in corpus.held_out]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untouched = perplexity(model.unimodal("text"), texts, options.device)
    if options.minutes is not None:
        left = 60 * options.minutes - (time.monotonic() - started)
        size = replace(size, fusing=steps_within(FOR_TRAINING * left, model, corpus, size, options))
    run = fit(model, corpus, size, options)
    reuse = {
        "text perplexity before": untouched,
        "text perplexity after": perplexity(model.unimodal("text"), texts, options.device),
        "tensors that changed": changed(model, before),
        "largest contribution": largest_contributions(run.contributions[-1]),
    }
    model.save_pretrained(out / "fused", modalities=corpus.modalities)
    rows = report(model, corpus, Readers(image_judge, Judge()), out)
    print_reuse(reuse)
    mt.inspect.draw_graph(model).savefig(out / "pictures/graph.png", dpi=150)
    plot_losses(run.history, out / "pictures/losses.png", title="Losses of the four directions")
    plot_contributions(run.contributions, out / "pictures/contributions.png")
    seconds = round(time.monotonic() - started)
    settings = {**vars(options), **asdict(size), "steps": run.steps, "seconds": seconds}
    write_results(out, settings, table=rows, reuse=reuse)
    print(f"\n{seconds} s in all. Audio, pictures, checkpoints and figures are in {out}/")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=int,
        help=f"steps on pairs (default: {Size.fusing}; all takes a quarter of an hour on two free CPU cores)",
    )
    length.add_argument(
        "--minutes", type=float, help="choose the steps so that the whole run takes about so long here"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of the whole path")
    parser.add_argument("--relative", action="store_true", help="links with relative=True")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/three_towers", help="where to keep everything")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def make_corpus(options: argparse.Namespace, size: Size) -> tuple[Corpus, ImageJudge]:
    """Split phrases so that none is both spoken and drawn; synthesise, draw and encode them."""
    spoken, held_out_from = size.spoken, size.spoken + size.drawn
    paired = number_phrases(held_out_from + size.held_out, seed=options.seed)
    random.Random(options.seed).shuffle(paired)
    to_speak, to_draw, unseen = paired[:spoken], paired[spoken:held_out_from], paired[held_out_from:]
    alone = number_phrases(size.unpaired_speech, seed=options.seed + 1, exclude=paired)
    texts = number_phrases(size.unpaired_texts, seed=options.seed + 2, exclude=unseen)
    rows = number_phrases(size.unpaired_images, seed=options.seed + 3, exclude=unseen)

    sounds = [one.waveform for one in speak([*to_speak, *alone, *unseen], seed=options.seed)]
    rng = np.random.default_rng(options.seed)
    hand, judged_by, unseen_hand = handwriting(options.seed)
    text = TextModality()
    print("fitting speech units and image strips", flush=True)
    unpaired_sounds = sounds[spoken : spoken + len(alone)]
    speech = SpeechModality.fit(
        [*unpaired_sounds, *sounds][: size.unit_clips],
        units=size.units,
        rate=size.rate,
        refine_steps=size.refining,
        seed=options.seed,
    )
    image = ImageModality.fit(hand.pixels, strips=size.strips, width=size.strip_width, seed=options.seed)
    modalities = {"speech": speech, "text": text, "image": image}
    with threadpool_limits(1):  # threads do not pay off for short clips
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


def fuse(folders: dict[str, str], *, relative: bool) -> mt.FusedModel:
    """Compile the fusion: all towers are linked; text is frozen, the others are trained."""
    graph = mt.FusionGraph()
    graph.add_tower("speech", folders["speech"], train="all")
    graph.add_tower("text", folders["text"])
    graph.add_tower("image", folders["image"], train="all")
    for source, target in permutations(graph.towers, 2):
        graph.add_link(source, target, interleave=1, embeddings=True, relative=relative)
    return graph.compile()


def direction(example: Example) -> str:
    """Name the loss of an example.

    >>> direction(directed([([0, 5, 1], [0, 7, 1])], "speech", "text")[0])
    'speech→text'
    """
    source, target = example
    return f"{source.tower}→{target.tower}"


def training_batches(corpus: Corpus, size: Size, options: argparse.Namespace) -> Iterator[list[Example]]:
    """Yield batches of the four directions with pairs, in turn."""
    tasks: list[list[Example]] = []
    for (one, other), pairs in corpus.pairs.items():
        tasks.append(directed(pairs, one, other))
        tasks.append(directed([(second, first) for first, second in pairs], other, one))
    return in_turn(*(endless(task, size.batch, options.seed) for task in tasks))


def fit(model: mt.FusedModel, corpus: Corpus, size: Size, options: argparse.Namespace) -> Run:
    """Train on the pairs, and record the contributions of all links, also those without pairs."""
    watched = []
    for source, target in permutations(model.graph.towers, 2):
        pairs = [(phrase.tokens[source], phrase.tokens[target]) for phrase in corpus.held_out[:WATCHED]]
        watched.append(directed(pairs, source, target))
    return train(
        model,
        training_batches(corpus, size, options),
        model.parameter_groups(lr=size.lr),
        size.fusing,
        title="fusing",
        collate=noise(size, options),
        named=direction,
        watch=watching(model, watched),
    )


def noise(size: Size, options: argparse.Namespace) -> Callable[[list[Example]], dict]:
    """Return a collate function with noise in the history of speech and images."""
    return noisy({"speech": size.noise, "image": size.noise}, options.seed)


def steps_within(
    seconds: float, model: mt.FusedModel, corpus: Corpus, size: Size, options: argparse.Namespace
) -> int:
    """Estimate how many steps of `fit` take this many seconds."""
    batches = training_batches(corpus, size, options)
    return estimated_steps(seconds, model, batches, lambda twin: twin.parameter_groups(lr=size.lr))


def changed(model: mt.FusedModel, before: Mapping[str, Tensor]) -> dict[str, str]:
    """Count, for each tower and link, the tensors that are not bit for bit the same as before."""
    counts: dict[str, list[bool]] = {}
    for key, value in model.state_dict().items():
        part = "/".join(key.split(".")[:2])
        counts.setdefault(part, []).append(not torch.equal(value, before[key]))
    return {part: f"{sum(differ)} of {len(differ)}" for part, differ in counts.items()}


def largest_contributions(taps: Mapping[str, float]) -> dict[str, float]:
    """Return the largest contribution among the taps of each link.

    >>> largest_contributions({"step": 9, "a->b 0-0": 0.1, "a->b 1-1": 0.3, "b->a 0-0": 0.0})
    {'a->b': 0.3, 'b->a': 0.0}
    """
    largest: dict[str, float] = {}
    for name, value in taps.items():
        link, _, tap = name.partition(" ")
        if tap:
            largest[link] = max(largest.get(link, 0.0), value)
    return largest


def report(model: mt.FusedModel, corpus: Corpus, readers: Readers, out: Path) -> list[dict[str, Any]]:
    """Evaluate every route; write the table, images and sounds."""
    phrases, modalities = corpus.held_out, corpus.modalities
    answers = ceilings(phrases, modalities, readers)
    for route in ROUTES:
        answers.append(
            follow(model, route, phrases, modalities, readers, limit=corpus.longest, paired=PAIRED)
        )
    rows = [answer.row(phrases) for answer in answers]
    table = as_markdown(rows, count=len(phrases))
    print(f"\n{table}", end="")
    (out / "table.md").write_text(table)
    draw_answers(phrases, answers, out / "pictures/digits.png")
    write_audio(out / "audio", phrases, answers)
    return rows


def print_reuse(reuse: Mapping[str, Any]) -> None:
    before, after = reuse["text perplexity before"], reuse["text perplexity after"]
    print(f"\nperplexity of the text decoder: {before:.4f} before, {after:.4f} after")
    print(f"\n{'part':24}{'tensors that changed':>22}{'largest contribution':>22}")
    for part, count in reuse["tensors that changed"].items():
        value = reuse["largest contribution"].get(part.removeprefix("links/"))
        print(f"{part:24}{count:>22}" + ("" if value is None else f"{value:22.3f}"))
    print("contribution: the norm of what a tap of the link adds over the norm of the state it is added to")


if __name__ == "__main__":
    main()
