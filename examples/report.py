"""Evaluate a trained system on held-out utterances; write tables, plots and audio."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from torch import Tensor

import multitower as mt
from judge import Judge, word_errors
from multitower_speech import SpeechModality
from multitower_text import TextModality
from pictures import plot_attention, plot_comparison, plot_contributions, plot_losses
from spoken_corpus import SAMPLE_RATE, Utterance
from training import Run

SHOWN = 8
COLUMNS = {
    "system": "held-out utterances",
    "ASR": "ASR WER %",
    "TTS": "TTS WER %",
    "text before": "text perplexity before",
    "text after": "after",
}
NOTES = """\
ASR WER: word errors in what a system hears; TTS WER: in what whisper hears when it speaks; each with the
95 % interval over {count} utterances. Original audio: whisper's own errors in the recordings; true units: in
audio made from their speech units, the best that TTS can be expected to reach. Text perplexity: of the text
decoder alone, before and after training on pairs.
"""


@dataclass(frozen=True, eq=False)
class Pair:
    """An utterance and its tokens."""

    utterance: Utterance
    text: Tensor
    speech: Tensor


@dataclass(frozen=True, eq=False)
class Corpus:
    """The modalities, and all data as tokens: training pairs, held-out pairs, and unpaired data."""

    text: TextModality
    speech: SpeechModality
    pairs: list[Pair]
    held_out: list[Pair]
    unpaired_text: list[Tensor]
    unpaired_speech: list[Tensor]

    @property
    def held_out_text(self) -> list[Tensor]:
        """The tokens of the held-out transcripts."""
        return [pair.text for pair in self.held_out]

    def longest(self, name: str) -> int:
        """Return a generous limit for decoding."""
        return 10 + max(len(getattr(pair, name)) for pair in [*self.pairs, *self.held_out])


@dataclass(frozen=True, eq=False)
class System:
    """The outputs of one trained system for the held-out utterances."""

    name: str
    transcripts: list[str]
    waveforms: list[np.ndarray]
    perplexity: float


def evaluate(
    name: str,
    model: mt.FusedModel | mt.baseline.VocabularyExpansion,
    corpus: Corpus,
    *,
    perplexity: float,
) -> System:
    """Transcribe and synthesise every held-out utterance."""
    print(f"{name}: transcribing and speaking {len(corpus.held_out)} held-out utterances", flush=True)
    given = [[mt.Segment("speech", pair.speech)] for pair in corpus.held_out]
    written = model.generate(given, output=["text"], max_new_tokens=corpus.longest("text"), do_sample=False)
    given = [[mt.Segment("text", pair.text)] for pair in corpus.held_out]
    spoken = model.generate(
        given, output=["speech"], max_new_tokens=corpus.longest("speech"), do_sample=False
    )
    return System(
        name,
        [corpus.text.decode(row[0].tokens).strip() for row in written],
        [corpus.speech.decode(row[0].tokens) for row in spoken],
        perplexity,
    )


def write_report(
    out: Path,
    model: mt.FusedModel,
    run: Run,
    systems: Sequence[System],
    corpus: Corpus,
    *,
    untouched: float,
) -> list[dict[str, Any]]:
    """Score all outputs, print the table and some transcripts; write the table, audio and plots.

    `untouched` is the perplexity of the text decoder before training on pairs.
    """
    truth = [pair.utterance.transcript for pair in corpus.held_out]
    originals = [pair.utterance.waveform for pair in corpus.held_out]
    resynthesised = [corpus.speech.decode(pair.speech) for pair in corpus.held_out]
    judge = Judge()
    rows: list[dict[str, Any]] = []
    heard = {}
    for name, waveforms in (("original audio", originals), ("true units", resynthesised)):
        heard[name] = judge.transcribe(waveforms)
        rows.append({"system": name, "TTS": word_errors(truth, heard[name])})
    for system in systems:
        heard[system.name] = judge.transcribe(system.waveforms)
        rows.append(
            {
                "system": system.name,
                "ASR": word_errors(truth, system.transcripts),
                "TTS": word_errors(truth, heard[system.name]),
                "text before": untouched,
                "text after": system.perplexity,
            }
        )
    table = as_table(rows, count=len(truth))
    print(f"\n{table}", end="")
    (out / "table.md").write_text(table)
    _print_examples(truth, systems, heard)
    _write_audio(out / "audio", originals, resynthesised, systems)
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    mt.inspect.draw_graph(model).savefig(pictures / "graph.png", dpi=150)
    plot_losses(run.history, pictures / "losses.png")
    plot_contributions(run.contributions, pictures / "contributions.png")
    bars = [{"system": row["system"], **{k: row[k].rate for k in ("ASR", "TTS") if k in row}} for row in rows]
    plot_comparison(bars, pictures / "wer.png")
    draw_alignment(model, corpus, pictures)
    return rows


def draw_alignment(model: mt.FusedModel, corpus: Corpus, folder: Path) -> None:
    """Plot, for each direction, the cross-attention head with the steadiest alignment."""
    pair = max(corpus.held_out[:SHOWN], key=lambda pair: len(pair.text))
    for source, target in (("speech", "text"), ("text", "speech")):
        tokens = {"speech": pair.speech, "text": pair.text}
        batch = mt.collate([[mt.Segment(source, tokens[source]), mt.Segment(target, tokens[target])]])
        device = next(model.parameters()).device
        streams = {
            name: {key: value.to(device) for key, value in stream.items()}
            for name, stream in batch["streams"].items()
        }
        with torch.no_grad():
            attentions = model(streams, output_attentions=True).attentions[f"{source}->{target}"]
        heads = {
            (tap, head): weights[0, head, :-1, 1:-1].float().cpu()
            for tap, weights in attentions.items()
            for head in range(weights.shape[1])
        }
        tap, head = max(heads, key=lambda key: _steadiness(heads[key]))
        weights = heads[tap, head]
        labels = [corpus.text.decode(token[None]) for token in pair.text[1:-1]]
        names = [label.replace(" ", "␣") for label in labels]
        if target == "text":
            names.append("end")
        else:
            weights = weights[:-1]
        plot_attention(
            weights.numpy(),
            folder / f"attention-{source}-to-{target}.png",
            transcript_labels=names,
            seconds_per_unit=1 / corpus.speech.rate,
            waveform=pair.utterance.waveform,
            speech="source" if source == "speech" else "target",
            title=f"{target} reads {source}: tap {tap}, head {head + 1}, “{pair.utterance.transcript}”",
        )


def write_results(out: Path, settings: dict[str, Any], **results: Any) -> None:
    """Write `results.json`: results, settings and machine."""
    machine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    found = {"settings": settings, "machine": machine, **results}
    (out / "results.json").write_text(json.dumps(found, indent=2, default=asdict) + "\n")


def as_table(rows: Sequence[dict[str, Any]], *, count: int) -> str:
    """Return the rows as a Markdown table, followed by notes."""
    cells = [
        [
            f"{row[key]:.2f}" if key.startswith("text") and key in row else str(row.get(key, ""))
            for key in COLUMNS
        ]
        for row in rows
    ]
    return f"{aligned([[*COLUMNS.values()], *cells], numbers=4)}\n{NOTES.format(count=count)}"


def aligned(lines: Sequence[Sequence[str]], *, numbers: int) -> str:
    """Return a Markdown table, also aligned as plain text; the last `numbers` columns are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<"] * (len(widths) - numbers) + [">"] * numbers
    rule = [
        "-" * (width - (side == ">")) + ":" * (side == ">") for width, side in zip(widths, sides, strict=True)
    ]
    rows = [
        [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)]
        for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in (rows[0], rule, *rows[1:]))


def _steadiness(weights: Tensor) -> float:
    """Return how sharp and monotonic the attention is.

    This is the correlation of target places with the source places that they attend to most, weighted by
    sharpness (the maximal attention), times the mean sharpness. About 0 if only tokens that are not plotted
    are attended to.
    """
    sharpness, places = weights.clamp(min=1e-6).max(1)
    points = torch.stack([torch.arange(len(weights), dtype=torch.float), places.float()])
    covariance = torch.cov(points, aweights=sharpness, correction=0)
    correlation = covariance[0, 1] / covariance.diagonal().prod().sqrt()
    return float(correlation.nan_to_num() * sharpness.mean())


def _print_examples(truth: Sequence[str], systems: Sequence[System], heard: dict[str, list[str]]) -> None:
    for number in range(min(SHOWN, len(truth))):
        print(f"\nsaid:  {truth[number]}")
        for system in systems:
            print(f"  {system.name} hears: {system.transcripts[number]}")
            print(f"  {system.name} says, as whisper hears it: {heard[system.name][number]}")


def _write_audio(
    folder: Path,
    originals: Sequence[np.ndarray],
    resynthesised: Sequence[np.ndarray],
    systems: Sequence[System],
) -> None:
    folder.mkdir(exist_ok=True)
    versions = {"original": originals, "true-units": resynthesised}
    versions |= {system.name.replace(" ", "-"): system.waveforms for system in systems}
    for name, waveforms in versions.items():
        for number, waveform in enumerate(waveforms[:SHOWN]):
            soundfile.write(folder / f"{number:02d}-{name}.wav", waveform, SAMPLE_RATE, subtype="FLOAT")
