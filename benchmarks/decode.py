"""Time decoding a token with a fused model, compared with the sum of its parts, eager and compiled.

    python benchmarks/decode.py                         # tiny towers, a minute or two
    python benchmarks/decode.py --size smollm2 --sources 100 1000 5000 --rows 1
    python benchmarks/decode.py --modes eager compiled --sources 1000 --rows 1 8    # a minute to compile each

The parts are the native tower's generate, and the taps and the input adapter alone, on the state of one token
at a time. A logits processor times each token of generate, so prompts and sources do not count. Whole and
parts alternate in one process; each round gives the median over its tokens.

There are two ratios. "sum" divides the fused model's time by that of the native tower plus that of the links,
each run alone with its weights in the processor's cache. "alternating" divides it by a native generate that
runs the links after each token: the same work, where the weights of both come from memory for every token, as
in the fused model.

In compiled mode, the decoder, the native tower and the links are compiled to a graph each, with a static
cache. The seconds and graphs of their first run are recorded, and recompilations after it.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import multitower as mt
from measure import begin, in_turn, milliseconds, now, options, plot_ratios, ratio, write
from models import SIZES, make_reader, random_tokens
from multitower.batch.collate import make_streams
from multitower.generate.options import settle
from multitower.generate.tap_cache import TapCache, TapReader
from multitower.generate.turn import decode_rows
from multitower.link.attention import visibility

RATIOS = {"sum": "fused / native + links", "alternating": "fused / native and links in turn"}


class Clock:
    """A logits processor that records the time of each token."""

    def __init__(self, clock: str) -> None:
        self.clock = clock
        self.times: list[float] = []

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Record the time."""
        self.times.append(now(self.clock))
        return scores

    def per_token(self) -> float:
        """Return the median time between tokens."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times))


class Decoding:
    """One setting: rows of sources, followed by a prompt of one token.

    Args:
        model: A model whose tower "text" reads all others.
        rows: Number of rows.
        length: Tokens of each source in a row.
        new: Tokens to decode per round.
        clock: One of ``measure.CLOCKS``.
        backend: Backend of ``torch.compile``; None for eager decoding.
    """

    def __init__(
        self, model: mt.FusedModel, rows: int, length: int, new: int, clock: str, backend: str | None = None
    ) -> None:
        self.model, self.rows, self.new, self.clock, self.backend = model, rows, new, clock, backend
        sources = [name for name in model.towers if name != "text"]
        examples = [
            [mt.Segment(name, random_tokens(model, name, length)) for name in sources] for _ in range(rows)
        ]
        with torch.no_grad():
            self.cache = TapCache.fill(model, make_streams(examples), ["text"])
        tower, native = model.tower("text"), model.unimodal("text")
        self.times = torch.full((rows, 1), length * len(sources), device=tower.device)
        self.seen = {
            tap: visibility(self.times, entry.times, entry.mask) for tap, entry in self.cache.entries.items()
        }
        self.decoder = tower.decoder(TapReader(model, "text", self.cache, self.times))
        self.native_decoder = copy.copy(native)
        self.link_step = self._link_step
        if backend is not None:
            torch._dynamo.reset()
            for decoder in (self.decoder, self.native_decoder):
                decoder.forward = torch.compile(decoder.forward, fullgraph=True, backend=backend)
            self.link_step = torch.compile(self._link_step, fullgraph=True, backend=backend)

    def runs(self) -> dict[str, Any]:
        """Return the runs to compare."""
        return {
            "fused": self.fused,
            "native": self.native,
            "links": self.links,
            "alternating": self.alternating,
        }

    def fused(self) -> float:
        """Decode like ``FusedModel.generate`` after its prefill; return seconds per token."""
        return self._decode(self.decoder)

    def native(self) -> float:
        """Decode with the native model."""
        return self._decode(self.native_decoder)

    @torch.no_grad()
    def links(self) -> float:
        """Run the input adapter and all taps on the state of one token, as many times."""
        clock, links = Clock(self.clock), self._links_of_tokens()
        for _ in range(self.new):
            next(links)
            clock(self.times, self.times)
        return clock.per_token()

    def alternating(self) -> float:
        """Decode with the native model, and run the links after each token."""
        links = self._links_of_tokens()

        def after(tokens: Tensor, scores: Tensor) -> Tensor:
            next(links)
            return scores

        return self._decode(self.native_decoder, after)

    def cache_bytes(self) -> int:
        """Return the size of the taps' cache in bytes."""
        kept = [
            part for entry in self.cache.entries.values() for part in (*entry.source, entry.times, entry.mask)
        ]
        return sum(
            {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in kept}.values()
        )

    def _links_of_tokens(self) -> Iterator[Tensor]:
        """Run all taps and the input adapter, one token at a time."""
        tower = self.model.tower("text")
        x = torch.randn(self.rows, 1, tower.width, device=tower.device)
        while True:
            yield self.link_step(x)

    def _link_step(self, x: Tensor) -> Tensor:
        total = self.model.adapt("text", x)
        for tap, entry in self.cache.entries.items():
            total = total + self.model.tap(tap)(x, entry.source, self.seen[tap])
        return total

    @torch.no_grad()
    def _decode(self, decoder: Any, *processors: Any) -> float:
        clock = Clock(self.clock)
        choices = {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False}
        static = {} if self.backend is None else {"cache_implementation": "static"}
        prompts = torch.ones_like(self.times)
        every = {**choices, **static, "logits_processor": [*processors, clock]}
        settings = settle("text", self.model.tower("text"), {**every, "bos_token_id": 1, "eos_token_id": 2})
        decode_rows(decoder, prompts, prompts > 0, [0] * self.rows, settings)
        return clock.per_token()


def main() -> None:
    """Measure each setting."""
    parser = options(__doc__, "decode")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--sources", type=int, nargs="+", default=[100, 1000, 5000], help="source lengths")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--modes", choices=("eager", "compiled"), nargs="+", default=["eager"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--interleave", type=int, default=2, help="layers of the text from tap to tap")
    parser.add_argument("--new", type=int, default=24, help="tokens that each round decodes")
    chosen = begin(parser)
    depth = SIZES[chosen.size]["num_hidden_layers"]
    taps = range(chosen.interleave, depth + 1, chosen.interleave)
    pairs = [(max(1, 6 * place // depth), place) for place in taps]
    model = make_reader(chosen.size, pairs, source_size="tiny", adapter="gated").eval().to(chosen.device)
    results = []
    for mode, length, rows in itertools.product(chosen.modes, chosen.sources, chosen.rows):
        backend = chosen.backend if mode == "compiled" else None
        decoding = Decoding(model, rows, length, chosen.new, chosen.clock, backend)
        result: dict[str, Any] = {"mode": mode, "source": f"source of {length}", "rows": f"{rows} rows"}
        if backend is not None:
            result["compiling"] = compiling(decoding)
        graphs = counters["stats"]["unique_graphs"]
        times = in_turn(decoding.runs(), chosen.repeats, title=where(result))
        if backend is not None:
            result["recompilations"] = counters["stats"]["unique_graphs"] - graphs
        result |= {
            "ms": milliseconds(times),
            "sum": ratio(times["fused"], times["native"], times["links"]),
            "alternating": ratio(times["fused"], times["alternating"]),
            "cache_bytes": decoding.cache_bytes(),
        }
        results.append(result)
        show(result)
        write(chosen, results)
    title = f"decoding, {chosen.size}, {len(taps)} taps"
    plot_ratios(chosen.out / "ratios.png", results, ("mode", "source", "rows"), title, ratios=RATIOS)


def compiling(decoding: Decoding) -> dict[str, dict[str, float]]:
    """Run each once; return its seconds and the number of compiled graphs."""
    spent = {}
    for name, run in decoding.runs().items():
        graphs, started = counters["stats"]["unique_graphs"], time.perf_counter()
        run()
        seconds = round(time.perf_counter() - started, 1)
        spent[name] = {"seconds": seconds, "graphs": counters["stats"]["unique_graphs"] - graphs}
    return spent


def show(result: dict[str, Any]) -> None:
    """Print one line."""
    ms = {name: round(each["median"], 3) for name, each in result["ms"].items()}
    over = ", ".join(
        f"{name} {result[name]['median']:.3f} ({result[name]['low']:.3f} to {result[name]['high']:.3f})"
        for name in RATIOS
    )
    print(f"{where(result)}: {ms} ms a token, over its parts: {over}", flush=True)


def where(result: dict[str, Any]) -> str:
    """Name a setting."""
    return ", ".join(result[key] for key in ("mode", "source", "rows"))


if __name__ == "__main__":
    main()
