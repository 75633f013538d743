"""Neural codecs from transformers: Mimi, EnCodec and DAC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from .audio import Floats
from .layout import Layout
from .pretrained import PretrainedSpeech, load_model


class CodecModality(PretrainedSpeech):
    """Speech as units of a neural codec.

    >>> speech = CodecModality("kyutai/mimi", codebooks=8, pattern="delayed")      # doctest: +SKIP
    >>> speech.decode(speech.encode("clip.wav"))                                   # doctest: +SKIP
    >>> from transformers import DacConfig, DacModel                   # random weights, no download
    >>> sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 64, "downsampling_ratios": [8, 8]}
    >>> tiny = DacConfig(n_codebooks=3, **sizes)
    >>> speech = CodecModality(DacModel(tiny), codebooks=2)
    >>> speech.encode(np.zeros(16_000)).shape, speech.rate, speech.vocab_size
    (torch.Size([502]), 250.0, 2050)

    The first codebooks of the codec are used: fewer make shorter sequences and coarser sound. Audio longer
    than a window is encoded window by window.

    Args:
        model: A ``MimiModel``, ``EncodecModel`` or ``DacModel`` for mono sound, or the folder or Hub id of
            one.
        codebooks: Number of codebooks to use; all by default.
        pattern: How units of several codebooks are interleaved, "flattened" or "delayed": see `Layout`.
        window: Seconds encoded or decoded at a time.
        revision: Branch, tag or commit of a Hub id.

    Attributes:
        rate: Frames per second; a frame has one token per codebook.
        sample_rate: The codec's sample rate in Hz, that of `decode`'s output. `encode` still assumes 16 kHz
            for arrays without a rate: pass (samples, speech.sample_rate).

    Raises:
        CheckpointError: The model cannot be loaded.
        ValueError: The model has another type, is not for mono sound, or has fewer codebooks.
        ImportError: transformers is not installed.
    """

    name = "speech_codec"

    def __init__(
        self,
        model: Any,
        *,
        codebooks: int | None = None,
        pattern: str = "flattened",
        window: float = 30.0,
        revision: str | None = None,
    ) -> None:
        source, model = model, load_model(model, revision)
        config = model.config
        match config.model_type:
            case "mimi":
                count, hop = config.num_quantizers, config.frame_size
            case "encodec":
                count, hop = config.num_quantizers, config.hop_length
            case "dac":
                count, hop = config.n_codebooks, config.hop_length
            case kind:
                raise ValueError(f"the model is of type {kind}: CodecModality takes mimi, encodec and dac")
        if getattr(config, "audio_channels", 1) != 1 or getattr(config, "chunk_length_s", None):
            raise ValueError(f"this {config.model_type} is not for mono sound in one piece: give one that is")
        codebooks = count if codebooks is None else codebooks
        if not 1 <= codebooks <= count:
            raise ValueError(f"codebooks={codebooks}: this {config.model_type} has 1 to {count}")
        layout = Layout(codebooks, config.codebook_size, pattern)
        rate = config.sampling_rate
        super().__init__(model, source, layout, hop=int(hop), sample_rate=rate, window=window)

    def __repr__(self) -> str:
        kind, count = self.model.config.model_type, self.layout.codebooks
        return f"CodecModality({kind}, rate={self.rate:g}, codebooks={count})"

    def window_codes(self, samples: Floats) -> torch.Tensor:
        """Return the units of one window."""
        sound = torch.from_numpy(samples).to(self.model.device, self.model.dtype).reshape(1, 1, -1)
        if self.model.config.model_type == "encodec":
            bandwidth = self.model.config.target_bandwidths[-1]
            codes: torch.Tensor = self.model.encode(sound, bandwidth=bandwidth).audio_codes[0, 0]
        else:
            codes = self.model.encode(sound).audio_codes[0]
        frames, count = len(samples) // self.hop, self.layout.codebooks
        return codes[:count, :frames].T.long().cpu()

    def sound(self, codes: torch.Tensor) -> Floats:
        """Return the samples of units; missing units count as unit 0."""
        with torch.no_grad():
            return np.concatenate([self._window_sound(part) for part in torch.split(codes, self._frames)])

    def _window_sound(self, codes: torch.Tensor) -> Floats:
        batch = codes.clamp(min=0).T.unsqueeze(0).to(self.model.device)
        match self.model.config.model_type:
            case "encodec":
                values = self.model.decode(batch.unsqueeze(0), [None]).audio_values
            case "dac":
                values = self.model.decode(audio_codes=batch).audio_values
            case _:
                values = self.model.decode(batch).audio_values
        samples = values.flatten().float().cpu().numpy().clip(-1, 1)
        length = len(codes) * self.hop
        return np.pad(samples[:length], (0, max(0, length - len(samples))))

    def config(self) -> dict[str, Any]:
        """Return the model's source, and the settings."""
        return {**super().config(), "codebooks": self.layout.codebooks}

    @classmethod
    def restore(cls, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """Rebuild the modality from its config."""
        return cls(**config)
