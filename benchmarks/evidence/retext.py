r"""Make the data of the comparison again for another pretrained text decoder.

    export PYTHONPATH=benchmarks:benchmarks/learning:examples
    python benchmarks/evidence/retext.py runs/evidence/words runs/evidence/words-large \
        --model HuggingFaceTB/SmolLM2-135M

The sentences, the speech and its decoder are those of the first folder, which ``words.py`` made; the text is
encoded by the tokenizer of the other decoder. With ``--gguf``, the decoder is a file in GGUF format in the
folder ``--model``; it is saved in float32. ``benchmarks/learning/train.py`` trains on the new folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from data import CORPUS
from words import LONGEST_TEXT, written

from multitower_text import TextModality

KEPT = 120  # definitions, fewer than in the source, for a larger decoder is slow


def make_again(
    source: Path, folder: Path, model: str, *, gguf: str | None, begin: str | None, end: str | None
) -> None:
    """Copy a folder of data with its text encoded for another decoder."""
    options: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, **options)
    decoder = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    old, new = TextModality.from_pretrained(source / "text"), TextModality(tokenizer, begin=begin, end=end)
    corpus = json.loads((source / CORPUS).read_text())

    def again(tokens: list[int]) -> list[int]:
        return new.encode(old.decode(tokens))[:LONGEST_TEXT].tolist()

    for name in ("train", "dev", "test", "human"):
        for entry in corpus[name]:
            entry["text"] = new.encode(entry["transcript"]).tolist()
    corpus["kept"]["text"] = [again(row) for row in corpus["kept"]["text"][:KEPT]]
    corpus["cloze"] = [[again(row) for row in endings] for endings in corpus["cloze"][:KEPT]]
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("speech", "speech-decoder"):
        shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
    new.save_pretrained(folder / "text")
    decoder = in_float32(decoder)
    for config in (decoder.config, decoder.generation_config):
        config.bos_token_id, config.eos_token_id = new.begin, new.end  # where generate stops
    decoder.save_pretrained(folder / "text-decoder")
    written(folder / CORPUS, corpus)


def in_float32(decoder: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Return a decoder that can be saved; one that was read from GGUF cannot."""
    config = decoder.config
    if not hasattr(config, "quantization_config"):
        return decoder
    del config.quantization_config
    made = type(decoder)(config)
    made.load_state_dict(decoder.state_dict())
    return made


def main() -> None:
    """Parse the command line, and make the data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a folder that words.py made")
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--model", required=True, help="the decoder's folder or Hub id")
    parser.add_argument("--gguf", help="its file, if it is in GGUF format")
    parser.add_argument("--begin", help="the token before a text (default: the tokenizer's bos)")
    parser.add_argument("--end", help="the token after a text (default: the tokenizer's eos)")
    options = vars(parser.parse_args())
    make_again(**options)


if __name__ == "__main__":
    main()
