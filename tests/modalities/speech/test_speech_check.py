"""Run ``check_modality`` on every speech modality."""

import io
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("librosa", reason="speech needs the speech extra")
soundfile = pytest.importorskip("soundfile", reason="speech needs the speech extra")
pytest.importorskip("sklearn", reason="speech needs the speech extra")
pytest.importorskip("transformers", reason="codecs need transformers")

import test_speech_pretrained as tiny

from melodies import fit, melody, one_thread  # noqa: F401  # a fixture
from multitower.testing import check_modality
from multitower_speech import CodecModality
from multitower_speech.audio import waveform

SPEECH = {
    "units": fit,
    "delayed units": partial(fit, codebooks=2, pattern="delayed"),
    "mimi": lambda: CodecModality(tiny.mimi(), pattern="delayed"),
    "encodec": lambda: CodecModality(tiny.encodec()),
    "dac": lambda: CodecModality(tiny.dac(), codebooks=2),
    "hubert": lambda: tiny.fit_hubert(tiny.hubert()),
}


QUICK = ("units", "encodec")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in SPEECH]
)
def test_every_promise_is_kept(kind, tmp_path):
    clip, file = melody(3, 0.5), io.BytesIO()
    soundfile.write(file, clip, 16_000, format="WAV")
    path = tmp_path / "clip.wav"
    path.write_bytes(file.getvalue())
    stereo = (np.stack([clip, clip], axis=1) * 32_767).astype(np.int16)
    tensor = torch.from_numpy(clip[:5000])
    samples = [clip[:1], clip, tensor, (stereo, 22_050), file.getvalue(), path, str(path)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        speech = SPEECH[kind]()

    def seconds_lost(raw, again):
        return abs(len(again) / speech.sample_rate - len(waveform(raw)) / 16_000)

    check_modality(speech, samples, round_trip=seconds_lost, bound=1 / speech.rate)
