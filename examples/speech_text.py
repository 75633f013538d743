"""Zip a text decoder and a speech decoder: speech recognition and synthesis from one fused model.

    python examples/speech_text.py                      # spoken digits, about ten minutes on two CPU cores
    python examples/speech_text.py --quick              # the same path in a minute, too short to learn
    python examples/speech_text.py --task sentences --minutes 60
    python examples/speech_text.py --corpus my-recordings --text-model path/or/hub-id

From nothing: a neural voice speaks, speech units are fitted, a small text decoder and a small speech decoder
are pretrained on unpaired data, zipped in both directions, and trained on the pairs. All that it makes is
kept in --out: the checkpoints, the audio, the pictures and the figures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    Budget,
    Run,
    directed,
    endless,
    in_turn,
    perplexity,
    pretrain_decoders,
    target_losses,
    train,
)

SPEECH_DEPTH = 4


@dataclass(frozen=True)
class Size:
    """How much of everything; times are shares of the minutes that the caller allows."""

    pairs_per_minute: int = 500
    unpaired_per_minute: int = 100
    unpaired_texts: int = 20_000
    held_out: int = 60
    units: int = 512
    unit_clips: int = 300
    rate: float = 50 / 3
    width: int = 128
    depth: int = SPEECH_DEPTH
    batch: int = 32
    lr: float = 1.5e-3
    pretraining: float = 0.03
    zipping: float = 0.82
    steps: int | None = None

    def pretraining_budget(self, minutes: float) -> Budget:
        """Say how long each decoder is pretrained, of a run of so many minutes."""
        return Budget(60 * minutes * self.pretraining, self.steps)

    def zipping_budget(self, seconds_left: float) -> Budget:
        """Say how long the pairs are trained on; the rest of the time is for the report."""
        return Budget(None if self.steps else self.zipping * seconds_left, self.steps)


QUICK = Size(
    pairs_per_minute=100, unpaired_per_minute=30, unpaired_texts=400, held_out=6, units=64, width=64, steps=20
)


@dataclass(frozen=True)
class Data:
    """Pairs to train on and to test on, and what is not paired."""

    pairs: list[Utterance]
    held_out: list[Utterance]
    texts: list[str]
    speech: list[Utterance]


def main() -> None:
    options = parse()
    size = QUICK if options.quick else Size()
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
    left = 60 * options.minutes - (time.monotonic() - started)
    run = fit(model, corpus, options, size, size.zipping_budget(left), title="zipping")
    pipe = mt.Pipeline(model, {"speech": corpus.speech, "text": corpus.text})
    pipe.save_pretrained(out / "fused")
    zipped = perplexity(model.unimodal("text"), corpus.held_out_text, options.device)
    systems = [evaluate("zipper", model, corpus, perplexity=zipped)]
    if options.compare:
        systems.append(train_rival(folders["text"], corpus, options, size, run, out))
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
    parser.add_argument("--minutes", type=float, default=10, help="about how long the whole run takes")
    parser.add_argument("--quick", action="store_true", help="a smoke run of the whole path")
    parser.add_argument(
        "--compare", action="store_true", help="also train vocabulary expansion, on the same data"
    )
    parser.add_argument(
        "--position", choices=("rotary", "none"), default="rotary", help="positions that links carry"
    )
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/speech_text", help="where to keep everything")
    options = parser.parse_args()
    if options.quick:
        options.minutes = 1.0
    return options


def make_data(options: argparse.Namespace, size: Size) -> Data:
    if options.corpus:
        recordings = read_corpus(options.corpus)
        pairs, held_out = split(recordings, min(size.held_out, len(recordings) // 5), options.seed)
        return Data(pairs, held_out, [one.transcript for one in pairs], pairs)
    draw = number_phrases if options.task == "digits" else sentences
    paired = draw(int(size.pairs_per_minute * options.minutes) + size.held_out, seed=options.seed)
    alone = draw(int(size.unpaired_per_minute * options.minutes), seed=options.seed + 1, exclude=paired)
    texts = draw(size.unpaired_texts, seed=options.seed + 2, exclude=paired)
    spoken = speak([*paired, *alone], seed=options.seed)
    pairs, held_out = split(spoken[: len(paired)], size.held_out, options.seed)
    return Data(pairs, held_out, texts, spoken[len(paired) :])


def fit_modalities(
    options: argparse.Namespace, size: Size, data: Data
) -> tuple[TextModality, SpeechModality]:
    print("fitting speech units", flush=True)
    waveforms = [one.waveform for one in [*data.speech, *data.pairs][: size.unit_clips]]
    speech = SpeechModality.fit(waveforms, units=size.units, rate=size.rate, seed=options.seed)
    return TextModality(options.text_model), speech


def encode(data: Data, text: TextModality, speech: SpeechModality) -> Corpus:
    def pairs(utterances: Sequence[Utterance]) -> list[Pair]:
        bar = tqdm(utterances, desc="encoding", unit="clip")
        return [Pair(one, text.encode(one.transcript), speech.encode(one.waveform)) for one in bar]

    with threadpool_limits(1):  # clips are short: threads would spend their time waiting for each other
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
    """Make each tower an ordinary transformers checkpoint; nothing here is paired."""
    jobs = {"speech": (corpus.speech, corpus.unpaired_speech)}
    if options.text_model is None:
        jobs["text"] = (corpus.text, corpus.unpaired_text)
    folders = pretrain_decoders(
        jobs,
        size.pretraining_budget(options.minutes),
        out,
        width=size.width,
        depth=size.depth,
        batch=size.batch,
        seed=options.seed,
        device=options.device,
    )
    return {"text": options.text_model, **folders}


def zip_towers(folders: dict[str, str], position: str | None) -> mt.FusedModel:
    """Declare the fusion: text stays frozen, speech learns on."""
    graph = mt.FusionGraph()
    graph.add_tower("speech", folders["speech"], train="all")
    graph.add_tower("text", folders["text"])
    depth = transformers.AutoConfig.from_pretrained(folders["text"]).num_hidden_layers
    graph.add_link("speech", "text", interleave=(1, max(1, depth // SPEECH_DEPTH)), position=position)
    graph.add_link("text", "speech", interleave=1, position=position)
    return graph.compile()


def fit(
    model: mt.FusedModel | mt.VocabularyExpansion,
    corpus: Corpus,
    options: argparse.Namespace,
    size: Size,
    budget: Budget,
    *,
    title: str,
) -> Run:
    """Train recognition and synthesis together: every pair both ways."""
    spoken = [(one.speech, one.text) for one in corpus.pairs]
    written = [(one.text, one.speech) for one in corpus.pairs]
    tasks = [directed(spoken, "speech", "text"), directed(written, "text", "speech")]
    batches = in_turn(*(endless(task, size.batch, options.seed, options.device) for task in tasks))
    if isinstance(model, mt.FusedModel):
        groups = model.parameter_groups(lr=size.lr)
    else:
        groups = [{"params": list(model.parameters()), "lr": size.lr}]

    return train(model, target_losses(model), batches, groups, budget, title=title)


def train_rival(
    folder: str,
    corpus: Corpus,
    options: argparse.Namespace,
    size: Size,
    zipper: Run,
    out: Path,
) -> System:
    """Train vocabulary expansion on the same pairs for the same number of steps, all parameters tuned."""
    native = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = mt.VocabularyExpansion(native, {"text": corpus.text, "speech": corpus.speech}).to(options.device)
    fit(model, corpus, options, size, Budget(steps=zipper.steps), title="vocabulary expansion")
    native.save_pretrained(out / "vocabulary-expansion")
    expanded = perplexity(native, corpus.held_out_text, options.device)
    return evaluate("vocabulary expansion", model, corpus, perplexity=expanded)


def check_in_a_new_process(pipe: mt.Pipeline, corpus: Corpus, out: Path) -> None:
    """Load the checkpoint elsewhere, and see that it hears the same."""
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
