"""Every form of audio gives the same tokens, in bounded memory; other data raise an error."""

import io
import tracemalloc

import numpy as np
import pytest
import torch

pytest.importorskip("librosa", reason="speech needs the speech extra")
soundfile = pytest.importorskip("soundfile", reason="speech needs the speech extra")
pytest.importorskip("sklearn", reason="speech needs the speech extra")

from melodies import fit, melody, one_thread  # noqa: F401  # a fixture
from multitower_speech import SpeechModality
from multitower_speech.audio import blocks, waveform


@pytest.fixture(scope="module")
def speech():
    return fit()


def sound_file(samples, rate=16_000, kind="WAV", subtype="FLOAT"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def test_every_form_of_audio_is_the_same(speech, tmp_path):
    clip = melody(10)
    tokens = speech.encode(clip)
    stereo = np.stack([2 * clip, 0 * clip], axis=1)
    (tmp_path / "mono.wav").write_bytes(sound_file(clip))
    (tmp_path / "stereo.wav").write_bytes(sound_file(stereo))
    forms = [
        torch.from_numpy(clip),
        torch.from_numpy(clip).requires_grad_(),
        clip.astype(np.float64),
        clip[::-1].copy()[::-1],
        (clip, 16_000),
        (clip, np.float32(16_000)),
        stereo,
        torch.from_numpy(stereo),
        (stereo, 16_000),
        tmp_path / "mono.wav",
        str(tmp_path / "stereo.wav"),
        sound_file(clip),
        sound_file(stereo),
    ]
    for number, form in enumerate(forms):
        assert torch.equal(speech.encode(form), tokens), number


def test_pcm_is_divided_by_its_range():
    wanted = np.array([-1, -0.5, 0, 0.5], dtype=np.float32)
    for dtype, zero, scale in ((np.int16, 0, 2**15), (np.int32, 0, 2**31), (np.uint8, 128, 128)):
        pcm = (wanted * scale + zero).astype(dtype)
        assert np.array_equal(waveform(pcm), wanted)
        assert np.array_equal(waveform(torch.from_numpy(pcm)), wanted)
        assert np.array_equal(waveform(np.stack([pcm, pcm], axis=1)), wanted)


def test_pcm_and_its_file_are_the_same():
    pcm = (melody(10) * 2**15).astype(np.int16)
    for kind in ("WAV", "FLAC"):
        assert np.array_equal(waveform(sound_file(pcm, kind=kind, subtype="PCM_16")), waveform(pcm))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 12_345.5])
def test_other_rates_are_resampled(speech, rate):
    time = np.arange(int(rate)) / rate
    tokens = speech.encode((0.3 * np.sin(2 * np.pi * 450 * time), rate))
    at_home = speech.encode(0.3 * np.sin(2 * np.pi * 450 * np.arange(16_000) / 16_000))
    assert len(tokens) == len(at_home)
    assert (tokens == at_home).float().mean() > 0.8


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 192_000])
def test_one_sample(speech, rate):
    assert len(speech.encode((np.zeros(1), rate))) == 3
    assert len(speech.encode((np.zeros((1, 2)), rate))) == 3


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0), "empty"),
        (np.zeros((0, 2)), "empty"),
        (np.zeros((2, 0)), r"\(2, 0\)"),
        (np.array([0.0, np.nan]), "NaN"),
        (torch.tensor([0.0, float("inf")]), "infinite"),
        (np.zeros((2, 100)), "transpose"),
        ((np.zeros((4, 2, 2)), 16_000), r"\(4, 2, 2\)"),
        (np.zeros(100, dtype=np.int64), "int64"),
        (np.zeros(100, dtype=np.complex64), "complex64"),
        (torch.zeros(100, dtype=torch.bool), "bool"),
        (np.zeros(()), r"\(\)"),
        ((np.zeros(100), 0), "sample rate"),
        ((np.zeros(100), "16000"), "sample rate"),
        ((np.zeros(100), float("nan")), "sample rate"),
        ((np.zeros(100),), "rate in Hz"),
        (b"", "file of 0 bytes cannot be read"),
        (b"no sound at all", "file of 15 bytes cannot be read"),
    ],
)
def test_encode_refuses(speech, audio, message):
    with pytest.raises(ValueError, match=message):
        speech.encode(audio)
    with pytest.raises(ValueError, match=f"waveform 1: .*{message}"):
        SpeechModality.fit([melody(0), audio], units=4)


@pytest.mark.parametrize(
    "audio", [None, 3, [0.0, 0.1], {"array": np.zeros(3)}, ([0.0], 16_000), np.float32(0)]
)
def test_other_types_are_a_type_error(speech, audio):
    with pytest.raises(TypeError, match="give the path or the bytes of a sound file"):
        speech.encode(audio)


def test_files_that_are_no_sound(speech, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.wav"):
        speech.encode(tmp_path / "gone.wav")
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.wav cannot be read as sound"):
        speech.encode(tmp_path / "text.wav")
    (tmp_path / "empty.wav").write_bytes(sound_file(np.zeros(0)))
    with pytest.raises(ValueError, match=r"empty\.wav is empty"):
        speech.encode(tmp_path / "empty.wav")


def test_clipped_sound_is_encoded_and_a_wrong_scale_is_warned_of(speech):
    loud = np.clip(20 * melody(10), -1, 1)
    assert len(speech.encode(loud)) == 27
    with pytest.warns(UserWarning, match="reaches 9.*e.03, where full scale is 1") as warned:
        speech.encode(melody(10) * 32_768)
    assert len(warned) == 1


def test_a_long_input_takes_little_memory(speech):
    """Three minutes are 12 MB as float32, but encoding holds only some seconds besides the input."""
    pcm = np.tile((melody(10) * 2**15).astype(np.int16), 180)
    inputs = [pcm, sound_file(pcm, kind="FLAC", subtype="PCM_16"), (pcm[: len(pcm) // 2], 8_000)]
    speech.encode(inputs[1])
    for audio in inputs:
        tracemalloc.start()
        tokens = speech.encode(audio)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(tokens) == 180 * 25 + 2
        assert peak < 9e6


def test_blocks_are_all_of_the_sound():
    samples = np.random.default_rng(0).uniform(-1, 1, 600_000).astype(np.float32)
    parts = list(blocks(samples))
    assert len(parts) > 2
    assert np.array_equal(np.concatenate(parts), samples)


@pytest.mark.slow
def test_an_hour_takes_little_memory(speech, tmp_path):
    with soundfile.SoundFile(tmp_path / "hour.wav", "w", 44_100, 2, "PCM_16") as file:
        for number in range(360):
            clip = np.repeat(melody(number, 10), 3)[: 44_100 * 10]
            file.write(np.stack([clip, -0.5 * clip], axis=1))
    tracemalloc.start()
    tokens = speech.encode(tmp_path / "hour.wav")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tokens) == 3600 * 25 + 2
    assert peak < 30e6


@pytest.mark.parametrize("kind", ["WAV", "AIFF"])
def test_a_file_that_is_cut_off_is_read_with_a_word(tmp_path, kind):
    samples = np.sin(np.arange(16_000) / 20)
    whole = sound_file(samples, kind=kind, subtype="PCM_16")
    (tmp_path / "cut").write_bytes(whole[:8_000])
    with pytest.warns(
        UserWarning, match=r"cut is cut off: of 320\d\d bytes of samples only 79\d\d are there"
    ):
        found = waveform(tmp_path / "cut")
    assert np.array_equal(found, waveform(whole)[: len(found)])
    assert len(found) > 3_900


def test_a_header_that_does_not_know_the_length_is_none_that_is_cut_off():
    whole = sound_file(np.zeros(1_000), subtype="PCM_16")
    place = whole.index(b"data") + 4
    streamed = whole[:4] + b"\xff" * 4 + whole[8:place] + b"\xff" * 4 + whole[place + 4 :]
    assert len(waveform(streamed)) == 1_000
