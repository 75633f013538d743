"""Try every causal LM family of the installed transformers as a tower; write docs/coverage.md.

python tests/helpers/write_coverage.py            # takes minutes, on the CPU
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tqdm import tqdm

import multitower as mt
from families import FIRST_TOKEN, families, tiny
from multitower.testing import tower_report
from paths import ROOT

PAGE = ROOT / "docs" / "coverage.md"


class Result(NamedTuple):
    family: str
    model: str = "-"
    equal: str = "no"
    gradients: str = "-"
    bfloat16: str = "-"
    decoding: str = "-"
    padding: str = "-"
    packing: str = "-"
    reason: str = ""


def try_family(family: str) -> Result:
    try:
        model = tiny(family)
    except Exception as error:  # of any kind, such as a missing package
        return Result(family, reason=f"the model cannot be built: {one_line(error)}")
    name = type(model).__name__
    try:
        tower = mt.TransformersTower(model)
    except mt.errors.TowerError as error:
        return Result(family, name, reason=f"refused: {one_line(error)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says which decode without a cache
        report = tower_report(tower)
    broken = {key: reason for key, reason in report.items() if reason}
    wrong = {"attributes", "shapes", "identity", "causality", "rows"} & set(broken)

    def word(key: str) -> str:
        return "no" if key in broken else "yes"

    return Result(
        family,
        name,
        "no" if wrong else "yes",
        word("gradients"),
        word("bfloat16"),
        "no" if "decoding" in broken else "cached" if decodes_cached(tower) else "uncached",
        "no" if "left padding" in broken else "together" if tower.pads_left else "by length",
        "yes" if tower.packs else "no",
        "; ".join(f"{key}: {one_line(reason)}" for key, reason in broken.items()),
    )


@torch.no_grad()
def decodes_cached(tower: mt.TransformersTower) -> bool:
    """Return whether decoding runs each token through the layers only once."""
    prompt, steps, seen = torch.full((1, 5), FIRST_TOKEN, device=tower.device), 3, 0

    def count(layer: int, state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(positions) if layer == tower.depth else 0
        return state

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        tower.decoder(count).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, min_new_tokens=steps
        )
    return seen < 5 + steps


def one_line(error: object) -> str:
    return " ".join(str(error).replace("|", "/").split())[:300]


def page(results: list[Result], seconds: float) -> str:
    def count(key: str, value: str = "yes") -> int:
        return sum(getattr(result, key) == value for result in results)

    rows = "\n".join("| " + " | ".join(result) + " |" for result in results)
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}, "
        f"transformers {transformers.__version__}"
    )
    return f"""# Which families are towers

A tiny random model of each of the {len(results)} names in transformers'
`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` was wrapped in `multitower.TransformersTower` and put through
`multitower.testing.tower_report`, in float32, eager attention, on the CPU.

**{count("equal")} of {len(results)}** give the logits of their own forward, bit for bit, layer by layer;
{count("decoding", "cached")} of them decode with a cache, {count("decoding", "uncached")} without;
{count("gradients")} have the gradients of their own backward;
{count("bfloat16")} are bit-equal in bfloat16 too;
{count("packing")} take packed batches.

Written by `python tests/helpers/write_coverage.py` in {seconds:.0f} s on {os.cpu_count()} cores
({platform.machine()}), with {versions}.

- *equal*: logits bit-equal to the model's own; causal; a row alone is scored as in a batch.
- *gradients*: to every parameter, those of the model's own backward; to the input of layer 1, some.
- *bfloat16*: bit-equal in bfloat16.
- *decoding*: token by token through transformers' `generate`, each state changed after each layer, the
  same logits as a forward of the whole (1e-4). "uncached": the family has no cache, or its own `generate`
  does not give what its `forward` gives, so each step starts anew; the latter with a warning.
- *padding*: rows of unlike length decode "together", padded on the left, or, where the family cannot tell
  padding from tokens, "by length", one length after the other.
- *packing*: several examples in one row (`multitower.pack`) are scored as each alone.

Decoders that predict several codebooks a step (MusicGen) are refused: a tower predicts one token a step.
Of Moshi, the main decoder, which predicts text, is a tower.

| family | model | equal | gradients | bfloat16 | decoding | padding | packing | reason |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="where to write the page")
    parser.add_argument("families", nargs="*", default=families(), help="only these")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    results = [try_family(family) for family in tqdm(arguments.families, unit="family")]
    arguments.out.write_text(page(results, time.perf_counter() - start), encoding="utf-8")
    print(f"{sum(result.equal == 'yes' for result in results)} of {len(results)} are towers: {arguments.out}")


if __name__ == "__main__":
    main()
