"""Text to token ids and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

CONFIG = "modality.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


class TextModality:
    r"""Text to the tokens of a text tower, and back.

    >>> text = TextModality()                      # bytes: needs no files
    >>> text.encode("hé")
    tensor([256, 104, 195, 169, 257])
    >>> text.decode(text.encode("hé"))
    'hé'
    >>> TextModality("gpt2").encode("hé")          # doctest: +SKIP
    tensor([50256,   258, 2634, 50256])

    Without a tokenizer, ids 0..255 are the bytes of UTF-8, 256 begins and 257 ends.
    With one, its bos token begins and its eos token ends; they may be the same token.

    Args:
        tokenizer: None for bytes, a transformers tokenizer, or the folder or Hub id of one.
        begin: The token that begins a segment, by id or by name, where it is not the tokenizer's bos.
        end: The token that ends a segment, by id or by name, where it is not the tokenizer's eos.

    Attributes:
        vocab_size: Number of ids, begin and end included.
        begin: Id of the token that opens every encoded segment.
        end: Id of the token that closes every encoded segment.
        tokenizer: The transformers tokenizer, or None for bytes.

    Raises:
        ImportError: A folder or Hub id was given, and transformers is not installed.
        ValueError: The tokenizer has no bos or eos and none was given, or the one given is not in
            its vocabulary.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        begin: int | str | None = None,
        end: int | str | None = None,
    ) -> None:
        if tokenizer is None and (begin is not None or end is not None):
            raise ValueError("begin= and end= go with a tokenizer: for bytes they are always 256 and 257")
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = _load(os.fspath(tokenizer))
        self.tokenizer = tokenizer
        self.vocab_size: int = 258 if tokenizer is None else len(tokenizer)
        self.begin = 256 if tokenizer is None else _edge(tokenizer, "begin", "bos", begin)
        self.end = 257 if tokenizer is None else _edge(tokenizer, "end", "eos", end)

    def __repr__(self) -> str:
        name = "bytes" if self.tokenizer is None else _name(self.tokenizer)
        return f"TextModality({name}, vocab_size={self.vocab_size}, begin={self.begin}, end={self.end})"

    def encode(self, raw: str) -> torch.Tensor:
        """Give the tokens of a text.

        >>> TextModality().encode("")
        tensor([256, 257])

        Args:
            raw: Any text, also an empty one. The tokenizer adds no special tokens of its own, but
                reads those spelled out in the text, as it always does.

        Returns:
            int64, shape (length,), begin and end included.

        Raises:
            TypeError: It is not a str.
        """
        if not isinstance(raw, str):
            raise TypeError(f"text must be a str, not {type(raw).__name__}: encode one text at a time")
        if self.tokenizer is None:
            ids = list(raw.encode("utf-8"))
        else:
            ids = self.tokenizer(raw, add_special_tokens=False)["input_ids"]
        return torch.tensor([self.begin, *ids, self.end], dtype=torch.int64)

    def decode(self, tokens: torch.Tensor) -> str:
        """Give the text of tokens, as a language model may emit them.

        >>> TextModality().decode(torch.tensor([104, 105, 257]))
        'hi'

        Begin, end and padding are dropped at the edges. Ids past the vocabulary, which a tower with a
        padded embedding may emit, are dropped. Bytes that are no UTF-8 become U+FFFD.

        Args:
            tokens: Integers, shape (length,), with or without begin and end.

        Raises:
            ValueError: They are of another shape or dtype, or negative.
        """
        ids = _ids(tokens)
        edges = {self.begin, self.end}
        if self.tokenizer is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        edges.add(self.tokenizer.pad_token_id)
        start, stop = 0, len(ids)
        while start < stop and ids[start] in edges:
            start += 1
        while start < stop and ids[stop - 1] in edges:
            stop -= 1
        kept = [i for i in ids[start:stop] if i < self.vocab_size]
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``modality.json`` and, where there is one, the tokenizer's own files into a folder.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     TextModality().save_pretrained(folder)
        ...     TextModality.from_pretrained(folder)
        TextModality(bytes, vocab_size=258, begin=256, end=257)
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"format": 1, "type": "text", "tokenizer": self.tokenizer is not None}
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(path)
            config |= {"begin": self.begin, "end": self.end}
        (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> TextModality:
        """Load what ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: A file is missing; the message names it.
            ValueError: ``modality.json`` is not that of a text modality.
        """
        path = Path(folder)
        config = _read(path / CONFIG)
        if not config["tokenizer"]:
            return cls()
        if not (path / TOKENIZER_CONFIG).is_file():
            raise FileNotFoundError(f"{path / TOKENIZER_CONFIG} is missing: save the modality again")
        return cls(path, begin=config["begin"], end=config["end"])


def _load(source: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"tokenizer {source!r} needs transformers: pip install multitower[text]") from error
    return AutoTokenizer.from_pretrained(source)


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def _edge(tokenizer: Any, edge: str, special: str, given: int | str | None) -> int:
    """Give the id of the begin or end token: the one given, or else the tokenizer's own."""
    if given is None:
        own = getattr(tokenizer, f"{special}_token_id")
        if own is None:
            raise ValueError(
                f"tokenizer {_name(tokenizer)!r} has no {special} token: pass {edge}=, the id or the name of "
                f"a token in its vocabulary. Its special tokens are {tokenizer.all_special_tokens}"
            )
        return int(own)
    token = tokenizer.get_vocab().get(given) if isinstance(given, str) else given
    if token is None or not 0 <= token < len(tokenizer):
        raise ValueError(
            f"{edge}={given!r} is not in the vocabulary of tokenizer {_name(tokenizer)!r} "
            f"({len(tokenizer)} tokens): add the token to the tokenizer and the tower first, or pass another"
        )
    return int(token)


def _ids(tokens: torch.Tensor) -> list[int]:
    tensor = torch.as_tensor(tokens)
    if tensor.ndim != 1 or (len(tensor) and tensor.is_floating_point()):
        raise ValueError(
            f"tokens have shape {tuple(tensor.shape)} and dtype {tensor.dtype}: "
            "give integers of shape (length,), one example at a time"
        )
    if tensor.numel() and int(tensor.min()) < 0:
        raise ValueError(f"tokens hold {int(tensor.min())}: drop labels that are ignored before decoding")
    return [int(i) for i in tensor.tolist()]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder holds no whole text modality")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] != 1 or config["type"] != "text" or not isinstance(config["tokenizer"], bool):
            raise ValueError(f"it says {config}")
        if config["tokenizer"]:
            config["begin"], config["end"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not that of a text modality in format 1: {error!r}") from error
    return dict(config)
