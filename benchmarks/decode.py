"""Time decoding a token of a fused model beside the sum of the parts.

    python benchmarks/decode.py                         # tiny towers, a minute or two
    python benchmarks/decode.py --size smollm2 --sources 100 1000 5000 --rows 1

The parts are the native tower's own generate, and the taps and the input adapter alone on the state of one
token, a token after the other. Each token of generate is timed by a logits processor, so that neither prompts
nor sources count. Whole and parts take turns in one process; each round gives the median over its tokens, and
one ratio.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import multitower as mt
from measure import begin, milliseconds, now, options, plot_ratios, ratio, write
from models import SIZES, make_tower
from multitower.cache import TapCache, TapReader
from multitower.generate import decode_rows
from multitower.link import visibility
from multitower.stream import make_streams


class Clock:
    """Notes when each token is chosen: a logits processor of transformers."""

    def __init__(self, clock: str) -> None:
        self.clock = clock
        self.times: list[float] = []

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Note the time."""
        self.times.append(now(self.clock))
        return scores

    def per_token(self) -> float:
        """Give the median time from one token to the next."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times))


class Decoding:
    """One setting: a source of some length, rows of one token to go on from.

    Args:
        model: A model with the towers "source" and "text".
        rows: How many rows.
        length: How many tokens of the source each has.
        new: How many tokens each round decodes.
        clock: One of ``measure.CLOCKS``.
    """

    def __init__(self, model: mt.FusedModel, rows: int, length: int, new: int, clock: str) -> None:
        self.model, self.rows, self.new, self.length, self.clock = model, rows, new, length, clock
        size = model.tower("source").vocab_size
        examples = [[mt.Segment("source", torch.randint(3, size, (length,)))] for _ in range(rows)]
        with torch.no_grad():
            self.cache = TapCache.fill(model, make_streams(examples), ["text"])

    def fused(self) -> float:
        """Decode as ``FusedModel.generate`` does once the source has been read."""
        tower = self.model.tower("text")
        times = torch.full((self.rows, 1), self.length, device=tower.device)
        return self._decode(tower.decoder(TapReader(self.model, "text", self.cache, times)))

    def native(self) -> float:
        """Decode with the native model."""
        return self._decode(self.model.unimodal("text"))

    @torch.no_grad()
    def links(self) -> float:
        """Run the input adapter and all taps, on a state of one token, as often."""
        tower, clock = self.model.tower("text"), Clock(self.clock)
        x = torch.randn(self.rows, 1, tower.width, device=tower.device)
        clock(x, x)
        for token in range(self.new):
            times = torch.full((self.rows, 1), self.length + token, device=tower.device)
            self.model.adapt("text", x)
            for tap, entry in self.cache.entries.items():
                seen = visibility(times, entry.times, entry.mask)
                self.model.tap(tap)(x, entry.source, seen)
            clock(x, x)
        return clock.per_token()

    @torch.no_grad()
    def _decode(self, decoder: Any) -> float:
        clock = Clock(self.clock)
        choices = {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False}
        prompts = [torch.ones(1, dtype=torch.long)] * self.rows
        decode_rows(decoder, prompts, begin=1, end=(2,), options={**choices, "logits_processor": [clock]})
        return clock.per_token()


def main() -> None:
    """Measure each setting."""
    parser = options(__doc__, "decode")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--sources", type=int, nargs="+", default=[100, 1000, 5000], help="source lengths")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--interleave", type=int, default=2, help="layers of the text from tap to tap")
    parser.add_argument("--new", type=int, default=24, help="tokens that each round decodes")
    chosen = begin(parser)
    graph = mt.FusionGraph()
    graph.add_tower("source", make_tower("tiny", 0))
    graph.add_tower("text", make_tower(chosen.size, 1))
    depth = SIZES[chosen.size]["num_hidden_layers"]
    taps = range(chosen.interleave, depth + 1, chosen.interleave)
    graph.add_link("source", "text", taps=[(6 * place // depth, place) for place in taps])
    model = graph.compile().eval().to(chosen.device)
    results = []
    for length, rows in itertools.product(chosen.sources, chosen.rows):
        decoding = Decoding(model, rows, length, chosen.new, chosen.clock)
        runs = {"fused": decoding.fused, "native": decoding.native, "links": decoding.links}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in tqdm(range(chosen.repeats + 1), desc=f"source of {length}, {rows} rows", leave=False):
            for name, per_token in runs.items():
                seconds = per_token()
                if number:
                    times[name].append(seconds)
        results.append(
            {
                "source": f"source of {length}",
                "rows": f"{rows} rows",
                "ms": milliseconds(times),
                "ratio": ratio(times["fused"], times["native"], times["links"]),
            }
        )
        ms = {name: round(each["median"], 3) for name, each in results[-1]["ms"].items()}
        print(f"source of {length}, {rows} rows: {ms} ms a token, {results[-1]['ratio']}", flush=True)
        write(chosen, results)
    title = f"decoding, {chosen.size}, {len(taps)} taps"
    plot_ratios(chosen.out / "ratios.png", results, ("source", "rows"), title)


if __name__ == "__main__":
    main()
