from collections import Counter

import numpy as np
import pytest

pytest.importorskip("librosa", reason="the corpora need the speech extra")
pytest.importorskip("soundfile", reason="the corpora need the speech extra")

import soundfile

from phrases import number_phrases, sentences
from spoken_corpus import (
    SAMPLE_RATE,
    Utterance,
    clean_transcript,
    read_corpus,
    speak,
    split,
    write_corpus,
)

TONE = (np.round(np.sin(np.arange(4000) / 20) * 2**14) / 2**15).astype(np.float32)


def corpus(folder, metadata, sound="a.wav", rate=SAMPLE_RATE):
    (folder / "wavs").mkdir()
    soundfile.write(folder / "wavs" / sound, TONE, rate)
    (folder / "metadata.csv").write_text(metadata, encoding="utf-8")
    return folder


@pytest.mark.parametrize("draw", [number_phrases, sentences])
def test_phrases_are_distinct_clean_and_follow_from_the_seed(draw):
    phrases = draw(500, seed=0)
    assert len(set(phrases)) == 500
    assert phrases == draw(500, seed=0) != draw(500, seed=1)
    assert all(clean_transcript(phrase) == phrase for phrase in phrases)
    assert not set(phrases) & set(draw(500, seed=1, exclude=phrases))


def test_number_phrases_hold_every_length_well():
    lengths = Counter(len(phrase.split()) for phrase in number_phrases(2000, seed=0))
    assert lengths[1] == 10
    assert lengths[2] > 70
    assert min(lengths[length] for length in (3, 4, 5)) > 300


def test_sentences_are_short_and_their_vocabulary_is_a_few_hundred_words():
    drawn = [sentence.split() for sentence in sentences(2000, seed=0)]
    assert {len(words) for words in drawn} == set(range(3, 9))
    assert 200 < len({word for words in drawn for word in words}) < 400


def test_more_phrases_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr("phrases.LENGTH_SHARES", {1: 1.0})
    assert len(number_phrases(10, seed=0)) == 10
    with pytest.raises(ValueError, match=r"asked for 11 .* found 10"):
        number_phrases(11, seed=0)


def test_no_transcript_is_on_both_sides_of_a_split():
    utterances = [Utterance(word, TONE) for word in ["one", "two", "three", "one", "two", "four"]]
    train, held_out = split(utterances, held_out=2, seed=0)
    sides = [{one.transcript for one in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 2
    assert len(train) + len(held_out) == len(utterances)
    texts = [one.transcript for one in utterances]
    assert split(texts, held_out=2, seed=0)[1] == [one.transcript for one in held_out]


@pytest.mark.parametrize("held_out", [0, 3])
def test_a_split_leaves_something_on_each_side(held_out):
    with pytest.raises(ValueError, match="between 1 and 2"):
        split(["one", "two", "three"], held_out=held_out, seed=0)


def test_a_corpus_comes_back_from_disk_sound_for_sound(tmp_path):
    written = [Utterance("four two", TONE), Utterance("don't", -TONE)]
    folder = write_corpus(written, tmp_path / "corpus")
    back = read_corpus(folder, progress=False)
    assert [one.transcript for one in back] == ["four two", "don't"]
    for one, other in zip(written, back, strict=True):
        np.testing.assert_array_equal(one.waveform, other.waveform)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_killed_write_leaves_no_corpus_and_does_not_hinder_the_next(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("soundfile.write", killed)
        with pytest.raises(KeyboardInterrupt):
            write_corpus([Utterance("one", TONE)], tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    assert read_corpus(write_corpus([Utterance("one", TONE)], tmp_path / "corpus"), progress=False)


def test_a_corpus_is_never_overwritten_and_its_lines_stay_whole(tmp_path):
    folder = write_corpus([Utterance("one", TONE)], tmp_path / "corpus")
    with pytest.raises(ValueError, match="exists already"):
        write_corpus([Utterance("one", TONE)], folder)
    with pytest.raises(ValueError, match=r"utterance 0: pass its transcript 'a\|b'"):
        write_corpus([Utterance("a|b", TONE)], tmp_path / "other")


def test_a_foreign_corpus_is_resampled_mixed_down_and_cleaned(tmp_path):
    corpus(tmp_path, "\ufeffa|Room 4!|Room Four!\nb.flac|Hello, \u201cyou\u201d.\n", "a.wav", rate=8000)
    soundfile.write(tmp_path / "b.flac", np.stack([TONE, -TONE], axis=1), SAMPLE_RATE)
    first, second = read_corpus(tmp_path, progress=False)
    assert (first.transcript, second.transcript) == ("room four", "hello you")
    assert first.waveform.dtype == np.float32
    assert len(first.waveform) == 2 * len(TONE)
    assert np.abs(second.waveform).max() == 0
    assert len(read_corpus(tmp_path, limit=1, progress=False)) == 1


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("", "metadata.csv is empty"),
        ("a|one\nb|two\n", "line 2: no sound file 'b'"),
        ("a|one\n\n", "line 2: expected"),
        ("a|one|two|three\n", "line 1: expected"),
        ("a\n", "line 1: expected"),
        ("a|...\n", "line 1: the transcript of 'a' has no words"),
    ],
)
def test_a_bad_line_is_named(tmp_path, metadata, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_corpus(corpus(tmp_path, metadata), progress=False)


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"metadata.csv is missing"):
        read_corpus(tmp_path, progress=False)
    corpus(tmp_path, "a|one\nb|two\nc|three\n")
    (tmp_path / "b.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"line 2: cannot read .*b\.wav"):
        read_corpus(tmp_path, progress=False)
    soundfile.write(tmp_path / "b.wav", TONE[:0], SAMPLE_RATE)
    with pytest.raises(ValueError, match=r"line 2: .*b\.wav contains no sound"):
        read_corpus(tmp_path, progress=False)


def test_speech_follows_from_the_seed_and_is_trimmed():
    pytest.importorskip("hibari", reason="speaking needs the examples extra")
    words = ["four two", "four two", "anna found the golden bottle"]
    first, again, other = (speak(words, seed=seed, workers=seed + 1, progress=False) for seed in (0, 0, 1))
    assert [one.transcript for one in first] == words
    for one, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one.waveform, same.waveform)
        assert not np.array_equal(one.waveform, different.waveform)
        assert one.waveform.dtype == np.float32
        assert 0.1 < np.abs(one.waveform).max() <= 1
        assert 0.3 * SAMPLE_RATE < len(one.waveform) < 4 * SAMPLE_RATE
    assert not np.array_equal(first[0].waveform, first[1].waveform)
