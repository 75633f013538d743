"""Wrong schedules are reported, and so are cycles that are shown wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import multitower as mt
from multitower.compile import schedule
from multitower.compile.schedule import Schedule, Step
from multitower.declare.spec import LinkSpec
from multitower.testing import MODEL_PROMISES, check_schedule
from multitower.testing.model import schedule as schedules
from test_checks import EXAMPLES, make_model, patched

THERE = LinkSpec("a", "b", name="there", interleave=1)
CYCLE = [LinkSpec("a", "b", name="up", taps=((2, 1),)), LinkSpec("b", "a", name="down", taps=((2, 1),))]


def late(schedule: Schedule) -> Schedule:
    """Return a schedule whose last taps run one stage later than necessary."""
    stages = [tuple(step for step in stage if not step.taps) for stage in schedule.stages[-1:]]
    return Schedule(schedule.depths, (*schedule.stages[:-1], *stages, *schedule.stages[-1:]))


def turned(schedule: Schedule) -> Schedule:
    return Schedule(schedule.depths, schedule.stages[::-1])


def twice(schedule: Schedule) -> Schedule:
    return Schedule(schedule.depths, (*schedule.stages, schedule.stages[-1]))


def cut(schedule: Schedule) -> Schedule:
    return Schedule(schedule.depths, schedule.stages[:-1])


def unread(schedule: Schedule) -> Schedule:
    last = tuple(Step(step.tower, step.layer, step.taps[:0]) for step in schedule.stages[-1])
    return Schedule(schedule.depths, (*schedule.stages[:-1], last))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (late, "and could in stage 5"),
        (turned, "which it needs"),
        (twice, "runs twice"),
        (cut, "these never run"),
        (unread, "runs twice"),
    ],
)
def test_a_wrong_schedule_is_reported(
    change: Callable[[Schedule], Schedule], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, schedules, "make_schedule", lambda original, *args: change(original(*args)))
    with pytest.raises(AssertionError, match=message):
        check_schedule({"a": 2, "b": 2}, [THERE])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda steps: steps[::-1], "which it needs"),
        (lambda steps: (*steps, steps[-1]), "runs twice"),
        (lambda steps: steps[:-1], "these never run"),
    ],
)
def test_steps_in_a_wrong_order_are_reported(
    change: Callable[[tuple[Step, ...]], tuple[Step, ...]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, schedule, "_in_turn", lambda original, stages: change(original(stages)))
    with pytest.raises(AssertionError, match=message):
        check_schedule({"a": 2, "b": 2}, [THERE])


def test_a_model_with_another_schedule_than_its_graph_is_reported() -> None:
    model = make_model()
    model.schedule = turned(model.schedule)
    with pytest.raises(AssertionError, match="another schedule than its graph"):
        MODEL_PROMISES["schedule"](model, EXAMPLES)


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("run b layer 2", "run b layer 1", "waits for"),
        ("run b layer 2", "run b layer 7", "does not have"),
        ("  run b", "  b", "names no step"),
        ("tap (2, 1)", "tap (1, 1)", "not in the cycle"),
        ("tap", "top", "does not say which tap"),
    ],
)
def test_a_wrong_cycle_is_reported(
    wrong: str, right: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(original: Callable, *args: object) -> Schedule:
        try:
            return original(*args)
        except mt.errors.GraphError as error:
            raise mt.errors.GraphError(str(error).replace(wrong, right)) from None

    check_schedule({"a": 2, "b": 2}, CYCLE)
    patched(monkeypatch, schedules, "make_schedule", lie)
    with pytest.raises(AssertionError, match=message):
        check_schedule({"a": 2, "b": 2}, CYCLE)


def test_a_cycle_that_is_not_refused_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, schedules, "make_schedule", lambda original, *args: Schedule((), ()))
    with pytest.raises(AssertionError, match="scheduled all the same"):
        check_schedule({"a": 2, "b": 2}, CYCLE)
