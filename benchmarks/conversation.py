"""Time the n-th turn of a conversation: with a session, from the start, and for the native towers.

    python benchmarks/conversation.py                   # tiny towers, 10 turns, a minute
    python benchmarks/conversation.py --size smollm2 --turns 100

In each turn, a source segment is appended and a text is generated. "session" uses ``model.session``; "from
the start" is ``model.generate`` on the whole conversation. The lower bound of a turn is "native" plus
"links". "native" runs the native source on its new tokens and decodes the native text, each with a
transformers cache. "links" runs all taps and the input adapter for each text token, over the same number of
source tokens. All four alternate in one process, each with its own conversation; every turn is timed over
several conversations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import multitower as mt
from measure import begin, now, options, ratio, spread, write
from models import SIZES, make_reader, random_tokens
from multitower.generate.rows import Row
from multitower.generate.session import Session
from multitower.generate.turn import tap_cache
from multitower.link.attention import visibility

CHOICES = {"do_sample": False, "eos_token_id": None}


class Kept:
    """A conversation with a session."""

    def __init__(self, model: mt.FusedModel, new: int) -> None:
        self.session, self.new = model.session(outputs=["text"]), new

    def turn(self, said: mt.Segment) -> None:
        """Append a segment and decode."""
        self.session.append(said)
        self.session.generate(["text"], max_new_tokens=self.new, **CHOICES)


class FromTheStart:
    """A conversation that runs from the start in each turn."""

    def __init__(self, model: mt.FusedModel, new: int) -> None:
        self.model, self.new, self.history = model, new, list[Any]()

    def turn(self, said: mt.Segment) -> None:
        """Decode after the whole conversation."""
        self.history.append(said)
        (answers,) = self.model.generate([self.history], ["text"], max_new_tokens=self.new, **CHOICES)
        self.history += answers


class Native:
    """Both native towers, each with a persistent cache."""

    def __init__(self, model: mt.FusedModel, new: int) -> None:
        self.model, self.new = model, new
        self.caches = {name: DynamicCache() for name in ("source", "text")}
        self.text = torch.empty(1, 0, dtype=torch.long, device=model.tower("text").device)

    @torch.no_grad()
    def turn(self, said: mt.Segment) -> None:
        """Run the source's layers on its new tokens, and decode the text."""
        source, text = self.model.unimodal(said.tower), self.model.unimodal("text")
        tokens = torch.as_tensor(said.tokens, device=source.device)[None]
        source.base_model(input_ids=tokens, past_key_values=self.caches["source"], use_cache=True)
        prompt = torch.cat([self.text, self.text.new_ones(1, 1)], 1)
        self.text = text.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.caches["text"],
            max_new_tokens=self.new,
            min_new_tokens=self.new,
            pad_token_id=0,
            **CHOICES,
        )


class Links:
    """Only the taps and the input adapter of the text tower, over the source so far."""

    def __init__(self, model: mt.FusedModel, new: int) -> None:
        self.model, self.new = model, new
        self.session: Session = model.session(outputs=["text"])

    def prepare(self, said: mt.Segment) -> None:
        """Append the source's segment; not timed."""
        self.session.append(said)
        rows: list[Row] = self.session._rows
        self.entries = tap_cache(self.session._keeping, rows, ["text"]).entries
        self.x = torch.randn(1, 1, self.model.tower("text").width, device=self.model.tower("text").device)
        now = torch.tensor([[rows[0].time]], device=self.x.device)
        self.seen = {tap: visibility(now, each.times, each.mask) for tap, each in self.entries.items()}

    @torch.no_grad()
    def turn(self, said: mt.Segment) -> None:
        """Run them once per decoded token, and for the begin token."""
        for _ in range(self.new + 1):
            total: Tensor = self.model.adapt("text", self.x)
            for tap, entry in self.entries.items():
                total = total + self.model.tap(tap)(self.x, entry.source, self.seen[tap])


RUNS: dict[str, Callable[[mt.FusedModel, int], Any]] = {
    "session": Kept,
    "from the start": FromTheStart,
    "native": Native,
    "links": Links,
}


def conversation(model: mt.FusedModel, chosen: Any) -> dict[str, list[float]]:
    """Return the seconds of each turn, by run."""
    runs = {name: make(model, chosen.new) for name, make in RUNS.items()}
    source = next(name for name in model.towers if name != "text")
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(chosen.turns):
        said = mt.Segment(source, random_tokens(model, source, chosen.said))
        names = list(runs)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if isinstance(runs[name], Links):
                runs[name].prepare(said)
            started = now(chosen.clock)
            runs[name].turn(said)
            took[name].append(now(chosen.clock) - started)
    return took


def plot(path: Any, results: list[dict[str, Any]], title: str) -> None:
    """Plot the time of each turn."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in (*RUNS, "native + links"):
        seconds = [result["ms"][name]["median"] for result in results]
        axes.plot([result["turn"] for result in results], seconds, label=name)
    axes.set(xlabel="turn", ylabel="ms", title=title, yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Measure all turns."""
    parser = options(__doc__, "conversation")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--said", type=int, default=50, help="tokens that the source says in a turn")
    parser.add_argument("--new", type=int, default=20, help="tokens that the text answers")
    parser.set_defaults(repeats=5)
    chosen = begin(parser)
    depth = SIZES[chosen.size]["num_hidden_layers"]
    pairs = [(max(1, 6 * place // depth), place) for place in range(2, depth + 1, 2)]
    model = make_reader(chosen.size, pairs, source_size="tiny", adapter="gated").eval().to(chosen.device)
    conversation(model, chosen)  # warm-up
    rounds = [conversation(model, chosen) for _ in range(chosen.repeats)]
    results = []
    for number in range(chosen.turns):
        ms = {name: [1000 * took[name][number] for took in rounds] for name in RUNS}
        ms["native + links"] = [sum(pair) for pair in zip(ms["native"], ms["links"], strict=True)]
        over = ratio(ms["session"], ms["native + links"])
        results.append(
            {"turn": number + 1, "ms": {name: spread(each) for name, each in ms.items()}, "ratio": over}
        )
        medians = {name: round(each["median"], 1) for name, each in results[-1]["ms"].items()}
        print(
            f"turn {number + 1}: {medians} ms, session over native + links {over['median']:.2f}", flush=True
        )
    middle = statistics.median(result["ratio"]["median"] for result in results)
    print(f"the median turn: session over native + links {middle:.2f}")
    write(chosen, results)
    plot(chosen.out / "turns.png", results, f"a turn of {chosen.said} and {chosen.new} tokens, {chosen.size}")


if __name__ == "__main__":
    main()
