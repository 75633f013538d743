"""Streams give the tokens of the whole clip, however it is cut, as soon as they are final."""

import numpy as np
import pytest
import torch

pytest.importorskip("librosa", reason="speech needs the speech extra")
pytest.importorskip("soundfile", reason="speech needs the speech extra")
pytest.importorskip("sklearn", reason="speech needs the speech extra")
strategies = pytest.importorskip("hypothesis.strategies", reason="needs the testing extra")

from hypothesis import given, settings

from melodies import fit, melody, one_thread  # noqa: F401  # a fixture
from multitower_speech import SpeechModality

CLIP = melody(7, 8)


def levels(codebooks=1, stack=1):
    """Return a modality whose units are levels of loudness."""
    books = torch.linspace(-9, 3, 16)[:, None].expand(codebooks, 16, 80 * stack)
    return SpeechModality(books / 10 ** torch.arange(codebooks)[:, None, None])


@pytest.fixture(scope="module", params=["flattened", "delayed"])
def speech(request):
    return fit(rate=50 / 3, codebooks=2, pattern=request.param, refine_steps=0)


def joined(stream):
    return torch.cat(list(stream))


@pytest.mark.parametrize(
    ("size", "length"),
    [(1, 1), (1, 960), (320, 959), (320, 61_441), (1000, 31_000), (16_000, 128_000), (10**6, 128_000)],
)
def test_a_stream_is_the_whole(speech, size, length):
    clip = CLIP[:length]
    chunks = (clip[start : start + size] for start in range(0, length, size))
    assert torch.equal(joined(speech.encode_stream(chunks)), speech.encode(clip))


@settings(max_examples=15, deadline=None)
@given(
    cuts=strategies.lists(strategies.integers(0, 70_000), max_size=12),
    rate=strategies.sampled_from([8_000, 16_000, 44_100]),
    channels=strategies.sampled_from([1, 2]),
)
def test_any_cuts_and_rates(cuts, rate, channels):
    speech = levels(codebooks=2, stack=2)
    whole = np.stack([CLIP[:70_000]] * channels, axis=1)
    chunks = np.split(whole, sorted(cuts))
    assert torch.equal(joined(speech.encode_stream(chunks, rate)), speech.encode((whole, rate)))


def test_tokens_come_as_soon_as_they_are_certain():
    speech = levels()
    units = -1

    def microphone():
        for start in range(0, 64_000, 800):
            if start:
                assert units == (start - 352) // 320  # all units that ended 22 ms ago
            yield CLIP[start : start + 800]

    for tokens in speech.encode_stream(microphone()):
        units += len(tokens)
    assert units - 1 == 200


def test_a_change_to_what_comes_later_changes_no_token_that_is_out():
    speech = levels()
    first, second = (
        joined(speech.encode_stream([CLIP[:20_000], rest])) for rest in (3 * CLIP[20_000:], 0 * CLIP)
    )
    certain = 1 + (20_000 - 352) // 320
    assert torch.equal(first[:certain], second[:certain])
    assert first[certain] != second[certain]


def test_streams_that_are_refused(speech):
    with pytest.raises(TypeError, match="single ndarray"):
        speech.encode_stream(CLIP)
    with pytest.raises(TypeError, match="a part that is a float"):
        joined(speech.encode_stream([0.5]))
    with pytest.raises(ValueError, match="the stream is empty"):
        joined(speech.encode_stream([]))
    with pytest.raises(ValueError, match="the stream is empty"):
        joined(speech.encode_stream([CLIP[:0]]))
    with pytest.raises(ValueError, match="NaN"):
        joined(speech.encode_stream([CLIP, np.array([np.nan])]))
    with pytest.raises(ValueError, match="sample rate"):
        joined(speech.encode_stream([CLIP], 0))
