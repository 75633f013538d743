"""Run checks one by one, and report failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def report_of(
    checks: Mapping[str, Callable[..., None]], promises: Iterable[str] | None, *arguments: Any
) -> dict[str, str]:
    """Run checks on the same arguments; return an error message for each name, empty if the check passes.

    >>> def check_size(number):
    ...     assert number < 3, f"{number} is too large"
    >>> report_of({"size": check_size, "inverse": lambda number: 1 / number}, None, 0)
    {'size': '', 'inverse': 'ZeroDivisionError: division by zero'}

    Args:
        checks: The checks by name; each raises an AssertionError that explains what is wrong.
        promises: The names of the checks to run; all by default.
        arguments: The arguments of each check.

    Raises:
        ValueError: There is no check of that name.
    """
    chosen = list(checks if promises is None else promises)
    unknown = [name for name in chosen if name not in checks]
    if unknown:
        raise ValueError(f"there is no promise {unknown[0]!r}, only {', '.join(checks)}")
    report = {}
    for name in chosen:
        report[name] = ""
        try:
            checks[name](*arguments)
        except AssertionError as error:
            report[name] = str(error)
        except Exception as error:  # code under test may raise anything
            report[name] = f"{type(error).__name__}: {error}"
    return report


def demand(report: Mapping[str, str], who: str) -> None:
    """Raise an AssertionError that lists all failures of a report, if there are any.

    >>> demand({"size": "", "shape": "it is round"}, "the table")
    Traceback (most recent call last):
    AssertionError: the table breaks 1 of 2 promises:
      shape: it is round
    """
    broken = [f"\n  {name}: {reason}" for name, reason in report.items() if reason]
    if broken:
        raise AssertionError(f"{who} breaks {len(broken)} of {len(report)} promises:{''.join(broken)}")


def call(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the code under test; turn any exception into an AssertionError that says where.

    >>> call("the inverse", lambda number: 1 / number, 0)
    Traceback (most recent call last):
    AssertionError: the inverse fails with ZeroDivisionError: division by zero
    """
    try:
        return function(*arguments)
    except Exception as error:
        raise AssertionError(f"{what} fails with {type(error).__name__}: {error}") from error
