"""Text that is written while speech is still coming in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import multitower as mt
from letters import Letters, Tune
from models import BEGIN, END, causal_lm, pair, segment
from multitower.generate.session import Session
from multitower.pipeline.live import Agreement, AtEnd, AtPauses, LivePolicy, WaitK
from sessions import counted

SPEECH = torch.tensor([BEGIN, 5, 6, 7, 8, 9, 10, 4, 3, END])
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 3.0}
POLICIES = [
    Agreement(2, hold=0),
    Agreement(3, hold=1, ahead=4),
    WaitK(2),
    WaitK(1, 1.5),
    AtPauses(frozenset({7, 8}), 2),
    AtEnd(),
]


def piped(kind: str) -> mt.Pipeline:
    speech = causal_lm("llama", depth=4, vocab_size=14, seed=1)
    model = pair(gates=True) if kind == "plain" else pair(causal_lm(kind), speech, gates=True)
    return mt.Pipeline(model, {"speech": Tune(), "text": Letters()})


@pytest.mark.parametrize(
    ("kind", "policy"),
    [*(("llama", policy) for policy in POLICIES), ("plain", POLICIES[0]), ("gpt2", POLICIES[0])],
    ids=str,
)
def test_what_is_written_is_what_stands_in_the_end(kind: str, policy: LivePolicy) -> None:
    pipe = piped(kind)
    session = pipe.session()
    session.append(("text", "ab"))
    pieces = list(session.listen("speech", SPEECH.split(2), "text", policy, **OPTIONS))
    said = [each for each in session.history[0][1:] if each.tower == "speech"]
    wrote = [each for each in session.history[0][1:] if each.tower == "text"]
    assert torch.equal(torch.cat([each.tokens for each in said]), SPEECH)
    tokens = torch.cat([torch.as_tensor(each.tokens) for each in wrote])
    assert "".join(pieces) == pipe.modalities["text"].decode(tokens)
    assert 1 <= len(tokens) - 1 <= 8
    assert session.history[0][-1] is wrote[-1]


def test_at_the_end_it_is_the_text_of_the_whole() -> None:
    pipe = piped("llama")
    whole = pipe([segment("speech", *SPEECH[1:-1].tolist())], "text", **OPTIONS)
    assert list(pipe.session().listen("speech", SPEECH.split(3), "text", AtEnd(), **OPTIONS)) == [whole]


def test_after_each_piece_as_much_is_written_as_is_due() -> None:
    session = piped("llama").session()
    read = iter(SPEECH.split(1))
    pieces = session.listen("speech", read, "text", WaitK(3), suppress_tokens=[BEGIN, END], **OPTIONS)
    written = [(len(next(pieces)), sum(len(each.tokens) for each in session.history[0])) for _ in range(4)]
    assert written == [(1, 3), (1, 4), (1, 5), (1, 6)]


def test_at_a_pause_all_is_written_that_the_model_says_of_what_was_read() -> None:
    pipe, policy = piped("llama"), AtPauses(frozenset({7, 8, 9}), tokens=2)
    options = {**OPTIONS, "max_new_tokens": 3, "suppress_tokens": [BEGIN, END]}
    session = pipe.session()
    pieces = session.listen("speech", SPEECH.split(2), "text", policy, **options)
    ((expected,),) = pipe.model.generate([[mt.Segment("speech", SPEECH[:6])]], ["text"], **options)
    assert next(pieces) == pipe.modalities["text"].decode(expected.tokens)
    read = torch.cat([each.tokens for each in session.history[0] if each.tower == "speech"])
    assert torch.equal(read, SPEECH[:6])  # ends with 8 and 9, a pause; 6 and 7 are none


def test_a_policy_that_would_never_write_is_refused() -> None:
    for hold in (-1, 4, 5):
        with pytest.raises(ValueError, match="would write nothing before the end"):
            Agreement(hold=hold, ahead=4)


def test_a_first_token_is_what_was_decoded_of_what_was_read() -> None:
    pipe = piped("llama")
    options = {**OPTIONS, "suppress_tokens": [BEGIN, END]}
    first = next(pipe.session().listen("speech", SPEECH.split(2), "text", WaitK(3), **options))
    given = [mt.Segment("speech", SPEECH[:6])]
    ((expected,),) = pipe.model.generate([given], ["text"], **{**options, "max_new_tokens": 1})
    assert first == pipe.modalities["text"].decode(expected.tokens)


def test_speech_runs_once() -> None:
    pipe = piped("llama")
    session = pipe.session()
    list(session.fork().listen("speech", SPEECH.split(2), "text", **OPTIONS))  # runs one-time checks
    ran = counted(pipe.model)
    list(session.listen("speech", SPEECH.split(2), "text", **OPTIONS))
    assert {number for (name, _), number in ran.items() if name == "speech"} == {len(SPEECH)}


def test_tokens_on_which_the_last_answers_agree_are_settled() -> None:
    policy = Agreement(2, hold=0)
    assert policy.settled([[4]]) == 0
    assert policy.settled([[4, 5], [4, 5, 6]]) == 2
    assert policy.settled([[4, 5], [3, 5]]) == 0
    assert Agreement(3, hold=0).settled([[4, 5], [4, 5], [4, 6]]) == 1


def test_the_end_of_each_answer_is_held_back() -> None:
    policy = Agreement(2, hold=2)
    assert policy.settled([[4, 5, 6, 7], [4, 5, 6, 7]]) == 2
    assert policy.settled([[4, 5, 6], [4, 5, 6, 7, 8]]) == 1
    assert policy.settled([[4], [4]]) == 0


def test_no_more_is_decoded_than_a_piece_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = Session.generate

    def generate(self: Session, *args: Any, **options: Any) -> Any:
        asked.append(options["max_new_tokens"])
        return original(self, *args, **options)

    monkeypatch.setattr(Session, "generate", generate)
    policy = Agreement(2, 1, ahead=3)
    list(piped("plain").session().listen("speech", SPEECH.split(2), "text", policy, **OPTIONS))
    assert max(asked[:-1]) == 3
    assert len(asked) > 2


def test_several_rows_do_not_listen() -> None:
    with pytest.raises(ValueError, match="one row listens at a time, not 2"):
        next(piped("plain").session(rows=2).listen("speech", SPEECH.split(2), "text"))


class Halves(Letters):
    """A modality whose text ends in half a character until a further token comes."""

    def decode(self, tokens: torch.Tensor) -> str:
        return f"{super().decode(tokens)}\ufffd"


def test_what_is_left_at_the_end_is_written_too() -> None:
    pipe = piped("plain")
    whole = list(pipe.session().listen("speech", SPEECH.split(3), "text", AtEnd(), **OPTIONS))
    pipe.modalities["text"] = Halves()
    left = list(pipe.session().listen("speech", SPEECH.split(3), "text", AtEnd(), **OPTIONS))
    assert left == [f"{whole[0]}\ufffd"]
