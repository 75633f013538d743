"""Units from self-supervised speech models: clustered hidden states of HuBERT and similar models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch

from .audio import SAMPLE_RATE, Audio, Floats, blocks, pieces
from .frontend import HOP, N_MELS, griffin_lim, log_mel, stacked
from .layout import Layout
from .pretrained import PretrainedSpeech, hub_id, load_model, window_frames, windows
from .refiner import Refiner, fit_refiner, weights
from .units import codebooks_of, dequantize, fit_codebooks, quantize


class HubertModality(PretrainedSpeech):
    """Speech as units of a self-supervised model, decoded by a regression to log-mel frames.

    >>> speech = HubertModality.fit("facebook/hubert-base-ls960", clips, layer=9)  # doctest: +SKIP
    >>> speech.decode(speech.encode("clip.wav"))                                   # doctest: +SKIP
    >>> from transformers import HubertConfig, HubertModel             # random weights, no download
    >>> tiny = HubertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    ...     conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    >>> clip = np.random.default_rng(0).normal(scale=0.1, size=16_000)
    >>> speech = HubertModality.fit(HubertModel(tiny), [clip], layer=1, units=8, refine_steps=2)
    >>> tokens = speech.encode(clip)
    >>> tokens.shape, speech.decode(tokens).shape
    (torch.Size([52]), (16000,))

    The hidden states of one layer are clustered by k-means. Such units represent content rather than the
    speaker. As the model cannot synthesise sound, `fit` also trains a regression from the units' centres to
    log-mel frames, followed by Griffin-Lim; the voice is that of the training audio.

    Args:
        model: A ``HubertModel``, ``Wav2Vec2Model``, ``WavLMModel`` or similar, or the folder or Hub id of
            one.
        codebooks: Cluster centres, float32, shape (codebooks, units, hidden size).
        regressor: Maps centres to log-mel frames.
        layer: Which hidden states: 0 before the first layer, n after the n-th.
        normalize: Whether to normalise windows to zero mean and unit variance; ``do_normalize`` in the
            model's ``preprocessor_config.json``.
        pattern: How units of several codebooks are interleaved, "flattened" or "delayed": see `Layout`.
        window: Seconds encoded at a time.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: The model cannot be loaded.
        ValueError: The model has another type or no such layer; or the codebooks have another shape or dtype.
        ImportError: transformers is not installed.
    """

    name = "speech_hubert"

    def __init__(
        self,
        model: Any,
        codebooks: torch.Tensor,
        regressor: Refiner,
        *,
        layer: int,
        normalize: bool = True,
        pattern: str = "flattened",
        window: float = 30.0,
        revision: str | None = None,
    ) -> None:
        source, model = model, load_model(model, revision)
        hop = _check_model(model, layer)
        shape, dtype = tuple(codebooks.shape), codebooks.dtype
        if len(shape) != 3 or 0 in shape or shape[2] != model.config.hidden_size or dtype != torch.float32:
            raise ValueError(
                f"codebooks have shape {shape} and dtype {dtype}: give float32 of shape "
                f"(codebooks, units, {model.config.hidden_size}), as HubertModality.fit does"
            )
        self.codebooks, self.regressor, self.layer, self.normalize = codebooks, regressor, layer, normalize
        layout = Layout(shape[0], shape[1], pattern)
        super().__init__(model, source, layout, hop=hop, sample_rate=SAMPLE_RATE, window=window)

    def __repr__(self) -> str:
        count, units, _ = self.codebooks.shape
        kind = self.model.config.model_type
        return f"HubertModality({kind}, layer={self.layer}, units={units}, codebooks={count})"

    @classmethod
    def fit(
        cls,
        model: Any,
        waveforms: Iterable[Audio],
        *,
        layer: int,
        units: int = 500,
        codebooks: int = 1,
        normalize: bool = True,
        pattern: str = "flattened",
        window: float = 30.0,
        refine_steps: int = 1000,
        seed: int = 0,
        revision: str | None = None,
    ) -> Self:
        """Fit units and the regression on audio; about ten minutes of it go a long way.

        Args:
            model: See the class.
            waveforms: Pieces of audio, each in any form that `encode` takes.
            layer: Which hidden states: 0 before the first layer, n after the n-th.
            units: Number of units per codebook.
            codebooks: Number of codebooks; each clusters the residuals of the previous ones.
            normalize: See the class.
            pattern: See the class.
            window: See the class.
            refine_steps: Training steps of the regression, at least 1.
            seed: Random seed; the units are reproducible on the same machine.
            revision: Branch, tag or commit of a Hub id.

        Raises:
            ValueError: An argument is out of range, there is too little audio for this number of units, or a
                waveform is invalid.
            ImportError: transformers, or the ``speech`` extra, is not installed.
        """
        if refine_steps < 1:
            raise ValueError(f"refine_steps={refine_steps}: give at least 1, for the way back to sound")
        loaded = load_model(model, revision).eval()
        hop = _check_model(loaded, layer)
        size = window_frames(window, SAMPLE_RATE / hop) * hop
        states, mels = [], []
        for audio, named in pieces(waveforms):
            with named:
                for samples in windows(blocks(audio), size):
                    whole = np.pad(samples, (0, -len(samples) % hop))
                    states.append(_hidden(loaded, whole, layer, normalize))
                    mels.append(stacked(log_mel([whole]), hop // HOP))
        vectors, frames = torch.cat(states), torch.from_numpy(np.concatenate(mels))
        books = fit_codebooks(vectors.numpy(), units=units, codebooks=codebooks, seed=seed)
        restored = dequantize(quantize(vectors, books), books)
        regressor = fit_refiner(restored, frames.reshape(-1, N_MELS), steps=refine_steps, seed=seed)
        fitted = cls(
            loaded, books, regressor, layer=layer, normalize=normalize, pattern=pattern, window=window
        )
        fitted.source = hub_id(model)
        return fitted

    def window_codes(self, samples: Floats) -> torch.Tensor:
        """Return the units of one window."""
        return quantize(_hidden(self.model, samples, self.layer, self.normalize), self.codebooks)

    def sound(self, codes: torch.Tensor) -> Floats:
        """Return the samples of units."""
        with torch.no_grad():
            return griffin_lim(self.regressor(dequantize(codes, self.codebooks)).numpy())

    def config(self) -> dict[str, Any]:
        """Return the model's source, and the settings."""
        return {**super().config(), "layer": self.layer, "normalize": self.normalize}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the codebooks, and the weights of the regressor."""
        return {"codebooks": self.codebooks, **self.regressor.state_dict(prefix="regressor.")}

    @classmethod
    def restore(cls, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """Rebuild the modality from its config and tensors."""
        books = codebooks_of(tensors)
        regressor = Refiner.restore(weights(tensors, "regressor."), residual=False)
        return cls(codebooks=books, regressor=regressor, **config)


def _check_model(model: Any, layer: int) -> int:
    """Check the model; return its number of samples per frame."""
    config = model.config
    strides = getattr(config, "conv_stride", None)
    hop = math.prod(strides) if strides else 0
    if not hop or hop % HOP:
        raise ValueError(
            f"the model is of type {config.model_type}: HubertModality takes hubert, wav2vec2, wavlm and "
            f"others that make frames of a multiple of {HOP} samples"
        )
    if not 0 <= layer <= config.num_hidden_layers:
        raise ValueError(f"layer={layer}: this {config.model_type} has 0 to {config.num_hidden_layers}")
    return hop


def _hidden(model: Any, samples: Floats, layer: int, normalize: bool) -> torch.Tensor:
    """Return the hidden states, float32, shape (frames, width), of a whole number of frames."""
    config = model.config
    hop, seen = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        seen, hop = seen + (kernel - 1) * hop, hop * stride
    if normalize:
        samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    margin = seen - hop
    padded = torch.from_numpy(np.pad(samples, (margin // 2, margin - margin // 2)))
    # transformers draws random numbers for layer drop even in eval mode
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        batch = padded.to(model.device, model.dtype).unsqueeze(0)
        output = model(batch, output_hidden_states=True)
    hidden: torch.Tensor = output.hidden_states[layer][0]
    return hidden.float().cpu()
