from __future__ import annotations

import pytest

import multitower as mt
from letters import STEPS, simple_pipe
from models import segment


@pytest.fixture
def pipe() -> mt.Pipeline:
    return simple_pipe()


def test_turns_of_raw_data_are_those_of_a_call_with_all_before(pipe: mt.Pipeline) -> None:
    session, given = pipe.session(), []
    for turn in (("speech", [5, 6, 7]), [("text", "bc"), ("speech", [9])], (("text", "d"), ("speech", [3]))):
        session.append(turn)
        given += turn if isinstance(turn, list) else [turn]
        for output in ("text", ["text", "speech"], ("text", "speech")):
            expected = pipe(given, output, **STEPS, return_segments=True)
            assert session.fork().generate(output, **STEPS) == pipe.decode(expected)
        given.append(session.generate("text", **STEPS, return_segments=True))
    assert len(session.history[0]) == len(given)


def test_rows_have_results_of_their_own(pipe: mt.Pipeline) -> None:
    session = pipe.session(rows=2)
    session.append([[("speech", [5, 6, 7])], [("text", "bc")]])
    mark = session.mark()
    answers = session.generate("text", **STEPS)
    assert answers == pipe([[("speech", [5, 6, 7])], [("text", "bc")]], "text", **STEPS)
    session.rollback(mark)
    assert session.generate("text", **STEPS) == answers
    session.append(("text", "a"))
    assert [len(row) for row in session.history] == [3, 3]


def test_a_function_gets_pairs_back(pipe: mt.Pipeline) -> None:
    session = pipe.session()
    session.append(segment("speech", 5, 6))
    ((name, answer),) = session.generate(lambda row: "text" if len(row) < 2 else None, **STEPS)
    assert (name, answer) == ("text", pipe([segment("speech", 5, 6)], "text", **STEPS))


def test_what_is_no_raw_data_is_refused_with_its_place(pipe: mt.Pipeline) -> None:
    session = pipe.session()
    with pytest.raises(TypeError, match="example 0, entry 0: tower 'text' takes str, not int"):
        session.append(("text", 3))
    with pytest.raises(ValueError, match="no tower 'music'"):
        session.generate("music")
    assert session.history == [[]]
