"""Noise in the input tokens of target segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import multitower as mt

TOKENS = st.lists(st.integers(3, 90), min_size=1, max_size=12)


@given(st.lists(TOKENS, min_size=1, max_size=4), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_only_what_is_predicted_inside_a_segment_changes(
    rows: list[list[int]], rate: float, packed: bool
) -> None:
    batch = mt.collate(
        [
            [
                mt.Segment("speech", [1, *row, 2], target=True),
                mt.Segment("text", [1, *row, 2]),
                mt.Segment("speech", [1, 91, 2]),
                mt.Segment("speech", [1, *row[::-1], 2], target=True),
            ]
            for row in rows
        ]
    )
    batch = mt.pack(batch) if packed else batch
    before = batch["streams"]["speech"]["tokens"].clone()
    noisy = mt.batch.corrupt_history(batch, {"speech": rate}, generator=torch.Generator().manual_seed(0))
    assert torch.equal(batch["streams"]["speech"]["tokens"], before)
    assert noisy["streams"]["text"] is batch["streams"]["text"]
    found = noisy["streams"]["speech"]["tokens"]
    fixed = (before < 3) | (before == 91)
    assert torch.equal(found[fixed], before[fixed])
    assert set(found[~fixed].tolist()) <= {token for row in rows for token in row}
    assert torch.equal(noisy["streams"]["speech"]["labels"], batch["streams"]["speech"]["labels"])
    if rate == 0:
        assert torch.equal(found, before)


def test_about_as_many_change_as_are_asked_for() -> None:
    tokens = torch.arange(2, 20_002)
    batch = mt.collate([[mt.Segment("speech", torch.cat([torch.tensor([0]), tokens]), target=True)]])
    found = mt.batch.corrupt_history(batch, {"speech": 0.15}, generator=torch.Generator().manual_seed(0))
    changed = (found["streams"]["speech"]["tokens"][0, 1:] != tokens).float().mean()
    assert changed == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_share_is_a_share(rate: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        mt.batch.corrupt_history(mt.collate([[mt.Segment("text", [1])]]), {"text": rate})


def test_batches_without_labels_are_refused() -> None:
    batch = mt.collate([[mt.Segment("text", [1, 2])]])
    del batch["streams"]["text"]["labels"]
    with pytest.raises(ValueError, match="has no labels"):
        mt.batch.corrupt_history(batch, {"text": 0.1})
