"""Evaluate a model of speech, text and images on held-out phrases, in all directions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from matplotlib.figure import Figure
from torch import Tensor

import multitower as mt
from digit_images import SIDE, ImageJudge
from judge import Judge, word_errors
from report import aligned
from spoken_corpus import SAMPLE_RATE

SHOWN = 8
NOTES = """\
Word errors: in texts, and in what whisper hears in sounds and a classifier reads in images, each with the
95 % interval over {count} phrases. Original: in the true sounds and images; true tokens: in those made from
their tokens.
"""


@dataclass(frozen=True, eq=False)
class Phrase:
    """A phrase in all three modalities: raw data (a string, samples, pixels) and tokens, by tower."""

    words: str
    raw: Mapping[str, Any]
    tokens: Mapping[str, Tensor]


@dataclass(frozen=True)
class Route:
    """A way from given modalities to an output.

    Attributes:
        given: The towers whose true segments are given.
        output: The towers to decode, in order; the last is the output.
        alone: Whether each tower gets only the segment before its own, instead of the whole example.
    """

    given: tuple[str, ...]
    output: tuple[str, ...]
    alone: bool = False

    @property
    def title(self) -> str:
        """The given modalities and the output."""
        return f"{' + '.join(self.given)} → {self.output[-1]}"

    @property
    def way(self) -> str:
        """The modality in between, if any."""
        if len(self.output) == 1:
            return "directly"
        return f"through {self.output[0]}" + (" alone" if self.alone else "")

    def is_trained(self, paired: Sequence[tuple[str, str]]) -> bool:
        """Whether there were training pairs of exactly these towers."""
        return {*self.given, self.output[-1]} in [set(pair) for pair in paired]


ROUTES = (
    Route(("speech",), ("text",)),
    Route(("text",), ("speech",)),
    Route(("image",), ("text",)),
    Route(("text",), ("image",)),
    Route(("speech",), ("image",)),
    Route(("speech",), ("text", "image")),
    Route(("speech",), ("text", "image"), alone=True),
    Route(("speech", "text"), ("image",)),
    Route(("image",), ("speech",)),
    Route(("image",), ("text", "speech")),
    Route(("image",), ("text", "speech"), alone=True),
    Route(("image", "text"), ("speech",)),
)


@dataclass(frozen=True, eq=False)
class Answer:
    """The outputs of a route for the held-out phrases, and their readings by a judge."""

    title: str
    way: str
    trained: bool | None
    tower: str
    raws: list[Any]
    read: list[str]

    def row(self, phrases: Sequence[Phrase]) -> dict[str, Any]:
        """Return a row of the table."""
        errors = word_errors([phrase.words for phrase in phrases], self.read)
        found = {"direction": self.title, "way": self.way, "pairs in training": self.trained}
        return {**found, "word errors %": errors}


class Readers:
    """Reads texts, sounds and images as words, with recognisers independent of the towers."""

    def __init__(self, images: ImageJudge, speech: Judge) -> None:
        self.images, self.speech = images, speech
        self.heard: dict[bytes, str] = {}

    def read(self, tower: str, raws: Sequence[Any]) -> list[str]:
        """Return the words in outputs of a tower; transcriptions of sounds are cached."""
        if tower == "image":
            return [self.images.read(image) for image in raws]
        if tower == "speech":
            new = {sound.tobytes(): sound for sound in raws if sound.tobytes() not in self.heard}
            if new:
                self.heard.update(zip(new, self.speech.transcribe(list(new.values())), strict=True))
            return [self.heard[sound.tobytes()] for sound in raws]
        return [text.strip() for text in raws]


def ceilings(
    phrases: Sequence[Phrase], modalities: Mapping[str, mt.Modality], readers: Readers
) -> list[Answer]:
    """Read the original sounds and images, and those decoded from their true tokens."""
    answers = []
    for tower in ("speech", "image"):
        originals = [phrase.raw[tower] for phrase in phrases]
        restored = [modalities[tower].decode(phrase.tokens[tower]) for phrase in phrases]
        for way, raws in (("original", originals), ("true tokens", restored)):
            answers.append(Answer(f"({tower})", way, None, tower, raws, readers.read(tower, raws)))
    return answers


def follow(
    model: mt.FusedModel,
    route: Route,
    phrases: Sequence[Phrase],
    modalities: Mapping[str, mt.Modality],
    readers: Readers,
    *,
    limit: int,
    paired: Sequence[tuple[str, str]],
) -> Answer:
    """Generate the output of a route for every held-out phrase, and read it."""
    print(f"{route.title}, {route.way}", flush=True)
    rows = [[mt.Segment(name, phrase.tokens[name]) for name in route.given] for phrase in phrases]
    for output in [[name] for name in route.output] if route.alone else [list(route.output)]:
        rows = model.generate(rows, output=output, max_new_tokens=limit, do_sample=False)
    tower = route.output[-1]
    raws = [modalities[tower].decode(row[-1].tokens) for row in rows]
    read = readers.read(tower, raws)
    return Answer(route.title, route.way, route.is_trained(paired), tower, raws, read)


def as_markdown(rows: Sequence[Mapping[str, Any]], *, count: int) -> str:
    """Return the rows as a Markdown table, followed by notes."""
    lines = [["held-out phrases", "way", "pairs in training", "word errors %"]]
    for row in rows:
        trained = {None: "", True: "yes", False: "none"}[row["pairs in training"]]
        lines.append([row["direction"], row["way"], trained, str(row["word errors %"])])
    return f"{aligned(lines, numbers=1)}\n{NOTES.format(count=count)}"


def write_audio(folder: Path, phrases: Sequence[Phrase], answers: Sequence[Answer]) -> None:
    """Write the generated speech of the first phrases."""
    folder.mkdir(exist_ok=True)
    for answer in answers:
        if answer.tower == "speech":
            for number, (phrase, sound) in enumerate(zip(phrases[:SHOWN], answer.raws, strict=False)):
                title = f"{number:02d} {phrase.words} {answer.title} {answer.way}".replace("→", "to")
                name = re.sub(r"\W+", "-", title)
                soundfile.write(folder / f"{name}.wav", sound, SAMPLE_RATE, subtype="FLOAT")


def draw_answers(phrases: Sequence[Phrase], answers: Sequence[Answer], path: Path) -> None:
    """Draw the generated images beside their prompts: a row per phrase, a column per route."""
    drawn = [answer for answer in answers if answer.tower == "image"]
    shown = phrases[:SHOWN]
    figure = Figure(figsize=(2.6 + 2.3 * len(drawn), 0.6 + 0.85 * len(shown)), layout="constrained", dpi=150)
    heads, *grid = figure.subplots(1 + len(shown), 1 + len(drawn), height_ratios=[0.6] + [1] * len(shown))
    for axes in figure.axes:
        axes.set_axis_off()
    for axes, title in zip(heads, ["prompt", *(f"{each.title}\n{each.way}" for each in drawn)], strict=True):
        axes.text(0.5, 0.5, title, ha="center", va="center", transform=axes.transAxes)
    longest = max(len(phrase.raw["speech"]) for phrase in shown) / SAMPLE_RATE
    widest = max(image.shape[1] for answer in drawn for image in answer.raws[:SHOWN])
    for number, (phrase, (prompt, *line)) in enumerate(zip(shown, grid, strict=True)):
        sound = phrase.raw["speech"]
        prompt.plot(np.arange(len(sound)) / SAMPLE_RATE, sound, color="#0b6e99", linewidth=0.4)
        prompt.set(xlim=(0, longest))
        prompt.set_title(f"“{phrase.words}”", fontsize="small")
        for axes, answer in zip(line, drawn, strict=True):
            image, read = answer.raws[number], answer.read[number]
            canvas = np.pad(image, ((0, 0), (0, widest - image.shape[1])), constant_values=np.nan)
            axes.imshow(canvas, cmap="Greys", vmin=0, vmax=1)
            for edge in range(SIDE, image.shape[1], SIDE):
                axes.axvline(edge - 0.5, color="#d9730d", linewidth=0.4)
            colour = "#4d8b31" if read == phrase.words else "#c0392b"
            axes.set_title(read or "(nothing)", fontsize="x-small", color=colour)
    figure.savefig(path)
