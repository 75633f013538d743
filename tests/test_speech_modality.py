"""The speech modality, on tones and noise."""

import json

import numpy as np
import pytest
import torch

from multitower.modality import Modality

pytest.importorskip("librosa")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("sklearn")

from multitower_speech import SpeechModality, _need  # noqa: E402
from multitower_speech.frontend import griffin_lim, log_mel, log_mels  # noqa: E402
from multitower_speech.units import dequantize, quantize  # noqa: E402


def melody(seed, seconds=1.0):
    """A tone whose pitch changes every 100 ms, with a little noise."""
    rng = np.random.default_rng(seed)
    pitch = np.repeat(rng.choice([200, 300, 450, 700, 1000], int(seconds * 10)), 1600)
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000)
    return (wave + rng.normal(scale=1e-3, size=len(wave))).astype(np.float32)


def fit(**options):
    return SpeechModality.fit([melody(i) for i in range(6)], **{"units": 16, "refine_steps": 5, **options})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def speech():
    return fit()


@pytest.fixture(scope="module", params=[(50, 1), (25, 1), (12.5, 2), (50 / 3, 1)], ids=str)
def any_speech(request):
    rate, codebooks = request.param
    return fit(rate=rate, codebooks=codebooks)


def test_satisfies_the_protocol(any_speech):
    assert isinstance(any_speech, Modality)
    count, units, _ = any_speech.codebooks.shape
    assert any_speech.begin == count * units
    assert any_speech.vocab_size == any_speech.end + 1 == any_speech.begin + 2


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 16_000, 16_001])
def test_encode_and_decode_shapes(any_speech, samples):
    tokens = any_speech.encode(melody(9, 2)[:samples])
    count = any_speech.codebooks.shape[0]
    vectors = -(-samples // round(16_000 / any_speech.rate))
    assert tokens.dtype == torch.int64
    assert tokens.shape == (vectors * count + 2,)
    assert tokens[0] == any_speech.begin
    assert tokens[-1] == any_speech.end
    assert tokens[1:-1].max() < any_speech.begin
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
    coarse, refined = fit(units=4, refine_steps=0), fit(units=4, refine_steps=100)
    assert torch.equal(coarse.codebooks, refined.codebooks)
    restored = dequantize(coarse.encode(melody(12)), coarse.codebooks).reshape(-1, 80)
    before = np.abs(restored.numpy() - clip).mean()
    after = np.abs(refined.refiner(restored).numpy() - clip).mean()
    assert after < 0.95 * before


def test_fit_is_deterministic_and_leaves_the_random_state(any_speech):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = fit(rate=any_speech.rate, codebooks=any_speech.codebooks.shape[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.codebooks, any_speech.codebooks)
    tokens = any_speech.encode(melody(10))
    assert np.array_equal(again.decode(tokens), any_speech.decode(tokens))
    assert not torch.equal(fit(seed=1, rate=any_speech.rate).codebooks[0], any_speech.codebooks[0])


def test_fit_works_without_autograd():
    with torch.no_grad():
        assert not any(p.requires_grad for p in fit().refiner.parameters())


def test_every_form_of_audio_is_the_same(speech, tmp_path):
    clip = melody(10)
    tokens = speech.encode(clip)
    assert torch.equal(speech.encode(torch.from_numpy(clip)), tokens)
    assert torch.equal(speech.encode(torch.from_numpy(clip).requires_grad_()), tokens)
    assert torch.equal(speech.encode(clip.astype(np.float64)), tokens)
    assert torch.equal(speech.encode((clip, 16_000)), tokens)
    assert torch.equal(speech.encode((np.stack([2 * clip, 0 * clip], axis=1), 16_000)), tokens)
    soundfile.write(tmp_path / "mono.wav", clip, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([clip, clip], axis=1), 16_000, subtype="FLOAT")
    assert torch.equal(speech.encode(tmp_path / "mono.wav"), tokens)
    assert torch.equal(speech.encode(str(tmp_path / "stereo.wav")), tokens)


def test_other_rates_are_resampled(speech):
    time = np.arange(44_100) / 44_100
    high = speech.encode((0.3 * np.sin(2 * np.pi * 450 * time), 44_100))
    low = speech.encode(0.3 * np.sin(2 * np.pi * 450 * np.arange(16_000) / 16_000))
    assert len(high) == len(low)
    assert (high == low).float().mean() > 0.9


def test_silence(speech):
    assert len(speech.encode(np.zeros(16_000))) == 27
    with pytest.warns(UserWarning, match="distinct clusters"):
        silent = SpeechModality.fit([np.zeros(3200)], units=2, rate=50, refine_steps=1)
    assert np.abs(silent.decode(silent.encode(np.zeros(3200)))).max() < 0.01


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0), "empty"),
        (np.zeros((0, 2)), r"\(0, 2\)"),
        (np.array([0.0, np.nan]), "NaN"),
        (torch.tensor([0.0, float("inf")]), "infinite"),
        (np.zeros((100, 2)), r"\(100, 2\)"),
        ((np.zeros((2, 100)), 16_000), "transpose"),
        ((np.zeros((4, 2, 2)), 16_000), r"\(4, 2, 2\)"),
        (np.zeros(100, dtype=np.int16), "int16"),
        (np.float32(0), r"\(\)"),
        ((np.zeros(100), 0), "sample rate"),
        ((np.zeros(100),), "rate in Hz"),
    ],
)
def test_encode_refuses(speech, audio, message):
    with pytest.raises(ValueError, match=message):
        speech.encode(audio)
    with pytest.raises(ValueError, match=message):
        SpeechModality.fit([melody(0), audio], units=4)


def test_files_that_are_no_sound(speech, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.wav"):
        speech.encode(tmp_path / "gone.wav")
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.wav cannot be read as sound"):
        speech.encode(tmp_path / "text.wav")


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
        ({"units": 0}, "units=0"),
        ({"codebooks": 0}, "codebooks=0"),
        ({"rate": 0}, "rate=0"),
        ({"rate": 30}, "rate=30"),
        ({"rate": 100}, "rate=100"),
        ({"refine_steps": -1}, "refine_steps=-1"),
        ({"units": 10_000}, "units=10000"),
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
        vectors = int((tokens < any_speech.codebooks.shape[1]).sum())
        audio = any_speech.decode(tokens)
        assert audio.shape == (round(vectors * 16_000 / any_speech.rate),)
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


def test_residual_groups():
    books = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    ids = quantize(vectors, books)
    assert ids.shape == (21,)
    assert (ids.reshape(7, 3) // 4).tolist() == [[0, 1, 2]] * 7
    whole = dequantize(ids, books)
    parts = books[[0, 1, 2], ids.reshape(7, 3) % 4].sum(1)
    torch.testing.assert_close(whole, parts)
    broken = dequantize(torch.tensor([8, 5, 1, 9, 6, 9, 10, 2]), books)
    assert torch.equal(broken, torch.stack([books[0, 1] + books[1, 2] + books[2, 1], books[0, 2]]))
    assert dequantize(torch.tensor([8, 4, 12]), books).shape == (0, 5)


@pytest.mark.parametrize("refine_steps", [0, 2])
def test_save_and_load(refine_steps, tmp_path):
    speech = fit(codebooks=2, refine_steps=refine_steps)
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
    with pytest.raises((FileNotFoundError, ValueError), match=name.replace(".", r"\.")):
        SpeechModality.from_pretrained(tmp_path)


def test_load_refuses_another_modality(speech, tmp_path):
    speech.save_pretrained(tmp_path)
    (tmp_path / "modality.json").write_text(json.dumps({"format": 1, "type": "text"}))
    with pytest.raises(ValueError, match=r"modality\.json"):
        SpeechModality.from_pretrained(tmp_path)


def test_missing_librosa(speech, monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(_need, "import_module", fail)
    with pytest.raises(ImportError, match=r"librosa: pip install multitower\[speech\]"):
        speech.encode(melody(0))
