"""A model learns to choose the next modality by its end token, and a policy follows its choice."""

from __future__ import annotations

import pytest
import torch

import multitower as mt
from multitower.testing import tiny_tower

BEGIN, DONE, SAY = 1, 2, 3
WRITE_IT, SAY_IT = 4, 5
WORDS = range(6, 64)
PAIRS = [(task, word) for task in (WRITE_IT, SAY_IT) for word in WORDS]
HELD_OUT = [(task, word) for task, word in PAIRS if (word + task) % 5 == 0]


def heard(task: int, word: int) -> mt.Segment:
    return mt.Segment("ears", [BEGIN, task, word, DONE])


def answer(task: int, word: int) -> list[mt.Segment]:
    """Return the word as text and, if asked for, as voice, which the end token of the text announces."""
    written = mt.Segment("text", [BEGIN, word, SAY if task == SAY_IT else DONE], target=True)
    return [written, mt.Segment("voice", [BEGIN, word, word, DONE], target=True)][: 1 + (task == SAY_IT)]


def follow_the_end(row: list[mt.Segment]) -> str | None:
    if row[-1].tower == "ears":
        return "text"
    return "voice" if row[-1].tower == "text" and row[-1].tokens[-1] == SAY else None


@pytest.fixture(scope="module")
def trained() -> mt.FusedModel:
    graph = mt.FusionGraph()
    graph.add_tower("ears", tiny_tower(0, width=32, vocab_size=64))
    for seed, name in enumerate(("text", "voice"), 1):
        tower = tiny_tower(seed, width=32, vocab_size=64)
        tower.end = (DONE, SAY) if name == "text" else (DONE,)
        graph.add_tower(name, tower, train="all")
        graph.add_link("ears", name, interleave=1)
    torch.manual_seed(0)
    model = graph.compile()
    batch = mt.collate([[heard(*pair), *answer(*pair)] for pair in PAIRS if pair not in HELD_OUT])
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=3e-3), weight_decay=0.01)
    for _ in range(200):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_what_the_model_chooses_follows_from_what_it_was_given(trained: mt.FusedModel) -> None:
    rows = trained.generate([[heard(*pair)] for pair in HELD_OUT], follow_the_end, max_new_tokens=5)
    chosen = [[segment.tower for segment in row] for row in rows]
    assert {len(row) for row in chosen} == {1, 2}
    assert chosen == [[segment.tower for segment in answer(*pair)] for pair in HELD_OUT]


def test_rows_that_go_different_ways_become_what_each_becomes_alone(trained: mt.FusedModel) -> None:
    given = [[heard(task, word)] for task in (SAY_IT, WRITE_IT) for word in (6, 8)]
    together = trained.generate(given, follow_the_end, max_new_tokens=5)
    alone = [trained.generate([row], follow_the_end, max_new_tokens=5)[0] for row in given]
    as_lists = [
        [[(segment.tower, torch.as_tensor(segment.tokens).tolist()) for segment in row] for row in rows]
        for rows in (together, alone)
    ]
    assert as_lists[0] == as_lists[1]
    assert [len(row) for row in together] == [2, 2, 1, 1]
    assert as_lists[0][0] == [("text", [BEGIN, 6, SAY]), ("voice", [BEGIN, 6, 6, DONE])]
