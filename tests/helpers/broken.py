"""Classes that each break a promise, and beside each what its check says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


class Breakage(NamedTuple):
    kind: type[Any]
    promise: str
    message: str
    alone: bool

    @property
    def report(self) -> str:
        """What the check of this promise alone raises: a regular expression."""
        return rf"{self.kind.__name__} breaks 1 of 1 promises:\n  {self.promise}: .*(?:{self.message})"


class Breakages(list[Breakage]):
    def of(self, promise: str, message: str, *, alone: bool = False) -> Callable[[type[Any]], type[Any]]:
        """Note of the class below what it breaks, a regular expression of what is said, and if it is all."""

        def note(kind: type[Any]) -> type[Any]:
            self.append(Breakage(kind, promise, message, alone))
            return kind

        return note

    def each(self, *, alone: bool = False) -> pytest.MarkDecorator:
        """Run a test on each, or on those that break one promise alone, as its argument ``broken``."""
        chosen = [broken for broken in self if broken.alone or not alone]
        return pytest.mark.parametrize("broken", chosen, ids=[broken.kind.__name__ for broken in chosen])
