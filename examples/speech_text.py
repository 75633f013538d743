"""Fuse a text decoder and a speech decoder for speech recognition and synthesis.

    python examples/speech_text.py                      # spoken digits, about ten minutes on two CPU cores
    python examples/speech_text.py --quick              # a smoke test of about a minute
    python examples/speech_text.py --task sentences --steps 6000
    python examples/speech_text.py --corpus my-recordings --text-model path/or/hub-id

Everything is made from scratch: speech by a synthetic voice, speech units, a small text decoder and a small
speech decoder pretrained on unpaired data. They are linked in both directions and trained on pairs.
Checkpoints, audio, plots and results are written to --out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import multitower as mt
from multitower_speech import SpeechModality
from multitower_text import TextModality
from phrases import number_phrases, sentences
from report import Corpus, Pair, System, evaluate, write_report, write_results
from spoken_corpus import Utterance, read_corpus, speak, split
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

SPEECH_DEPTH = 4


@dataclass(frozen=True)
class Size:
    """Sizes: number of utterances, units, training steps (of the units' refiner, decoders, all), ..."""

    pairs: int = 5000
    unpaired: int = 1000
    unpaired_texts: int = 20_000
    held_out: int = 100
    units: int = 512
    unit_clips: int = 300
    rate: float = 50 / 3
    width: int = 128
    depth: int = SPEECH_DEPTH
    batch: int = 32
    refining: int = 1000
    pretraining: int = 300
    zipping: int = 1600
    lr: float = 3e-3
    rival_lr: float = 3e-3
    noise: float = 0.15


QUICK = Size(
    pairs=100,
    unpaired=30,
    unpaired_texts=400,
    held_out=6,
    units=64,
    width=64,
    refining=20,
    pretraining=20,
    zipping=20,
)


@dataclass(frozen=True)
class Data:
    """Training pairs, held-out pairs, and unpaired data."""

    pairs: list[Utterance]
    held_out: list[Utterance]
    texts: list[str]
    speech: list[Utterance]


def main() -> None:
    options = parse()
    size = QUICK if options.quick else Size()
    size = replace(size, zipping=options.steps or size.zipping)
    torch.manual_seed(options.seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    data = make_data(options, size)
    corpus = encode(data, *fit_modalities(options, size, data))
    folders = pretrain_towers(options, size, corpus, out)
    model = zip_towers(folders, None if options.position == "none" else options.position).to(options.device)
    print(f"\n{model.graph}\n\n{model.schedule.explain()}\n")

    untouched = perplexity(model.unimodal("text"), corpus.held_out_text, options.device)
    if options.minutes is not None:
        left = 60 * options.minutes - (time.monotonic() - started)
        size = replace(size, zipping=steps_within(FOR_TRAINING * left, model, corpus, options, size))
    run = fit(model, corpus, options, size)
    pipe = mt.Pipeline(model, {"speech": corpus.speech, "text": corpus.text})
    pipe.save_pretrained(out / "fused")
    zipped = perplexity(model.unimodal("text"), corpus.held_out_text, options.device)
    systems = [evaluate("zipper", model, corpus, perplexity=zipped)]
    if options.compare:
        systems.append(train_rival(folders["text"], corpus, options, size, out))
    rows = write_report(out, model, run, systems, corpus, untouched=untouched)
    check_in_a_new_process(pipe, corpus, out)
    seconds = round(time.monotonic() - started)
    settings = {**vars(options), **asdict(size), "steps": run.steps, "seconds": seconds}
    write_results(out, settings, table=rows)
    print(f"\n{seconds} s in all. Audio, pictures, checkpoints and figures are in {out}/")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task", choices=("digits", "sentences"), default="digits", help="what the voice says"
    )
    parser.add_argument("--corpus", help="your own recordings: a folder with metadata.csv, LJSpeech style")
    parser.add_argument(
        "--text-model", help="a decoder to use for text: Hub id or folder (default: train one)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=int,
        help=f"steps on pairs (default: {Size.zipping}; all takes about ten minutes on two free CPU cores)",
    )
    length.add_argument(
        "--minutes", type=float, help="choose the steps so that all but --compare takes about so long here"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of the whole path")
    parser.add_argument(
        "--compare", action="store_true", help="also train vocabulary expansion, on the same data"
    )
    parser.add_argument(
        "--position",
        choices=("segment", "rotary", "none"),
        default="segment",
        help="of links",
    )
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/speech_text", help="where to keep everything")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def make_data(options: argparse.Namespace, size: Size) -> Data:
    if options.corpus:
        recordings = read_corpus(options.corpus)
        pairs, held_out = split(recordings, min(size.held_out, len(recordings) // 5), options.seed)
        return Data(pairs, held_out, [one.transcript for one in pairs], pairs)
    draw = number_phrases if options.task == "digits" else sentences
    paired = draw(size.pairs + size.held_out, seed=options.seed)
    alone = draw(size.unpaired, seed=options.seed + 1, exclude=paired)
    texts = draw(size.unpaired_texts, seed=options.seed + 2, exclude=paired)
    spoken = speak([*paired, *alone], seed=options.seed)
    pairs, held_out = split(spoken[: len(paired)], size.held_out, options.seed)
    return Data(pairs, held_out, texts, spoken[len(paired) :])


def fit_modalities(
    options: argparse.Namespace, size: Size, data: Data
) -> tuple[TextModality, SpeechModality]:
    print("fitting speech units", flush=True)
    waveforms = [one.waveform for one in [*data.speech, *data.pairs][: size.unit_clips]]
    speech = SpeechModality.fit(
        waveforms, units=size.units, rate=size.rate, refine_steps=size.refining, seed=options.seed
    )
    return TextModality(options.text_model), speech


def encode(data: Data, text: TextModality, speech: SpeechModality) -> Corpus:
    def pairs(utterances: Sequence[Utterance]) -> list[Pair]:
        bar = tqdm(utterances, desc="encoding", unit="clip")
        return [Pair(one, text.encode(one.transcript), speech.encode(one.waveform)) for one in bar]

    with threadpool_limits(1):  # threads do not pay off for short clips
        return Corpus(
            text,
            speech,
            pairs(data.pairs),
            pairs(data.held_out),
            [text.encode(line) for line in data.texts],
            [pair.speech for pair in pairs(data.speech)],
        )


def pretrain_towers(
    options: argparse.Namespace,
    size: Size,
    corpus: Corpus,
    out: Path,
) -> dict[str, str]:
    """Pretrain each tower on unpaired data, as an ordinary transformers checkpoint."""
    jobs = {"speech": (corpus.speech, corpus.unpaired_speech)}
    if options.text_model is None:
        jobs["text"] = (corpus.text, corpus.unpaired_text)
    folders = pretrain_decoders(
        jobs,
        size.pretraining,
        out,
        width=size.width,
        depth=size.depth,
        batch=size.batch,
        seed=options.seed,
        device=options.device,
    )
    return {"text": options.text_model, **folders}


def zip_towers(folders: dict[str, str], position: str | None) -> mt.FusedModel:
    """Compile the fusion: text is frozen, speech is trained."""
    graph = mt.FusionGraph()
    graph.add_tower("speech", folders["speech"], train="all")
    graph.add_tower("text", folders["text"])
    depth = transformers.AutoConfig.from_pretrained(folders["text"]).num_hidden_layers
    step = max(1, depth // SPEECH_DEPTH)
    graph.add_link("speech", "text", interleave=(1, step), embeddings=True, position=position)
    graph.add_link("text", "speech", interleave=1, embeddings=True, position=position)
    return graph.compile()


def examples(pairs: Sequence[Pair]) -> list[list[Example]]:
    """Make examples of both tasks, recognition and synthesis, from every pair."""
    spoken = [(one.speech, one.text) for one in pairs]
    written = [(one.text, one.speech) for one in pairs]
    return [directed(spoken, "speech", "text"), directed(written, "text", "speech")]


def training_batches(corpus: Corpus, options: argparse.Namespace, size: Size) -> Iterator[list[Example]]:
    """Yield batches of the tasks in turn."""
    return in_turn(*(endless(task, size.batch, options.seed) for task in examples(corpus.pairs)))


def fit(model: mt.FusedModel, corpus: Corpus, options: argparse.Namespace, size: Size) -> Run:
    """Train on the pairs, with noise in the speech tower's own history."""
    return train(
        model,
        training_batches(corpus, options, size),
        model.parameter_groups(lr=size.lr),
        size.zipping,
        title="zipping",
        collate=noisy({"speech": size.noise}, options.seed),
        watch=watching(model, examples(corpus.held_out[:WATCHED])),
    )


def steps_within(
    seconds: float, model: mt.FusedModel, corpus: Corpus, options: argparse.Namespace, size: Size
) -> int:
    """Estimate how many steps of `fit` take this many seconds."""
    batches = training_batches(corpus, options, size)
    return estimated_steps(seconds, model, batches, lambda twin: twin.parameter_groups(lr=size.lr))


def train_rival(folder: str, corpus: Corpus, options: argparse.Namespace, size: Size, out: Path) -> System:
    """Train all parameters of vocabulary expansion on the same pairs for the same number of steps."""
    native = transformers.AutoModelForCausalLM.from_pretrained(folder)
    modalities = {"text": corpus.text, "speech": corpus.speech}
    model = mt.baseline.VocabularyExpansion(native, modalities, train="all").to(options.device)
    train(
        model,
        training_batches(corpus, options, size),
        [{"params": list(model.parameters()), "lr": size.rival_lr}],
        size.zipping,
        title="vocabulary expansion",
    )
    native.save_pretrained(out / "vocabulary-expansion")
    expanded = perplexity(native, corpus.held_out_text, options.device)
    return evaluate("vocabulary expansion", model, corpus, perplexity=expanded)


def check_in_a_new_process(pipe: mt.Pipeline, corpus: Corpus, out: Path) -> None:
    """Load the checkpoint in another process, and check that it transcribes the same."""
    given, limit = [mt.Segment("speech", corpus.held_out[0].speech)], corpus.longest("text")
    here = pipe(given, output="text", max_new_tokens=limit, do_sample=False).strip()
    script, clip = Path(__file__).with_name("transcribe.py"), out / "audio/00-original.wav"
    command = [sys.executable, script, out / "fused", clip, "--max-new-tokens", str(limit)]
    there = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    print(f"\nloaded in a new process: {there!r}")
    if there != here:
        raise SystemExit(f"the loaded checkpoint heard {there!r}, the trained model {here!r}")


if __name__ == "__main__":
    main()
