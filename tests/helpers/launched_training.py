"""Training with examples/train_accelerate.py, for processes that accelerate's launcher starts:

accelerate launch ... launched_training.py FOLDER STEPS ACCUMULATE.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import datasets

import train_accelerate
from letters import Letters
from models import causal_lm
from multitower_text import TextModality
from train_data import Recipe

RANK = os.environ.get("RANK", "0")
ROWS = [("abc", "one"), ("b", "two and more"), ("cabbage", "3"), ("da", "four, five"), ("ebbeda", "six")]


def prepare(folder: Path) -> None:
    """Write the decoders and the data."""
    rows = "".join(f'{name},"{words}"\n' for name, words in ROWS)
    (folder / "metadata.csv").write_text(f"file_name,transcription\n{rows}")
    causal_lm("llama", vocab_size=14).save_pretrained(folder / "speech")
    causal_lm("qwen3", depth=4, vocab_size=TextModality().vocab_size).save_pretrained(folder / "text")


def main(folder: Path, steps: int, accumulate: int) -> None:
    """Train; the first process writes the losses."""
    datasets.config.HF_DATASETS_CACHE = folder / f"cache{RANK}"
    losses = train_accelerate.main(
        Recipe(
            str(folder / "metadata.csv"),
            decoders={name: str(folder / name) for name in ("speech", "text")},
            modalities={"speech": Letters(), "text": TextModality()},
            out=str(folder / "out"),
            steps=steps,
            batch=2,
            accumulate=accumulate,
            lr=1e-2,
            warm_up=0.2,
        )
    )
    if RANK == "0":
        (folder / f"losses{accumulate}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
