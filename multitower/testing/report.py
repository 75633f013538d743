"""Checks that are run one by one, and what they say is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def report_of(
    checks: Mapping[str, Callable[..., None]], promises: Iterable[str] | None, *arguments: Any
) -> dict[str, str]:
    """Run checks, each on the same arguments; return by its name what is wrong, empty where nothing is.

    >>> def check_size(number):
    ...     assert number < 3, f"{number} is too large"
    >>> report_of({"size": check_size, "inverse": lambda number: 1 / number}, None, 0)
    {'size': '', 'inverse': 'ZeroDivisionError: division by zero'}

    Args:
        checks: The checks by name: each raises an AssertionError that explains what is wrong.
        promises: The names of those to run; all unless they are given.
        arguments: What each check is called with.

    Raises:
        ValueError: There is no check of such a name.
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
        except Exception as error:  # whatever is raised is for the author of what is checked to read
            report[name] = f"{type(error).__name__}: {error}"
    return report


def demand(report: Mapping[str, str], who: str) -> None:
    """Raise an AssertionError that lists what a report says is broken, if anything is.

    >>> demand({"size": "", "shape": "it is round"}, "the table")
    Traceback (most recent call last):
    AssertionError: the table breaks 1 of 2 promises:
      shape: it is round
    """
    broken = [f"\n  {name}: {reason}" for name, reason in report.items() if reason]
    if broken:
        raise AssertionError(f"{who} breaks {len(broken)} of {len(report)} promises:{''.join(broken)}")


def call(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of what is checked; whatever it raises becomes an AssertionError that says where.

    >>> call("the inverse", lambda number: 1 / number, 0)
    Traceback (most recent call last):
    AssertionError: the inverse fails with ZeroDivisionError: division by zero
    """
    try:
        return function(*arguments)
    except Exception as error:
        raise AssertionError(f"{what} fails with {type(error).__name__}: {error}") from error
