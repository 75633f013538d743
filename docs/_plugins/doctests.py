"""Have griffe show the examples that open our docstrings as code, not as Markdown quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
DIRECTIVE = re.compile(r"\s*# doctest: \+\w+$", re.MULTILINE)


class Doctests(griffe.Extension):
    """Put each example, from ``>>>`` to the next empty line, into a block of code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object as it is collected."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    r"""Return a docstring whose examples stand in blocks of code.

    >>> print(fenced("Add.\n\n>>> 1 + 1      # doctest: +SKIP\n2\n\nThat is all."))
    Add.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    That is all.
    """
    return EXAMPLE.sub(lambda found: f"```pycon\n{DIRECTIVE.sub('', found[0])}\n```", text)
