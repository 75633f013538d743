"""Batches without targets, or with targets that are likely mistakes."""

from __future__ import annotations

import logging

import pytest
import torch

import multitower as mt
from models import EXAMPLES, pair, segment
from multitower.base.logs import warn_once

NO_TARGET = [segment("speech", 5, 6, 7), segment("text", 9, 3)]


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    warn_once.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "multitower"]


def trained_once(*examples: list, times: int = 1) -> None:
    model = pair(train="all").train()
    for _ in range(times):
        model(**mt.collate(examples)).loss.backward()


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("segments", [NO_TARGET, [mt.Segment("text", [1], target=True)]])
def test_nothing_is_learnt_from_a_batch_without_a_target(segments: list, logits: bool) -> None:
    model = pair(train="all").train()
    for batch in (mt.collate([segments]), mt.pack(mt.collate([segments, segments]))):
        out = model(**batch, logits=logits)
        assert out.loss == 0
        with pytest.raises(ValueError, match=r"no token of this batch .* Segment\(..., target=True\)"):
            out.loss.backward()
    with pytest.raises(ValueError, match="no token of this batch"):
        sum(model(**batch, logits=logits).losses.values()).backward()


def test_a_batch_without_a_target_is_scored_and_may_have_a_loss_of_its_own() -> None:
    model, batch = pair(train="all").train(), mt.collate([NO_TARGET])
    model(**batch).logits["speech"].square().mean().backward()
    with torch.no_grad():
        assert model(**batch).loss == 0
    model.eval()(**batch).loss.backward()


def test_one_target_in_a_batch_is_enough() -> None:
    trained_once(NO_TARGET, EXAMPLES[0])


def test_segments_without_begin_or_end_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    texts = [[mt.Segment("text", tokens, target=True)] for tokens in ([5, 6, 7], [8, 9])]
    trained_once(*texts, times=2)
    (message,) = said(caplog)
    assert "tower 'text' begin with its token 1 and end with its token 2" in message
    assert "encode adds both" in message
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("rows", "what"), [([[5, 6, 2], [8, 2]], "begin with"), ([[1, 6, 5], [1, 8]], "end with its token 2,")]
)
def test_only_what_is_left_out_is_noted(
    caplog: pytest.LogCaptureFixture, rows: list[list[int]], what: str
) -> None:
    trained_once([mt.Segment("text", tokens, target=True) for tokens in rows])
    (message,) = said(caplog)
    assert what in message
    assert ("begin" in message.partition("which")[0]) == ("begin" in what)


def test_segments_that_begin_and_end_alike_are_right(caplog: pytest.LogCaptureFixture) -> None:
    trained_once(*EXAMPLES)
    of_a_modality = [[mt.Segment("text", [12, *tokens, 13], target=True)] for tokens in ([5], [6, 7])]
    trained_once(*of_a_modality)
    given = [[mt.Segment("text", tokens), segment("speech", 5, target=True)] for tokens in ([5, 6], [7])]
    trained_once(*given)
    assert not said(caplog)


def test_what_the_history_is_corrupted_to_is_no_end(caplog: pytest.LogCaptureFixture) -> None:
    model = pair(train="all").train()
    model(**mt.batch.corrupt_history(mt.collate(EXAMPLES), {"text": 1.0, "speech": 1.0})).loss.backward()
    assert not said(caplog)


def test_how_much_is_said_is_chosen_by_level(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [[mt.Segment("text", tokens, target=True)] for tokens in ([5, 6, 7], [8, 9])]
    try:
        mt.set_verbosity("error")
        trained_once(*texts)
        assert not said(caplog)
        with pytest.raises(ValueError, match="Unknown level"):
            mt.set_verbosity("loud")
    finally:
        mt.set_verbosity(logging.WARNING)


def test_each_tower_with_labels_has_a_count() -> None:
    model = pair(train="all").train()
    batch = mt.collate([[segment("text", 5, 6, target=True)]])
    counts = mt.batch.count_targets([batch])
    torch.testing.assert_close(
        model(**batch, num_items_in_batch=counts, run_all=True).loss, model(**batch).loss
    )
    with pytest.raises(ValueError, match="no number for 'text', which has labels"):
        model(**batch, num_items_in_batch={"speech": 2})
    with pytest.raises(TypeError, match="a number for each tower"):
        model(**batch, num_items_in_batch=2)
