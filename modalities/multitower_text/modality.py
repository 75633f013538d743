"""The text modality."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from multitower import Modality
from multitower.errors import CheckpointError
from multitower.plugins import check_tokens

from .chat import encode_chat
from .special import known_ids, resolve, tokenizer_name, unreachable

TOKENIZER = "tokenizer"


TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
"""Glob patterns of a tokenizer's files; one must match."""


class TextModality(Modality):
    r"""Text as bytes, or as the tokens of a transformers tokenizer.

    >>> text = TextModality()                      # bytes: needs no files
    >>> text.encode("hé")
    tensor([256, 104, 195, 169, 257])
    >>> text.decode(text.encode("hé"))
    'hé'
    >>> TextModality("gpt2").encode("hé")          # doctest: +SKIP
    tensor([50256,   258, 2634, 50256])

    Without a tokenizer, ids 0..255 are UTF-8 bytes, 256 is begin and 257 end. With one, begin is its bos
    token and end its eos token; they may be the same.

    **Round trip.** Bytes and byte-level BPE restore every text exactly. Other tokenizers may lose information
    in their normaliser, such as case or repeated spaces, add a leading space, or lack some characters.

    **Special tokens** are not text: "</s>" in a text is encoded as four ordinary characters, and ``decode``
    drops special tokens. With ``split_special_tokens=False``, for text with intended markup, "</s>" is the
    special token, both ways. Added tokens that are not special count as text, but slow tokenizers split them,
    too.

    **Streaming.** The last tokens may be an incomplete character, decoded to U+FFFD. Without these,
    ``text.decode(tokens[:n]).rstrip("\ufffd")`` only grows; transformers' ``TextStreamer(text)`` waits for
    complete characters, too.

    Args:
        tokenizer: None for bytes, a transformers tokenizer, or the folder or Hub id of one. Custom code is
            never run: load such a tokenizer yourself.
        begin: The begin token, by id or name, if not the tokenizer's bos. Do not use a token of ordinary
            text: ``decode`` drops it at the edges.
        end: The end token, by id or name, if not the tokenizer's eos.
        split_special_tokens: Whether special tokens spelled out in a text are encoded as ordinary text.

    Attributes:
        accepts: str, and list (chats) if the tokenizer has a chat template.
        vocab_size: Number of ids, including begin and end: the highest id plus one.
        begin: Id of the first token of every encoded segment.
        end: Id of the last token of every encoded segment.
        pad: Id of the tokenizer's pad token; ``end`` if it has none.
        tokenizer: The transformers tokenizer, or None for bytes.
        split_special_tokens: See the argument.
        default_tower: The folder or Hub id of the tokenizer, if one was given; for a loaded modality, only a
            Hub id.

    Raises:
        ImportError: A folder or Hub id is given, and transformers is not installed.
        TypeError: The tokenizer is not a transformers tokenizer.
        ValueError: The tokenizer has no bos or eos and none is given, or the given one is not in its
            vocabulary.
    """

    name = media = "text"
    accepts: tuple[type, ...] = (str,)

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        begin: int | str | None = None,
        end: int | str | None = None,
        split_special_tokens: bool = True,
    ) -> None:
        self.tokenizer = None
        self.split_special_tokens = split_special_tokens
        if tokenizer is None:
            if begin is not None or end is not None or not split_special_tokens:
                raise ValueError(
                    "begin=, end= and split_special_tokens= go with a tokenizer: bytes always begin with 256 "
                    "and end with 257, which no text can spell out"
                )
            self.vocab_size, self.begin, self.end = 258, 256, 257
            return
        if isinstance(tokenizer, str | os.PathLike):
            self.default_tower = os.fspath(tokenizer)
            tokenizer = _load(self.default_tower)
        self._known = known_ids(tokenizer)
        self.tokenizer = tokenizer
        self.vocab_size = max(len(tokenizer), max(self._known) + 1)
        self.begin = resolve(tokenizer, self._known, "begin", "bos", begin)
        self.end = resolve(tokenizer, self._known, "end", "eos", end)
        self._unreachable = unreachable(tokenizer, {self.begin, self.end}) if split_special_tokens else set()
        if tokenizer.chat_template:
            self.accepts = (str, list)

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        own = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return self.end if own is None else int(own)

    def __repr__(self) -> str:
        name = "bytes" if self.tokenizer is None else tokenizer_name(self.tokenizer)
        return f"TextModality({name}, vocab_size={self.vocab_size}, begin={self.begin}, end={self.end})"

    def encode(self, raw: str | list[Mapping[str, Any]]) -> torch.Tensor:
        """Return the tokens of a text or a chat.

        >>> TextModality().encode("")
        tensor([256, 257])

        Args:
            raw: A text of any length, possibly empty; it is never truncated. Or a chat: a list of messages,
                ``{"role": "user", "content": "Hello"}``, for the tokenizer's chat template. Begin and end
                tokens that the template adds are not repeated; white space after its last end token is
                dropped. No generation prompt is added.

        Returns:
            int64, shape (length,), including begin and end.

        Raises:
            TypeError: ``raw`` is neither a str nor a chat, or there is no chat template.
            ValueError: The text is not valid Unicode (a lone surrogate), the template does not accept the
                chat, or the tokenizer can encode a spelled-out special token only as the special token.
        """
        return self.encode_batch([raw])[0]

    def encode_batch(self, raws: Sequence[Any]) -> list[torch.Tensor]:
        """Return the tokens of several texts or chats; all texts are tokenised in one call.

        >>> TextModality().encode_batch(["a", ""])
        [tensor([256,  97, 257]), tensor([256, 257])]
        """
        texts = iter(self._encode_texts([raw for raw in raws if isinstance(raw, str)]))
        rows = [next(texts) if isinstance(raw, str) else self._encode_chat(raw) for raw in raws]
        return [torch.tensor([self.begin, *row, self.end], dtype=torch.int64) for row in rows]

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        encoded = [_utf8(text) for text in texts]
        if self.tokenizer is None:
            return [list(text) for text in encoded]
        if not texts:
            return []
        rows: list[list[int]] = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=self.split_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for row in rows:
            if not self._unreachable.isdisjoint(row):
                spelled = self.tokenizer.convert_ids_to_tokens(sorted(self._unreachable.intersection(row)))
                raise ValueError(
                    f"a text holds what tokenizer {tokenizer_name(self.tokenizer)!r} can only read as "
                    f"special tokens, {spelled}: take it out, or pass split_special_tokens=False if that "
                    "is what it means"
                )
        return rows

    def _encode_chat(self, raw: Any) -> list[int]:
        if isinstance(raw, bytes | bytearray):
            raise TypeError('text must be a str, not bytes: decode them first, raw.decode("utf-8")')
        if not isinstance(raw, list) or not all(isinstance(message, Mapping) for message in raw):
            raise TypeError(
                f"text must be a str or a chat, a list of messages, not {type(raw).__name__}: "
                "encode one text at a time"
            )
        if self.tokenizer is None or not self.tokenizer.chat_template:
            which = "bytes" if self.tokenizer is None else f"tokenizer {tokenizer_name(self.tokenizer)!r}"
            raise TypeError(
                f"text must be a str, not list, for {which} without a chat template: write the chat down "
                "as one str, or give a tokenizer whose chat_template is set"
            )
        ids = encode_chat(self.tokenizer, raw, sanitize=self.split_special_tokens)
        if self.end in ids:
            last = len(ids) - 1 - ids[::-1].index(self.end)
            after = self.tokenizer.decode(ids[last + 1 :], clean_up_tokenization_spaces=False)
            if not after.strip():
                ids = ids[:last]
        return ids[1:] if ids[:1] == [self.begin] else ids

    def decode(self, tokens: torch.Tensor | Sequence[int]) -> str:
        """Return the text of tokens, for any sequence that a language model may generate.

        >>> TextModality().decode(torch.tensor([104, 105, 257]))
        'hi'

        All special tokens are dropped, including ``<unk>`` and those of a chat template; with
        ``split_special_tokens=False``, only begin, end and padding at the edges. Ids unknown to the
        tokenizer, which a tower with padded embeddings may generate, are dropped. Invalid UTF-8 becomes
        U+FFFD.

        Args:
            tokens: Integers, shape (length,), with or without begin and end.

        Raises:
            ValueError: The tokens have another shape or dtype, or are negative.
        """
        ids = check_tokens(torch.as_tensor(tokens))
        if self.tokenizer is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        edges = {self.begin, self.end, self.pad}
        start, stop = 0, len(ids)
        while start < stop and ids[start] in edges:
            start += 1
        while start < stop and ids[stop - 1] in edges:
            stop -= 1
        kept = [i for i in ids[start:stop] if i in self._known]
        return str(
            self.tokenizer.decode(
                kept, skip_special_tokens=self.split_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def config(self) -> dict[str, Any]:
        """Return the settings that are not in the tokenizer's files."""
        if self.tokenizer is None:
            return {"tokenizer": False}
        on_the_hub = self.default_tower is not None and not os.path.exists(self.default_tower)
        return {
            "tokenizer": True,
            "vocab_size": self.vocab_size,
            "begin": self.begin,
            "end": self.end,
            "split_special_tokens": self.split_special_tokens,
            "default_tower": self.default_tower if on_the_hub else None,
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``modality.json`` and, if there is a tokenizer, its files to ``tokenizer/``.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     TextModality().save_pretrained(folder)
        ...     TextModality.from_pretrained(folder)
        TextModality(bytes, vocab_size=258, begin=256, end=257)
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path) as fresh:
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(Path(fresh) / TOKENIZER)
            if (path / TOKENIZER).exists():
                shutil.rmtree(path / TOKENIZER)
            if self.tokenizer is not None:
                (Path(fresh) / TOKENIZER).rename(path / TOKENIZER)
        super().save_pretrained(path)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Load a modality written by ``save_pretrained``.

        Raises:
            CheckpointError: A file is missing, damaged, or of another modality; the message names it.
        """
        path = Path(folder)
        config = cls.read_config(path)
        try:
            default_tower, expected = config.pop("default_tower", None), config.pop("vocab_size", None)
            if config.pop("tokenizer"):
                config["tokenizer"] = _load_saved(path / TOKENIZER)
            loaded = cls.restore(config, {})
            if expected not in (None, loaded.vocab_size):
                raise CheckpointError(
                    f"{path / TOKENIZER} has {loaded.vocab_size} ids where {expected} were saved; was the "
                    "folder wholly copied?"
                )
            loaded.default_tower = default_tower
            return loaded
        except CheckpointError:
            raise
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds half of a surrogate pair, U+{ord(text[error.start]):04X}, at {error.start}: "
            'raw.encode("utf-16", "surrogatepass").decode("utf-16", "replace") mends it'
        ) from error


def _load(source: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(f"tokenizer {source!r} needs transformers: pip install multitower[text]") from error
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(form)) for form in TOKENIZER_FILES):
        raise ValueError(
            f"{source} has no tokenizer: name a folder that has one, or use plain bytes, TextModality() "
            "or, in a recipe, 'modality: text'"
        )
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _load_saved(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder / 'tokenizer_config.json'} is missing; was the folder wholly copied?")
    try:
        return _load(str(folder))
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for damaged files
        raise CheckpointError(
            f"{folder} contains no tokenizer that transformers can load by itself: {error}. If it brings "
            "code of its own, load it yourself, and give it to TextModality"
        ) from error
