"""Base class of speech modalities with a transformers model, saved by Hub id or with its weights."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

import multitower as mt
from multitower.base.extras import require

from .audio import Floats
from .base import DiscreteSpeech
from .layout import Layout

MODEL = "model"


class PretrainedSpeech(DiscreteSpeech):
    """Speech encoded by a transformers model, window by window.

    Windows are independent, so memory is bounded, and streamed tokens come one window at a time.

    Args:
        model: The model.
        source: What it was loaded from; a Hub id is saved instead of the weights.
        layout: How the units of several codebooks are interleaved.
        hop: Samples per frame.
        sample_rate: The model's sample rate in Hz.
        window: Length of a window in seconds, rounded to whole frames.

    Raises:
        ValueError: A window is shorter than a frame.
    """

    def __init__(
        self,
        model: Any,
        source: Any,
        layout: Layout,
        *,
        hop: int,
        sample_rate: int,
        window: float,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.source = hub_id(source)
        self.hop, self.window = hop, window
        self._frames = window_frames(window, sample_rate / hop)
        super().__init__(layout, rate=sample_rate / hop, sample_rate=sample_rate)

    @abstractmethod
    def window_codes(self, samples: Floats) -> torch.Tensor:
        """Return the units of one window.

        Args:
            samples: float32, shape (frames * hop,).

        Returns:
            int64, shape (frames, codebooks).
        """

    def codes(self, parts: Iterable[Floats]) -> Iterator[torch.Tensor]:
        """Yield the units of samples, a window at a time."""
        for samples in windows(parts, self._frames * self.hop):
            with torch.no_grad():
                yield self.window_codes(np.pad(samples, (0, -len(samples) % self.hop)))

    def config(self) -> dict[str, Any]:
        """Return the model's source, and the common settings."""
        revision = getattr(self.model.config, "_commit_hash", None) if self.source else None
        pattern = self.layout.pattern
        return {"model": self.source, "revision": revision, "pattern": pattern, "window": self.window}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the modality's files, and the model to ``model/`` unless it has a Hub id."""
        super().save_pretrained(folder)
        if self.source is None:
            self.model.save_pretrained(Path(folder) / MODEL)

    @classmethod
    def read_config(cls, folder: Path) -> dict[str, Any]:
        """Read the config, and add the path of a stored model."""
        config = super().read_config(folder)
        return config if config.get("model") else {**config, "model": str(folder / MODEL)}


def window_frames(window: float, rate: float) -> int:
    """Return the number of frames in a window.

    Args:
        window: Seconds.
        rate: Frames per second.

    Raises:
        ValueError: The window is shorter than a frame.
    """
    frames = round(window * rate) if 0 < window < 1e6 else 0
    if frames < 1:
        raise ValueError(f"window={window}: give at least {1 / rate:g} seconds, a frame")
    return frames


def hub_id(source: Any) -> str | None:
    """Return the source of a model if it is a Hub id, None if it is a folder or a module.

    >>> hub_id("facebook/hubert-base-ls960"), hub_id("/tmp")
    ('facebook/hubert-base-ls960', None)
    """
    return source if isinstance(source, str) and not os.path.isdir(source) else None


def load_model(source: Any, revision: str | None = None) -> Any:
    """Load a transformers model from a folder or Hub id; return a module unchanged.

    Only safetensors files are read.

    Raises:
        CheckpointError: The model cannot be loaded.
        ImportError: transformers is not installed.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    transformers = require("transformers", "transformers")
    try:
        model = transformers.AutoModel.from_pretrained(source, revision=revision, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise mt.errors.CheckpointError(f"{source} cannot be loaded by transformers: {error}") from error
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # alignment in a mapped file differs, which changes rounding
    return model


def windows(parts: Iterable[Floats], size: int) -> Iterator[Floats]:
    """Regroup samples into windows of `size`; the last may be shorter.

    >>> [len(one) for one in windows([np.zeros(3), np.zeros(7), np.zeros(1)], 4)]
    [4, 4, 3]
    """
    held: list[Floats] = []
    count = 0
    for part in parts:
        held.append(part)
        count += len(part)
        if count >= size:
            joined = np.concatenate(held)
            whole = count - count % size
            yield from (joined[start : start + size] for start in range(0, whole, size))
            held, count = [joined[whole:]], count - whole
    if count:
        yield np.concatenate(held)
