"""The codec between raw data and the tokens of one tower."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..storage.files import read_json
from ..storage.tensors import mapped_tensors

FORMAT = 1
CONFIG, TENSORS = "modality.json", "modality.safetensors"


class Modality(ABC):
    """A codec between raw data and the tokens of one tower; the base class of modality plugins.

    >>> import multitower as mt, torch
    >>> class Letters(mt.Modality):
    ...     name, accepts = "letters", (str,)
    ...     vocab_size, begin, end = 28, 26, 27
    ...     def encode(self, raw):
    ...         return torch.tensor([26, *(ord(letter) - ord("a") for letter in raw), 27])
    ...     def decode(self, tokens):
    ...         return "".join(chr(ord("a") + token) for token in tokens.tolist() if token < 26)
    >>> Letters().decode(Letters().encode("zip"))
    'zip'

    ``multitower.testing.check_modality`` tests a modality. State that should be saved is returned by
    ``config`` and ``tensors``; saving and loading are then automatic.

    Attributes:
        name: The kind of data, in lower case; also the name of the entry point.
        accepts: The types of raw data that ``encode`` accepts.
        vocab_size: Number of token ids, including ``begin``, ``end`` and ``pad``.
        begin: Id of the first token of every encoded segment.
        end: Id of the last token of every encoded segment; may equal ``begin``.
        pad: Id of the padding token, which ``decode`` drops at the edges; ``end`` by default.
        default_tower: A recommended source for ``add_tower``, such as a Hub id, or None.
        media: The kind of raw data for the command line and the demo page: "text", "audio", "image", or
            "file" for anything else.
        suffix: File name suffix for ``write_file``.
    """

    name: str
    accepts: tuple[type, ...]
    vocab_size: int
    begin: int
    end: int
    default_tower: str | None = None
    media: str = "file"
    suffix: str = ".txt"

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        return self.end

    @abstractmethod
    def encode(self, raw: Any) -> Tensor:
        """Return the tokens of one piece of raw data: int64, shape (length,), including begin and end.

        Raises:
            TypeError: Its type is not accepted.
            ValueError: It is empty, damaged or otherwise invalid.
        """

    @abstractmethod
    def decode(self, tokens: Tensor) -> Any:
        """Return the raw data of tokens of shape (length,), with or without begin and end.

        Towers may generate any sequence, even an empty one, or an order that ``encode`` never produces. Drop
        tokens without meaning.
        """

    def decode_stream(self, pieces: Iterable[Tensor]) -> Iterator[Any]:
        """Yield raw data piece by piece, while the tokens arrive in pieces of shape (length,).

        ``Pipeline.stream`` calls it. Text modalities need not override it: text is streamed word by word.

        Raises:
            TypeError: The modality does not support streaming: override this method.
        """
        raise TypeError(
            f"modality {self.name!r} does not say how to decode in pieces: override decode_stream"
        )

    def encode_batch(self, raws: Sequence[Any]) -> list[Tensor]:
        """Return the tokens of each of several pieces of raw data; the same as one by one, maybe faster."""
        return [self.encode(raw) for raw in raws]

    def decode_batch(self, rows: Sequence[Tensor]) -> list[Any]:
        """Return the raw data of each of several rows of tokens; the same as one by one, maybe faster."""
        return [self.decode(tokens) for tokens in rows]

    def read_file(self, path: str | os.PathLike[str]) -> Any:
        """Return the raw data in a file, in a form that ``encode`` accepts.

        By default, this is its text if ``media`` is "text"; else the path, if paths are accepted; else its
        bytes.

        Raises:
            OSError: The file cannot be read.
            TypeError: The modality accepts none of these: override this method.
        """
        if self.media == "text" and str in self.accepts:
            return Path(path).read_text(encoding="utf-8")
        if os.PathLike in self.accepts or str in self.accepts:
            return os.fspath(path)
        if bytes in self.accepts:
            return Path(path).read_bytes()
        raise TypeError(f"modality {self.name!r} does not say how it reads files: override read_file")

    def write_file(self, raw: Any, path: str | os.PathLike[str]) -> None:
        """Write raw data, as ``decode`` returns them, to a file: by default str as UTF-8, and bytes.

        Raises:
            OSError: The file cannot be written.
            TypeError: They are something else: override this method.
        """
        if isinstance(raw, str):
            Path(path).write_text(raw, encoding="utf-8")
        elif isinstance(raw, bytes):
            Path(path).write_bytes(raw)
        else:
            raise TypeError(
                f"modality {self.name!r} does not say how it writes {type(raw).__name__}: override write_file"
            )

    def config(self) -> dict[str, Any]:
        """Return the JSON-serialisable state that ``restore`` needs."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that ``restore`` needs."""
        return {}

    @classmethod
    def restore(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild the modality; by default by calling the class with both as keyword arguments."""
        return cls(**config, **tensors)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``modality.json`` and, if there are tensors, ``modality.safetensors`` to a folder."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors().items()}
        document = {
            "format": FORMAT,
            "modality": self.name,
            "config": self.config(),
            "tensors": sorted(tensors),
        }
        written = json.dumps(document, indent=2, allow_nan=False) + "\n"
        if tensors:
            save_file(tensors, path / TENSORS)
        else:
            (path / TENSORS).unlink(missing_ok=True)
        (path / CONFIG).write_text(written, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Load a modality written by ``save_pretrained``.

        Raises:
            CheckpointError: A file is missing, damaged, or of another modality; the message names it.
        """
        path = Path(folder)
        config = cls.read_config(path)
        expected = read_json(path / CONFIG).get("tensors")
        tensors = mapped_tensors(path / TENSORS) if expected else {}
        if sorted(tensors) != expected:
            raise CheckpointError(
                f"{path / TENSORS} holds {sorted(tensors)} where {CONFIG} speaks of {expected}; was the "
                "folder wholly copied?"
            )
        try:
            return cls.restore(config, tensors)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error

    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any]:
        """Read the saved result of ``config``.

        Raises:
            CheckpointError: The file is missing, damaged, or of another modality.
        """
        file = folder / CONFIG
        document = read_json(file)
        version, name, config = (document.get(key) for key in ("format", "modality", "config"))
        if not isinstance(version, int) or not isinstance(config, dict):
            raise CheckpointError(f"{file} is damaged: expected a format, a modality and a config")
        if version > FORMAT:
            raise CheckpointError(f"{file} has format {version}; this release reads up to {FORMAT}: upgrade")
        if name != cls.name:
            raise CheckpointError(f"{file} is that of modality {name!r}, not of {cls.name!r}")
        return config


def check_tokens(tokens: Tensor) -> list[int]:
    """Validate tokens and return them as a list.

    >>> import torch
    >>> check_tokens(torch.tensor([3, 1]))
    [3, 1]

    Args:
        tokens: Integers, shape (length,).

    Raises:
        ValueError: The shape or dtype is wrong, or a token is negative.
    """
    tensor = torch.as_tensor(tokens)
    if tensor.ndim != 1 or (len(tensor) and (tensor.is_floating_point() or tensor.is_complex())):
        raise ValueError(
            f"tokens have shape {tuple(tensor.shape)} and dtype {tensor.dtype}: "
            "give integers of shape (length,), one example at a time"
        )
    if len(tensor) and int(tensor.min()) < 0:
        raise ValueError(f"tokens hold {int(tensor.min())}: drop labels that are ignored before decoding")
    return [int(token) for token in tensor.tolist()]
