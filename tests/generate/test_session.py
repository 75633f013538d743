"""Sessions: each turn equals a run over the whole conversation, and no token runs twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import multitower as mt
from decoding import text_model
from models import BEGIN, causal_lm, pair, segment
from multitower.testing import check_session
from sessions import FAMILIES, counted, fusion, lists

GIVEN = [
    [segment("speech", 5, 6, 7, 8), (segment("text", 4, 5), segment("speech", 9, 3, 2)), segment("text", 4)],
    [segment("text", 4, 5), segment("speech", 9, 3)],
    [segment("text", 4)],
]
TURNS = [
    [[segment("speech", 5, 6, 7, 8)], [segment("text", 4, 5), segment("speech", 9, 3)], []],
    [[segment("speech", 9)], [], [segment("text", 4)]],
    [[(segment("text", 4, 5), segment("speech", 9, 3, 2))], [segment("speech", 3)], [segment("speech", 6)]],
]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow if kind in ("gpt2", "mistral") else ()) for kind in FAMILIES],
)
def test_logits_of_every_turn_are_those_of_a_forward(kind: str) -> None:
    options: Any = {"position": "segment"} if kind == "llama" else {"position": "rotary", "window": 4}
    check_session(fusion(kind, **options), GIVEN)


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        *(("llama", output) for output in (["text"], ["text", "speech"], ["text", "text"])),
        *((kind, [("text", "speech")]) for kind in ("plain", "llama", "mistral")),
    ],
)
def test_tokens_of_every_turn_are_those_of_the_whole_history(kind: str, output: list) -> None:
    model = fusion(kind, position="rotary")
    session = model.session(rows=3)
    for turn in TURNS:
        session.append(turn)
        expected = model.generate(session.history, output, max_new_tokens=5)
        assert lists(session.generate(output, max_new_tokens=5)) == lists(expected)


def test_a_turn_runs_its_own_tokens_alone() -> None:
    model = fusion("llama")
    model.session().generate(["text"], max_new_tokens=1)  # runs one-time checks
    model.session().generate(["speech"], max_new_tokens=1)
    ran, session, totals = counted(model), model.session(), []
    for _ in range(4):
        ran.clear()
        session.append([segment("speech", 5, 6, 7), segment("text", 4)])
        session.generate(["text", "speech"], max_new_tokens=4, eos_token_id=None)
        totals.append(dict(ran))
    layers = {("text", 1), ("text", 2), *(("speech", place) for place in range(1, 5))}
    # Given tokens, the begin token and decoded ones, of which the last runs only when it is first read.
    first = {key: 3 + 5 if key[0] == "text" else 5 + 4 for key in layers}
    assert totals[0] == first
    later = {key: 3 + 5 if key[0] == "text" else 5 + 5 for key in layers}
    assert totals[1:] == [later] * 3


def test_several_outputs_of_one_call_run_nothing_twice() -> None:
    model = fusion("llama")
    model.generate([[]], ["text", "speech", "text"], max_new_tokens=1)
    ran = counted(model)
    given = [segment("speech", 5, 6, 7), segment("text", 4)]
    model.generate([given], ["text", "speech", "text"], max_new_tokens=4, eos_token_id=None)
    assert {ran["text", place] for place in (1, 2)} == {3 + 5 + 4}
    assert {ran["speech", place] for place in range(1, 5)} == {5 + 5}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_rows_of_unlike_length_go_on_without_running_a_token_twice(kind: str) -> None:
    model = fusion(kind)
    session, options = model.session(rows=2), {"max_new_tokens": 3, "eos_token_id": None}
    session.append([[segment("text", 5, 6, 7)], [segment("speech", 5, 6)]])
    session.generate(["text"], **options)
    ran = counted(model)
    session.generate(["text"], continue_segment=True, **options)
    assert ran == {("text", 1): 3, ("text", 2): 3}
    (one, other), options["max_new_tokens"] = session.history, 6
    given = [[segment("text", 5, 6, 7)], [segment("speech", 5, 6)]]
    for row, (whole,) in zip((one, other), model.generate(given, ["text"], **options), strict=True):
        pieces = [torch.as_tensor(each.tokens) for each in row[1:]]
        assert torch.equal(torch.cat(pieces), whole.tokens)


def test_layers_that_nothing_reads_do_not_run_for_a_tower_that_is_no_output() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("llama", depth=4, vocab_size=14))
    graph.add_tower("text", causal_lm("llama"))
    graph.add_link("speech", "text", taps=[(2, 1)])
    model = graph.compile().eval()
    session = model.session(outputs=["text"])
    session.append(segment("speech", 5, 6))  # runs one-time checks, too
    ran = counted(model)
    for _ in range(2):
        session.append(segment("speech", 5, 6))
    assert ran == {("speech", 1): 8, ("speech", 2): 8}
    for output in (["speech"], lambda row: "speech"):
        with pytest.raises(ValueError, match="'speech' is not among the outputs of this session"):
            session.generate(output)


def test_pieces_of_a_segment_are_the_segment() -> None:
    model = fusion("llama", position="rotary")
    whole, pieces = model.session(), model.session()
    whole.append(mt.Segment("speech", [BEGIN, 5, 6, 7, 2]))
    for piece in ([BEGIN, 5], [6], [7, 2]):
        pieces.append(mt.Segment("speech", piece))
    one, other = (each.generate(["text"], max_new_tokens=5) for each in (whole, pieces))
    assert lists(one) == lists(other)


def test_forks_go_on_apart_and_marks_lead_back() -> None:
    model = fusion("llama")
    session = model.session(rows=2)
    session.append(segment("speech", 5, 6, 7))
    mark = session.mark()
    expected = lists(model.generate(session.history, ["text"], max_new_tokens=5))
    fork = session.fork()
    fork.append(segment("speech", 9, 9))
    fork.generate(["text", "speech"], max_new_tokens=5)
    assert [len(row) for row in session.history] == [1, 1]
    session.append([[segment("text", 8)], []])
    later = session.mark()
    session.rollback(mark)
    assert lists(session.generate(["text"], max_new_tokens=5)) == expected
    fork.rollback(mark)
    assert lists(fork.generate(["text"], max_new_tokens=5)) == expected
    with pytest.raises(ValueError, match="not in the session's past"):
        session.rollback(later)


def test_forks_share_what_is_kept() -> None:
    session = fusion("llama").session()
    session.append(segment("text", 5, 6, 7))
    (one,), (other,) = session._rows, session.fork()._rows
    assert one is other
    assert one.of("text").cached == 5


def test_going_back_runs_nothing_and_keeps_what_was_before() -> None:
    model = fusion("llama")
    session = model.session()
    session.append(segment("text", 5, 6, 7))
    mark = session.mark()
    session.generate(["text"], max_new_tokens=5)
    ran = counted(model)
    session.rollback(mark)
    assert not ran
    session.append(segment("text", 8))
    assert ran == {("text", 1): 3, ("text", 2): 3}


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "top_k": 5},
        {"no_repeat_ngram_size": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_mean_in_every_turn_what_they_mean_at_once(options: dict) -> None:
    model = fusion("llama")
    session = model.session()
    how = {"max_new_tokens": 5, **options}
    for _ in range(3):
        session.append([segment("speech", 5, 6, 7), segment("text", 4)])
        torch.manual_seed(3)
        expected = lists(model.generate(session.history, ["text"], **how))
        torch.manual_seed(3)
        assert lists(session.generate(["text"], **how)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": "itself"},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_options_for_speed_change_nothing(family: str, options: dict) -> None:
    model = pair(text_model(family), causal_lm("llama", depth=4, vocab_size=14, seed=1), gates=True)
    if "assistant_model" in options:
        options = {"assistant_model": text_model(family)}
    session, plainly = model.session(), model.session()
    for _ in range(3):
        session.append([segment("speech", 5, 6, 7), segment("text", 4, 4, 4)])
        plainly.append([segment("speech", 5, 6, 7), segment("text", 4, 4, 4)])
        expected = lists(model.generate(plainly.history, ["text"], max_new_tokens=5))
        assert lists(plainly.generate(["text"], max_new_tokens=5)) == expected
        assert lists(session.generate(["text"], max_new_tokens=5, **options)) == expected


def test_a_policy_chooses_row_by_row() -> None:
    model = fusion("llama")
    session = model.session(rows=3)

    def answer(row: list) -> str | None:
        last = row[-1].tower if row else "speech"
        return None if len(row) % 3 == 0 and row else {"speech": "text", "text": "speech"}[last]

    for _ in range(2):
        session.append([[segment("speech", 5, 6)], [segment("text", 4)], [segment("speech", 7)]])
        expected = lists(model.generate(session.history, answer, max_new_tokens=4))
        assert lists(session.generate(answer, max_new_tokens=4)) == expected


def test_a_tower_without_keys_and_values_runs_from_its_first_token() -> None:
    model = pair(causal_lm("mamba"), causal_lm("llama", depth=4, vocab_size=14), gates=True)
    assert not model.tower("text").resumes
    check_session(model, GIVEN[:2])


def test_the_model_keeps_its_mode_and_its_towers_nothing() -> None:
    model = fusion("llama").train()
    session = model.session()
    session.append(segment("speech", 5))
    assert model.training
    assert repr(session) == "Session(speech: [3] tokens, text: [0] tokens)"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([[segment("text", 3)]], "1 lists of segments for the 2 rows"),
        (segment("music", 3), "no tower 'music'"),
        (segment("text", 3, target=True), "contains a target"),
        (mt.Segment("text", [99]), "vocabulary of 20"),
        (mt.Segment("text", []), "one or more ids"),
        ("text", "must be a list of multitower.Segment"),
    ],
)
def test_what_cannot_be_appended_leaves_the_session_as_it_was(entries: Any, message: str) -> None:
    session = fusion("llama").session(rows=2)
    session.append(segment("text", 3))
    with pytest.raises(ValueError, match=message):
        session.append(entries)
    assert [len(row) for row in session.history] == [1, 1]


def test_a_row_that_is_longer_than_a_table_of_positions_is_refused() -> None:
    session = pair(causal_lm("gpt2", config={"n_positions": 12}), gates=True).session()
    session.append(segment("text", 3, 4, 5, 6))
    with pytest.raises(ValueError, match="row 0 of the batch has 13 tokens of tower 'text'"):
        session.append(segment("text", 3, 4, 5, 6, 7))
    assert len(session.history[0]) == 1


def test_bad_sessions_teach() -> None:
    model = fusion("llama")
    with pytest.raises(ValueError, match="one or more rows"):
        model.session(rows=0)
    with pytest.raises(ValueError, match="no tower 'music'"):
        model.session(outputs=["music"])


@pytest.mark.parametrize("place", ["call", "config by tower", "tower"])
def test_a_row_continues_in_one_way(place: str) -> None:
    model = pair(copy.deepcopy(causal_lm("llama", seed=5)))
    session, two = model.session(), {"num_return_sequences": 2, "do_sample": True}
    options: dict[str, Any] = {"call": two}.get(place, {})
    if place == "tower":
        model.unimodal("text").generation_config.update(**two)
    elif place == "config by tower":
        options = {"generation_config": {"text": transformers.GenerationConfig(**two)}}
    session.append(GIVEN[0])
    for output in (["text"], lambda row: "text"):
        with pytest.raises(ValueError, match=r"decode in several forks|needs a single output tower"):
            session.generate(output, **options)
    assert len(session.history) == 1
    session.generate(["text"], num_return_sequences=1, max_new_tokens=2)


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_come_and_go(kind: str) -> None:
    model = fusion(kind)
    early, late = model.session(), model.session()
    early.append(GIVEN[0])
    first = lists(early.generate(["text"], max_new_tokens=2, do_sample=False))
    late.append(GIVEN[1])
    joined = early.join(late)
    both = lists(joined.generate(["text"], max_new_tokens=3, do_sample=False, continue_segment=True))
    early, late = joined.split()
    assert [len(each.history) for each in (early, late, joined)] == [1, 1, 2]
    alone = model.session()
    alone.append(GIVEN[0])
    assert lists(alone.generate(["text"], max_new_tokens=2, do_sample=False)) == first
    go_on = {"max_new_tokens": 3, "do_sample": False, "continue_segment": True}
    assert lists(alone.generate(["text"], **go_on)) == both[:1]
    assert lists(model.generate([GIVEN[1]], ["text"], max_new_tokens=3, do_sample=False)) == both[1:]
    expected = lists(model.generate(late.history, ["speech"], max_new_tokens=3, do_sample=False))
    assert lists(late.generate(["speech"], max_new_tokens=3, do_sample=False)) == expected


def test_sessions_of_unlike_models_are_not_joined() -> None:
    session = fusion("plain").session()
    with pytest.raises(ValueError, match="of one model"):
        session.join(fusion("plain").session())
    with pytest.raises(ValueError, match="have the same outputs, not"):
        session.join(session.model.session(outputs=["text"]))


def test_a_single_output_is_refused() -> None:
    with pytest.raises(TypeError, match=r"outputs=\['text'\]"):
        pair().session(outputs="text")


def test_a_session_begun_under_autocast_goes_on_without() -> None:
    model = pair(gates=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        session = model.session(outputs=["text", "speech"])
        session.append(segment("speech", 5, 6))
    session.generate(["text"], max_new_tokens=3)
    assert len(session.join(model.session(outputs=["speech", "text"])).history) == 2
