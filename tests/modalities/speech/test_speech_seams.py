"""Waveforms decoded in pieces have the length and quality of the whole, and no clicks."""

import numpy as np
import pytest
import torch

pytest.importorskip("librosa", reason="speech needs the speech extra")
pytest.importorskip("soundfile", reason="speech needs the speech extra")
pytest.importorskip("sklearn", reason="speech needs the speech extra")
strategies = pytest.importorskip("hypothesis.strategies", reason="needs the testing extra")

from hypothesis import given, settings

from melodies import fit, melody, one_thread  # noqa: F401  # a fixture
from multitower_speech.frontend import log_mel
from multitower_speech.layout import Layout
from multitower_speech.seams import SEAM, SHIFT, sound_in_pieces

RATE = 16_000


def steepest(samples):
    return np.abs(np.diff(samples, 2)).max()


def sine(codes):
    """Return a tone whose phase differs from call to call, like that of Griffin-Lim."""
    return np.sin(codes[0, 0].item() + np.arange(len(codes) * 320) / 20).astype(np.float32)


@pytest.mark.parametrize("sizes", [[1] * 200, [200], [13, 187], [199, 1], [25] * 8, [33] * 6 + [2]])
def test_a_tone_goes_on_where_pieces_meet(sizes):
    parts = torch.arange(200)[:, None].split(sizes)
    pieces = list(sound_in_pieces(parts, sine, rate=50, sample_rate=RATE))
    joined = np.concatenate(pieces)
    assert len(pieces) == 8
    assert abs(len(joined) - 200 * 320) <= SHIFT * RATE
    assert steepest(joined) < 1.5 * steepest(sine(torch.zeros(200, 1)))


def test_a_cut_without_a_seam_would_click():
    pieces = [sine(part) for part in torch.arange(200)[:, None].split(25)]
    assert steepest(np.concatenate(pieces)) > 10 * steepest(pieces[0])


def test_sound_that_depends_on_what_is_near_is_that_of_the_whole():
    rng = np.random.default_rng(0)
    units = rng.normal(size=(8, 320)).astype(np.float32)

    def sound(codes):
        return units[codes[:, 0].numpy()].reshape(-1)

    codes = torch.from_numpy(rng.integers(0, 8, (130, 1)))
    pieces = list(sound_in_pieces(codes.split(1), sound, rate=50, sample_rate=RATE))
    np.testing.assert_allclose(np.concatenate(pieces), sound(codes), atol=1e-5)


def test_the_first_piece_does_not_wait_for_the_last_unit():
    asked = iter(torch.zeros(1000, 1, dtype=torch.long).split(1))
    next(sound_in_pieces(asked, sine, rate=50, sample_rate=RATE))
    assert sum(1 for _ in asked) > 950


@pytest.mark.parametrize("codebooks", [1, 2])
def test_speech_in_pieces_is_as_near_to_the_original(codebooks):
    speech, clip = fit(rate=25, codebooks=codebooks, refine_steps=50), melody(5, 4)
    tokens = speech.encode(clip)
    whole, pieces = speech.decode(tokens), list(speech.decode_stream(tokens.split(1)))
    joined = np.concatenate(pieces)
    assert len(pieces) == 9
    assert abs(len(joined) - len(whole)) <= SHIFT * RATE
    assert steepest(joined) < 1.2 * steepest(whole)
    original = log_mel([clip])[4:-4]
    errors = [np.abs(log_mel([each])[4:][: len(original)] - original).mean() for each in (whole, joined)]
    assert errors[1] < 1.1 * errors[0]


def test_no_unit_gives_no_sound():
    speech = fit(rate=25, refine_steps=0)
    assert list(speech.decode_stream([])) == []
    assert list(speech.decode_stream([torch.tensor([speech.begin, speech.end])])) == []
    (piece,) = speech.decode_stream(torch.tensor([speech.begin, 3, speech.end]).split(1))
    assert np.array_equal(piece, speech.decode(torch.tensor([3])))
    assert len(piece) > SEAM * RATE


@settings(max_examples=60, deadline=None)
@given(
    tokens=strategies.lists(strategies.integers(0, 34), max_size=40),
    cuts=strategies.lists(strategies.integers(0, 40), max_size=6),
    pattern=strategies.sampled_from(["flattened", "delayed"]),
    every=strategies.integers(1, 9),
)
def test_units_of_any_tokens_in_any_pieces(tokens, cuts, pattern, every):
    layout = Layout(3, 10, pattern)
    whole = torch.tensor(tokens, dtype=torch.long)
    parts = list(layout.unweave_stream(torch.tensor_split(whole, sorted(cuts)), every))
    assert all(len(part) for part in parts)
    assert torch.equal(torch.cat([layout.unweave(whole)[:0], *parts]), layout.unweave(whole))
