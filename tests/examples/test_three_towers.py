"""Test the three-tower example, whose batches hold two towers, on tiny data."""

from __future__ import annotations

import argparse
from itertools import islice, permutations
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("librosa", reason="speech needs the speech extra")
pytest.importorskip("soundfile", reason="speech needs the speech extra")
pytest.importorskip("sklearn", reason="the digits need scikit-learn, from the speech extra")
pytest.importorskip("matplotlib", reason="the pictures need the draw extra")

import multitower as mt
from digit_images import SIDE, ImageJudge, handwriting, write
from image_strips import ImageModality
from models import causal_lm
from multitower.testing import check_modality
from phrases import DIGITS
from three_report import ROUTES, Answer, Phrase, Readers, Route, as_markdown, draw_answers, follow
from three_towers import PAIRED, Corpus, Size, changed, fit, largest_contributions, noise, training_batches

WORDS = ("four seven", "one", "zero two nine")


class Numbers:
    """A fake modality whose raw data are lists of token ids."""

    vocab_size, begin, end = 20, 0, 1

    def encode(self, raw: list[int]) -> torch.Tensor:
        return torch.tensor([self.begin, *raw, self.end])

    def decode(self, tokens: torch.Tensor) -> np.ndarray:
        return np.array([token for token in tokens.tolist() if token > self.end], dtype=np.float32)


class Ear:
    """A fake recogniser that hears a digit by a sound's length, and counts the sounds."""

    def __init__(self) -> None:
        self.sounds = 0

    def transcribe(self, sounds: list[np.ndarray]) -> list[str]:
        self.sounds += len(sounds)
        return [DIGITS[len(sound) % 10] for sound in sounds]


@pytest.fixture(scope="module")
def hands():
    return handwriting(seed=0)


@pytest.fixture
def image(hands) -> ImageModality:
    return ImageModality.fit(hands[0].pixels[:60], strips=18)


@pytest.fixture
def model() -> mt.FusedModel:
    graph = mt.FusionGraph()
    for seed, name in enumerate(("speech", "text", "image")):
        tower = causal_lm("llama", vocab_size=20, seed=seed)
        if name == "image":
            tower.config.bos_token_id, tower.config.eos_token_id = 18, 19
            tower.generation_config.bos_token_id, tower.generation_config.eos_token_id = 18, 19
        graph.add_tower(name, tower, train="none" if name == "text" else "all")
    for source, target in permutations(graph.towers, 2):
        graph.add_link(source, target, interleave=1, embeddings=True, position="rotary")
    return graph.compile()


@pytest.fixture
def corpus(image, hands) -> Corpus:
    modalities = {"speech": Numbers(), "text": Numbers(), "image": image}
    rng = np.random.default_rng(0)
    phrases = []
    for words in WORDS:
        numbers = [2 + DIGITS.index(word) for word in words.split()]
        raw = {"speech": numbers, "text": numbers, "image": write(words, hands[0], rng)}
        phrases.append(
            Phrase(words, raw, {name: each.encode(raw[name]) for name, each in modalities.items()})
        )
    pairs = {
        (one, other): [(phrase.tokens[one], phrase.tokens[other]) for phrase in phrases]
        for one, other in PAIRED
    }
    return Corpus(modalities, pairs, {}, phrases)


def test_images_survive_their_tokens_as_far_as_the_strips_allow(image, hands):
    tokens = image.encode(hands[0].pixels[0])
    assert tokens[0] == image.begin
    assert tokens[-1] == image.end
    assert int(tokens.max()) < image.vocab_size == 20
    restored = image.decode(tokens)
    assert restored.shape == (SIDE, SIDE)
    assert torch.equal(image.encode(restored), tokens)
    assert np.abs(restored - hands[0].pixels[0]).mean() < 0.2


def test_images_of_whatever_a_tower_emits_can_be_decoded(image):
    assert image.decode(torch.tensor([image.begin, image.end])).shape == (SIDE, 0)
    assert image.decode(torch.tensor([3, 99, image.end, 4])).shape == (SIDE, 4)


def test_images_keep_what_a_modality_promises(image, hands):
    check_modality(image, [image.decode(torch.tensor([])), *hands[0].pixels[:2]], round_trip="tokens")
    assert repr(image) == "ImageModality(strips=18, height=8, width=2)"


def test_unfit_images_are_refused(image):
    with pytest.raises(ValueError, match=r"give shape \(8, any width\)"):
        image.encode(np.zeros((9, 4)))
    with pytest.raises(TypeError, match="an array of int64: give a numpy array of floats"):
        image.encode(np.zeros((8, 4), int))
    with pytest.raises(ValueError, match="1 different strips"):
        ImageModality.fit([np.zeros((8, 4))], strips=2)
    with pytest.raises(ValueError, match="give float32"):
        ImageModality(torch.zeros(3))


def test_the_judge_reads_handwriting_that_it_has_not_seen(hands):
    _, judge, unseen = hands
    assert sum(len(hand.digits) for hand in hands) == 1797
    assert not {each.tobytes() for each in judge.pixels} & {each.tobytes() for each in unseen.pixels}
    reader, rng = ImageJudge(judge), np.random.default_rng(0)
    image = write("four seven", unseen, rng)
    assert image.shape == (SIDE, 2 * SIDE)
    assert reader.read(image[:, :0]) == ""
    assert len(reader.read(image[:, : SIDE + 1]).split()) == 2
    phrases = [word for word in DIGITS for _ in range(10)]
    right = [reader.read(write(word, unseen, rng)) == word for word in phrases]
    assert np.mean(right) > 0.95


def test_a_batch_leaves_the_tower_that_it_does_not_hold_as_it_was(model, corpus):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ran = []
    for name in model.towers:
        model.unimodal(name).model.layers[0].register_forward_hook(lambda *_, name=name: ran.append(name))
    speech, text = corpus.pairs["speech", "text"][0]
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    for _ in range(2):
        batch = mt.collate([[mt.Segment("text", text), mt.Segment("speech", speech, target=True)]])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert set(ran) == {"speech", "text"}
    untouched = {part for part, count in changed(model, before).items() if count.startswith("0 of")}
    assert {"towers/text", "towers/image"} < untouched
    assert {"links/speech->image", "links/image->speech", "links/text->image"} < untouched
    assert "towers/speech" not in untouched
    assert "links/text->speech" not in untouched


def test_pairs_with_text_train_all_but_the_links_without_pairs(model, corpus, capsys):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    options = argparse.Namespace(seed=0, device="cpu")
    run = fit(model, corpus, Size(batch=3, lr=1e-2, fusing=12), options)
    named = {name for entry in run.history for name in entry} - {"step"}
    assert named == {"speech→text", "text→speech", "text→image", "image→text"}
    untouched = {part for part, count in changed(model, before).items() if count.startswith("0 of")}
    assert untouched == {"towers/text", "links/speech->image", "links/image->speech"}
    last = run.contributions[-1]
    assert last.keys() - {"step"} == {f"{tap.link} {tap.key}" for tap in model.schedule.taps}
    largest = largest_contributions(last)
    assert list(largest) == list(model.links)
    assert largest.pop("speech->image") == largest.pop("image->speech") == 0
    assert all(largest.values())


def test_the_largest_contribution_of_a_link_is_that_of_one_tap():
    taps = {"step": 9, "a->b 0-0": 0.1, "a->b 1-1": 0.3, "a->b 2-2": 0.2, "b->a 0-0": 0.0}
    assert largest_contributions(taps) == {"a->b": 0.3, "b->a": 0.0}


def test_speech_and_images_are_noisy_where_they_are_continued(corpus):
    options = argparse.Namespace(seed=0, device="cpu")
    drawn = {}
    for share in (0.0, 1.0):
        size = Size(batch=3, noise=share)
        batches = islice(training_batches(corpus, size, options), 40)
        drawn[share] = [batch["streams"] for batch in map(noise(size, options), batches)]
    differ = set()
    for clean, noisy in zip(drawn[0.0], drawn[1.0], strict=True):
        for name in clean:
            assert torch.equal(clean[name]["labels"], noisy[name]["labels"])
            if not torch.equal(clean[name]["tokens"], noisy[name]["tokens"]):
                assert (clean[name]["labels"] >= 0).any()
                differ.add(name)
    assert differ == {"speech", "image"}


def test_routes_say_where_they_lead():
    titles = {(route.title, route.way): route.is_trained(PAIRED) for route in ROUTES}
    assert len(titles) == len(ROUTES) == 12
    assert [key for key, trained in titles.items() if trained] == [
        ("speech → text", "directly"),
        ("text → speech", "directly"),
        ("image → text", "directly"),
        ("text → image", "directly"),
    ]
    assert titles["speech → image", "through text"] is False
    assert titles["image → speech", "through text alone"] is False
    assert titles["speech + text → image", "directly"] is False


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.title} {route.way}")
def test_every_route_ends_in_what_its_judge_can_read(model, corpus, hands, route):
    readers = Readers(ImageJudge(hands[1]), Ear())
    corpus.modalities["text"].decode = lambda tokens: str(tokens.tolist())
    answer = follow(model, route, corpus.held_out, corpus.modalities, readers, limit=9, paired=PAIRED)
    assert len(answer.raws) == len(answer.read) == len(WORDS)
    assert all(isinstance(words, str) for words in answer.read)


def test_handing_on_the_text_alone_leaves_out_what_was_given(corpus, hands):
    asked = []

    class Recorder:
        def generate(self, rows, output, **options):
            asked.append(([[segment.tower for segment in row] for row in rows], output))
            return [[mt.Segment(name, [18, 3, 19]) for name in output] for _ in rows]

    readers = Readers(ImageJudge(hands[1]), Ear())
    for alone in (False, True):
        route = Route(("speech",), ("text", "image"), alone=alone)
        follow(Recorder(), route, corpus.held_out, corpus.modalities, readers, limit=9, paired=PAIRED)
    assert [(rows[0], output) for rows, output in asked] == [
        (["speech"], ["text", "image"]),
        (["speech"], ["text"]),
        (["text"], ["image"]),
    ]


def test_a_sound_is_heard_once(hands):
    ear = Ear()
    readers = Readers(ImageJudge(hands[1]), ear)
    sounds = [np.zeros(3, np.float32), np.zeros(4, np.float32), np.zeros(3, np.float32)]
    assert readers.read("speech", sounds) == ["three", "four", "three"]
    assert readers.read("speech", sounds[1:]) == ["four", "three"]
    assert ear.sounds == 2


def test_the_report_counts_and_draws(corpus, tmp_path: Path):
    pytest.importorskip("jiwer", reason="word error rates need the examples extra")
    phrases = [
        Phrase(each.words, {**each.raw, "speech": np.zeros(4000)}, each.tokens) for each in corpus.held_out
    ]
    images = [phrase.raw["image"] for phrase in phrases]
    answer = Answer("text → image", "directly", True, "image", images, ["four seven", "", "zero two six"])
    row = answer.row(phrases)
    errors = row["word errors %"]
    assert errors.rate == pytest.approx(100 * 2 / 6)
    assert 0 == errors.low < errors.rate < errors.high == 100
    lines = as_markdown([row], count=3).splitlines()
    assert lines[:3] == [
        "| held-out phrases | way      | pairs in training |       word errors % |",
        "| ---------------- | -------- | ----------------- | ------------------: |",
        "| text → image     | directly | yes               | 33.3 (0.0 to 100.0) |",
    ]
    assert "95 % interval over 3 phrases" in " ".join(lines[4:])
    draw_answers(phrases, [answer], tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 1000
