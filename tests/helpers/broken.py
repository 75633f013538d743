"""Collect classes that each break a promise, with the message that its check must give."""

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
        """Return a regular expression of the error that the check of this promise alone raises."""
        return rf"{self.kind.__name__} breaks 1 of 1 promises:\n  {self.promise}: .*(?:{self.message})"


class Breakages(list[Breakage]):
    def of(self, promise: str, message: str, *, alone: bool = False) -> Callable[[type[Any]], type[Any]]:
        """Register a class: the promise it breaks, a regex of the message, and if it breaks no other."""

        def note(kind: type[Any]) -> type[Any]:
            self.append(Breakage(kind, promise, message, alone))
            return kind

        return note

    def each(self, *, alone: bool = False) -> pytest.MarkDecorator:
        """Parametrise ``broken`` by the classes; with ``alone``, by those that break only one promise."""
        chosen = [broken for broken in self if broken.alone or not alone]
        return pytest.mark.parametrize("broken", chosen, ids=[broken.kind.__name__ for broken in chosen])
