"""The speech modality, on tones and noise."""

import json
import sys

import numpy as np
import pytest
import torch

import multitower as mt

pytest.importorskip("librosa", reason="speech needs the speech extra")
soundfile = pytest.importorskip("soundfile", reason="speech needs the speech extra")
pytest.importorskip("sklearn", reason="speech needs the speech extra")

from melodies import fit, melody, one_thread  # noqa: F401  # a fixture
from multitower_speech import SpeechModality
from multitower_speech.frontend import griffin_lim, log_mels
from multitower_speech.frontend import log_mel as log_mel_of_parts
from multitower_speech.units import dequantize, quantize


def log_mel(samples):
    return log_mel_of_parts([samples])


@pytest.fixture(scope="module")
def speech():
    return fit()


@pytest.fixture(
    scope="module",
    params=[
        (50, 1, "flattened"),
        (25, 1, "delayed"),
        (12.5, 2, "flattened"),
        (25, 3, "delayed"),
        (50 / 3, 1, "flattened"),
    ],
    ids=str,
)
def any_speech(request):
    rate, codebooks, pattern = request.param
    return fit(rate=rate, codebooks=codebooks, pattern=pattern)


def test_is_a_modality(any_speech):
    assert isinstance(any_speech, mt.Modality)
    assert any_speech.name == "speech"
    count, units, _ = any_speech.codebooks.shape
    assert any_speech.begin == count * units
    assert any_speech.end == any_speech.pad == any_speech.begin + 1
    assert any_speech.vocab_size == any_speech.end + 1 + (any_speech.layout.pattern == "delayed")


@pytest.mark.parametrize("samples", [1, 320, 321, 16_001])
def test_encode_and_decode_shapes(any_speech, samples):
    tokens = any_speech.encode(melody(9, 2)[:samples])
    count = any_speech.codebooks.shape[0]
    vectors = -(-samples // round(16_000 / any_speech.rate))
    steps = vectors + (count - 1) * (any_speech.layout.pattern == "delayed")
    assert tokens.dtype == torch.int64
    assert tokens.shape == (steps * count + 2,)
    assert tokens[0] == any_speech.begin
    assert tokens[-1] == any_speech.end
    assert not set(tokens[1:-1].tolist()) & {any_speech.begin, any_speech.end}
    audio = any_speech.decode(tokens)
    assert audio.dtype == np.float32
    assert audio.shape == (round(vectors * 16_000 / any_speech.rate),)
    assert np.abs(audio).max() <= 1
    assert np.array_equal(audio, any_speech.decode(tokens[1:-1]))


def test_decode_restores_the_sound(any_speech):
    clip = melody(10)
    again = any_speech.decode(any_speech.encode(clip))
    error = np.abs(log_mel(again[:16_000]) - log_mel(clip)).mean()
    other = np.abs(log_mel(melody(11)) - log_mel(clip)).mean()
    assert error < 0.75 * other


def test_griffin_lim_restores_the_sound():
    frames = log_mel(melody(10))
    assert np.abs(log_mel(griffin_lim(frames)) - frames).mean() < 0.5


def test_the_refiner_helps():
    clip = log_mel(melody(12))
    clips = [melody(i) for i in range(20, 50)]
    coarse, refined = (SpeechModality.fit(clips, units=4, refine_steps=steps) for steps in (0, 60))
    assert torch.equal(coarse.codebooks, refined.codebooks)
    vectors = dequantize(coarse.layout.unweave(coarse.encode(melody(12))), coarse.codebooks)
    before = np.abs(vectors.reshape(-1, 80).numpy() - clip).mean()
    after = np.abs(refined.refiner(vectors).numpy() - clip).mean()
    assert after < 0.95 * before


def test_fit_is_deterministic_and_leaves_the_random_state(any_speech):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    layout = any_speech.layout
    again = fit(rate=any_speech.rate, codebooks=layout.codebooks, pattern=layout.pattern)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.codebooks, any_speech.codebooks)
    tokens = any_speech.encode(melody(10))
    assert np.array_equal(again.decode(tokens), any_speech.decode(tokens))
    assert not torch.equal(fit(seed=1, rate=any_speech.rate).codebooks[0], any_speech.codebooks[0])


def test_fit_works_without_autograd():
    with torch.no_grad():
        assert not any(p.requires_grad for p in fit().refiner.parameters())


def test_silence(speech):
    assert len(speech.encode(np.zeros(16_000))) == 27
    with pytest.warns(UserWarning, match="distinct clusters"):
        silent = SpeechModality.fit([np.zeros(3200)], units=2, rate=50, refine_steps=1)
    assert np.abs(silent.decode(silent.encode(np.zeros(3200)))).max() < 0.01


def test_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        speech = fit()
        assert speech.decode(speech.encode(melody(0))).dtype == np.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_fit_says_which_waveform(speech):
    with pytest.raises(ValueError, match="waveform 1: "):
        log_mels([melody(0), np.zeros(0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": 0}, "0 units"),
        ({"codebooks": 0}, "0 codebooks"),
        ({"rate": 0}, "rate=0"),
        ({"rate": 30}, "rate=30"),
        ({"rate": 100}, "rate=100"),
        ({"refine_steps": -1}, "refine_steps=-1"),
        ({"units": 10_000}, "units=10000"),
        ({"pattern": "random"}, "pattern='random'"),
    ],
)
def test_fit_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        fit(**options)


def test_fit_wants_several_waveforms():
    with pytest.raises(ValueError, match="give a list"):
        SpeechModality.fit(melody(0))
    with pytest.raises(ValueError, match="no waveforms"):
        SpeechModality.fit([])


def test_codebooks_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"\(3, 80\)"):
        SpeechModality(torch.zeros(3, 80))
    with pytest.raises(ValueError, match=r"\(1, 3, 81\)"):
        SpeechModality(torch.zeros(1, 3, 81))


def test_decode_any_tokens(any_speech):
    generator = torch.Generator().manual_seed(0)
    for length in (0, 1, 2, 40):
        tokens = torch.randint(any_speech.vocab_size + 5, (length,), generator=generator)
        frames = len(any_speech.layout.unweave(tokens))
        audio = any_speech.decode(tokens)
        assert audio.shape == (round(frames * 16_000 / any_speech.rate),)
        assert np.isfinite(audio).all()


def test_begin_and_end_inside_are_dropped(speech):
    tokens = speech.encode(melody(10))
    broken = torch.cat([tokens[:9], torch.tensor([speech.begin, speech.end]), tokens[9:]])
    assert np.array_equal(speech.decode(broken), speech.decode(tokens))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(torch.zeros(2, 3, dtype=torch.int64), r"\(2, 3\)"), (torch.zeros(3), "float32"), ([-100, 3], "-100")],
)
def test_decode_refuses(speech, tokens, message):
    with pytest.raises(ValueError, match=message):
        speech.decode(tokens)


def test_each_codebook_takes_what_is_left():
    books = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    codes = quantize(vectors, books)
    assert codes.shape == (7, 3)
    rest = vectors
    for book, column in zip(books, codes.T, strict=True):
        assert torch.equal(column, torch.cdist(rest, book).argmin(1))
        rest = rest - book[column]
    torch.testing.assert_close(dequantize(codes, books), vectors - rest)
    codes[2, 1:] = -1
    assert torch.equal(dequantize(codes, books)[2], books[0, codes[2, 0]])


@pytest.mark.parametrize(("refine_steps", "pattern"), [(0, "flattened"), (2, "delayed")])
def test_save_and_load(refine_steps, pattern, tmp_path):
    speech = fit(codebooks=2, refine_steps=refine_steps, pattern=pattern)
    speech.save_pretrained(tmp_path / "deep" / "speech")
    names = {path.name for path in (tmp_path / "deep" / "speech").iterdir()}
    assert names == {"modality.json", "modality.safetensors"}
    loaded = SpeechModality.from_pretrained(tmp_path / "deep" / "speech")
    tokens = speech.encode(melody(10))
    assert torch.equal(loaded.encode(melody(10)), tokens)
    assert np.array_equal(loaded.decode(tokens), speech.decode(tokens))
    assert (loaded.rate, loaded.vocab_size) == (speech.rate, speech.vocab_size)


@pytest.mark.parametrize("name", ["modality.json", "modality.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_load_names_the_damaged_file(speech, tmp_path, name, damage):
    speech.save_pretrained(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(mt.errors.CheckpointError, match=name.replace(".", r"\.") if content else "damaged"):
        SpeechModality.from_pretrained(tmp_path)


def test_load_refuses_another_modality(speech, tmp_path):
    speech.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "modality.json").read_text())
    (tmp_path / "modality.json").write_text(json.dumps({**document, "modality": "text"}))
    with pytest.raises(mt.errors.CheckpointError, match=r"modality\.json is that of modality 'text'"):
        SpeechModality.from_pretrained(tmp_path)


def test_missing_librosa(speech, monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(ImportError, match=r"librosa .*pip install 'multitower\[speech\]'"):
        speech.encode(melody(0))


def test_few_frames_for_many_units_are_warned_of():
    with pytest.warns(UserWarning, match=r"\d+ vectors are few to fit units=100, .* give more audio"):
        SpeechModality.fit([melody(0, seconds=3)], units=100, refine_steps=0)
