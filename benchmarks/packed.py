"""Time a training step on examples of different lengths: padded, and packed.

    python benchmarks/packed.py                     # tiny towers, seconds
    python benchmarks/packed.py --size smollm2      # towers of the shape of SmolLM2-135M, minutes

Two frozen towers read each other, and all segments have labels; a step is a forward with logits=False and a
backward. The shortest row has --shortest times the tokens of the longest, the others are evenly spaced; both
towers have the same number of tokens. Padded and packed batches, with equal losses, alternate in one process;
each round gives one ratio. Packed rows are no longer than the longest example; with --one-row, all examples
are in one row. sdpa computes all pairs of tokens in a row, masked or not; flex_attention skips masked blocks,
in links only on GPUs, in towers on the CPU only without backward (--forward). The options --links and
--towers apply to packed batches; padded ones use sdpa. "real" is the fraction of tokens in a padded batch
that are not padding. Medians and quartiles go to results.json and ratios.png.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import multitower as mt
from measure import begin, interleaved, milliseconds, moved, options, plot_ratios, ratio, write
from models import SIZES, make_model, random_tokens


def main() -> None:
    """Measure each setting."""
    parser = options(__doc__, "packed")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256], help="tokens of the longest row")
    parser.add_argument("--shortest", type=float, nargs="+", default=[0.1, 0.5, 1.0])
    kernels = ("sdpa", "flex_attention")
    parser.add_argument("--links", choices=kernels, default="sdpa", help="how links attend")
    parser.add_argument("--towers", choices=kernels, default="sdpa", help="how towers attend")
    parser.add_argument("--one-row", action="store_true", help="all examples in one row")
    parser.add_argument("--forward", action="store_true", help="no backward")
    chosen = begin(parser)
    if chosen.links == "flex_attention" and chosen.device == "cpu":
        parser.error("on the CPU links attend by sdpa")
    model = make_model(chosen.size, 2).to(chosen.device)
    results: list[dict[str, Any]] = []
    for length in chosen.lengths:
        for shortest in chosen.shortest:
            lengths = torch.linspace(shortest * length, length, chosen.rows).ceil().int().tolist()
            batch = make_batch(model, lengths)
            padded = moved(batch, chosen.device)
            packed = moved(mt.pack(batch, one_row=chosen.one_row), chosen.device)
            runs = {"padded": partial(run, model, padded, chosen.forward)}
            runs["packed"] = partial(run, model, packed, chosen.forward)
            torch.testing.assert_close(runs["padded"](), runs["packed"]())
            results.append(
                {
                    "size": chosen.size,
                    "length": length,
                    "shortest": shortest,
                    "real": round(mask_of(padded).float().mean().item(), 3),
                    **measured(chosen, model, runs),
                }
            )
            show(results[-1])
            write(chosen, results)
    what = "forward" if chosen.forward else "step"
    title = f"{what}, by longest and shortest of {chosen.rows} examples; {chosen.links}, {chosen.towers}"
    plot_ratios(chosen.out / "ratios.png", results, ("length", "shortest"), title, "packed / padded")


def measured(chosen: Any, model: mt.FusedModel, runs: dict[str, Any]) -> dict[str, Any]:
    """Time both; the packed run uses the chosen attention implementations."""

    def packed() -> object:
        select(model, chosen.links, chosen.towers)
        try:
            return runs["packed"]()
        finally:
            select(model, "sdpa", "sdpa")

    times = interleaved({**runs, "packed": packed}, chosen.repeats, clock=chosen.clock)
    return {"ms": milliseconds(times), "ratio": ratio(times["packed"], times["padded"])}


def select(model: mt.FusedModel, links: str, towers: str) -> None:
    """Set the attention implementations of links and towers."""
    model.set_attn_implementation(links)
    for name in model.towers:
        native: Any = model.unimodal(name)
        native.set_attn_implementation(towers)


def make_batch(model: mt.FusedModel, lengths: list[int]) -> mt.batch.Batch:
    """Return rows of one segment of each tower, with these lengths."""
    rows = [
        [mt.Segment(name, random_tokens(model, name, length), target=True) for name in model.towers]
        for length in lengths
    ]
    return mt.collate(rows)


def mask_of(batch: mt.batch.Batch) -> torch.Tensor:
    """Return the mask of the first stream."""
    return next(iter(batch["streams"].values()))["mask"]


def run(model: mt.FusedModel, batch: mt.batch.Batch, forward: bool) -> torch.Tensor:
    """Run forward and, unless told otherwise, backward; return the loss."""
    with torch.set_grad_enabled(not forward):
        loss = model(**batch, logits=False).loss
    assert loss is not None
    if not forward:
        loss.backward()
    return loss.detach()


def show(result: dict[str, Any]) -> None:
    """Print one line."""
    ms = {name: round(each["median"], 1) for name, each in result["ms"].items()}
    low, median, high = (result["ratio"][key] for key in ("low", "median", "high"))
    print(
        f"rows of {result['shortest']:g} to 1 of {result['length']} tokens, {result['real']:.2f} real: "
        f"{ms} ms, packed / padded {median:.2f} ({low:.2f} to {high:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
