"""Noise in training batches changes only the tokens that it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import multitower as mt
from models import BEGIN, END
from multitower.batch import corrupt_history, corrupt_sources

TOKENS = st.lists(st.integers(3, 13), min_size=1, max_size=8)


@st.composite
def batches(draw: st.DrawFn) -> mt.batch.Batch:
    segment = st.builds(
        lambda tower, tokens, target: mt.Segment(tower, [BEGIN, *tokens, END], target=target),
        st.sampled_from(["speech", "text"]),
        TOKENS,
        st.booleans(),
    )
    rows = draw(st.lists(st.lists(segment, min_size=1, max_size=4), min_size=1, max_size=4))
    batch = mt.collate(rows)
    return mt.pack(batch) if draw(st.booleans()) else batch


def learnt(stream: dict) -> torch.Tensor:
    """Return the mask of tokens with a label."""
    return stream["labels"] != -100 if "labels" in stream else torch.zeros_like(stream["mask"])


@settings(max_examples=60)
@given(batches(), st.sampled_from([0.0, 0.5, 1.0]))
def test_only_the_inside_of_what_is_given_changes(batch: mt.batch.Batch, rate: float) -> None:
    noise = torch.Generator().manual_seed(0)
    noisy = corrupt_sources(batch, {"speech": rate, "smell": 1.0}, generator=noise)
    for name, stream in noisy["streams"].items():
        before = batch["streams"][name]
        changed = stream["tokens"] != before["tokens"]
        assert not (changed & learnt(before)).any()
        assert not (changed & ~before["mask"]).any()
        assert not changed[before["tokens"] <= END].any()
        assert (stream["tokens"][changed] > END).all()
        assert all(stream[key] is before[key] for key in stream if key != "tokens")
        if name == "text" or not rate:
            assert not changed.any()


def test_the_padding_of_a_row_without_tokens_protects_none() -> None:
    given = mt.Segment("speech", [3, 0, 0, 0, 0, 5, 6, 4])
    batch = mt.collate([[given], [mt.Segment("text", [BEGIN, 5, END])]])
    noisy = corrupt_sources(batch, {"speech": 1.0}, generator=torch.Generator().manual_seed(1))
    row = noisy["streams"]["speech"]["tokens"][0].tolist()
    assert row[1:5] != [0] * 4
    assert (row[0], row[-1]) == (3, 4)


@settings(max_examples=60)
@given(batches())
def test_only_the_inside_of_what_is_learnt_changes(batch: mt.batch.Batch) -> None:
    rates = {name: 1.0 for name, stream in batch["streams"].items() if "labels" in stream}
    noisy = corrupt_history(batch, rates, generator=torch.Generator().manual_seed(0))
    for name, stream in noisy["streams"].items():
        before = batch["streams"][name]
        changed = stream["tokens"] != before["tokens"]
        assert not (changed & ~learnt(before)).any()
        assert not changed[before["tokens"] <= END].any()
        assert set(stream["tokens"].flatten().tolist()) <= set(before["tokens"].flatten().tolist())
        assert all(stream[key] is before[key] for key in stream if key != "tokens")


def test_the_share_is_that_asked_for() -> None:
    tokens = torch.randint(3, 500, (2000,), generator=torch.Generator().manual_seed(0))
    for target, corrupt in ((False, corrupt_sources), (True, corrupt_history)):
        batch = mt.collate([[mt.Segment("text", [BEGIN, *tokens.tolist(), END], target=target)]])
        noisy = corrupt(batch, {"text": 0.3}, generator=torch.Generator().manual_seed(1))
        changed = noisy["streams"]["text"]["tokens"] != batch["streams"]["text"]["tokens"]
        assert changed.float().mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("corrupt", [corrupt_history, corrupt_sources])
@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_that_is_none_is_refused(corrupt, rate: float) -> None:
    batch = mt.collate([[mt.Segment("text", [BEGIN, 5, END], target=True)]])
    with pytest.raises(ValueError, match=f"stream 'text': the share of tokens to replace is {rate}"):
        corrupt(batch, {"text": rate})


def test_history_needs_labels() -> None:
    batch = mt.collate([[mt.Segment("text", [BEGIN, 5, END])]])
    batch["streams"]["text"].pop("labels", None)
    with pytest.raises(ValueError, match="stream 'text' has no labels"):
        corrupt_history(batch, {"text": 0.5})


@pytest.mark.parametrize("corrupt", [corrupt_history, corrupt_sources])
def test_the_given_batch_stays(corrupt: Callable[..., mt.batch.Batch]) -> None:
    segment = [mt.Segment("text", [BEGIN, 5, 6, END]), mt.Segment("text", [BEGIN, 7, 8, END], target=True)]
    batch = mt.collate([segment])
    before = batch["streams"]["text"]["tokens"].clone()
    corrupt(batch, {"text": 1.0}, generator=torch.Generator().manual_seed(0))
    assert torch.equal(batch["streams"]["text"]["tokens"], before)


def test_noise_in_what_is_not_read_is_refused() -> None:
    batch = mt.collate([[mt.Segment("speech", [3, 5, 6, 4])]])
    batch["streams"]["speech"]["layer 1"] = torch.zeros(1, 4, 8)
    assert corrupt_sources(batch, {"speech": 0.0})
    with pytest.raises(ValueError, match="'speech' has kept states"):
        corrupt_sources(batch, {"speech": 0.5})
