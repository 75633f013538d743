"""A conversation: examples that grow turn by turn, with each token run once."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..batch.collate import Example, Segment
from ..run.fusion import Fusion
from ..run.gathered import gathered
from ..tower.probe import evaluated
from .advance import Keeping, advance
from .generate import Decoded, Entry, Policy, check_given, check_name, go_on
from .rows import Row, Turn


@dataclass(frozen=True, eq=False)
class Mark:
    """A point in a session to roll back to; see ``Session.mark``.

    Attributes:
        history: The examples at that point.
    """

    history: tuple[tuple[Turn, ...], ...]


class Session:
    """Examples that grow turn by turn; ``model.session()`` starts a session.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> model = tiny_model()
    >>> session = model.session()
    >>> session.append(mt.Segment("speech", [1, 5, 6, 2]))
    >>> ((first,),) = session.generate(["text"], max_new_tokens=4)
    >>> session.append(mt.Segment("speech", [1, 9, 2]))
    >>> ((second,),) = session.generate(["text"], max_new_tokens=4)
    >>> len(session.history[0])
    4

    The result equals that of ``model.generate`` on the whole ``history``, up to rounding. Keys and values of
    towers and taps are cached, so that each turn runs only its new tokens. A tower that cannot resume from a
    cache (``Tower.resumes``) runs from its first token.

    The caches are not updated with the model: start a new session after training or changing it.

    Args:
        model: The model.
        rows: Number of examples in the batch.
        outputs: The towers that may be decoded; all by default.

    Raises:
        ValueError: ``rows`` is below 1, or a tower is unknown.
    """

    def __init__(self, model: Fusion, rows: int = 1, outputs: Collection[str] | None = None) -> None:
        if rows < 1:
            raise ValueError(f"a session needs one or more rows, not {rows}")
        towers = list(model.towers)
        if isinstance(outputs, str):
            raise TypeError(f"outputs is a list of towers: outputs=[{outputs!r}]")
        for name in towers if outputs is None else outputs:
            check_name(name, towers)
        self.model = model
        self._keeping = Keeping(model, towers, towers if outputs is None else list(outputs))
        self._rows = [Row()] * rows

    def __repr__(self) -> str:
        counts = {name: [len(row.of(name).tokens) for row in self._rows] for name in self.model.towers}
        return f"Session({', '.join(f'{name}: {each} tokens' for name, each in counts.items())})"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The towers that may be decoded."""
        return tuple(self._keeping.outputs)

    @property
    def history(self) -> list[list[Turn]]:
        """The examples so far, in the form that ``model.generate`` and ``collate`` take."""
        return [list(row.history) for row in self._rows]

    @torch.no_grad()
    def append(self, entries: Turn | Example | Sequence[Example]) -> None:
        """Add segments and run them.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_model
        >>> session = tiny_model().session(rows=2)
        >>> session.append(mt.Segment("text", [1, 7, 2]))                           # to every row
        >>> session.append([[mt.Segment("speech", [1, 5, 2])], []])                 # to the first alone
        >>> [len(row) for row in session.history]
        [2, 1]

        A segment may come in pieces as it is recorded or typed, ``[1, 5]`` and then ``[6, 2]``: consecutive
        tokens of a tower form one segment, in however many pieces they came.

        Args:
            entries: For all rows: a segment, a tuple of segments that start at the same time, or a list of
                these. For each row: a list with one such list per row, which may be empty.

        Raises:
            ValueError: A segment is not valid for ``model.generate``, the number of lists differs from the
                number of rows, or a tower has too few positions. The session is then unchanged.
        """
        each = self._by_row(entries)
        check_given(each, {name: self.model.tower(name).vocab_size for name in self.model.towers})
        rows = [row.then(new, number) for number, (row, new) in enumerate(zip(self._rows, each, strict=True))]
        with gathered(self.model), evaluated(self.model):
            self._rows = advance(self._keeping, rows)

    def generate(
        self, output: Sequence[Entry] | Policy, *, continue_segment: bool = False, **options: Any
    ) -> Decoded:
        """Decode a segment for each tower in ``output``, and add it to the session.

        Args:
            output: See ``FusedModel.generate``.
            continue_segment: See ``FusedModel.generate``. With it, a segment can be decoded a few tokens at a
                time.
            options: See ``FusedModel.generate``. For several answers to one row, decode in several forks.

        Returns:
            For each row the decoded segments, which are now the end of its history.

        Raises:
            ValueError: See ``FusedModel.generate``; or a tower is not among ``outputs``, or
                ``num_return_sequences`` is above 1. The session is then unchanged.
        """
        before = self._rows
        with gathered(self.model), torch.no_grad():
            self._rows = go_on(
                self._keeping, before, output, options, lasting=True, continues=continue_segment
            )
        return [list(row.history[len(old.history) :]) for row, old in zip(self._rows, before, strict=True)]

    def mark(self) -> Mark:
        """Return the current point of the session for ``rollback``; it holds no keys and values."""
        return Mark(tuple(row.history for row in self._rows))

    def rollback(self, mark: Mark) -> None:
        """Go back to an earlier point of this session, or of the one that it was forked from; nothing is run.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_model
        >>> session = tiny_model().session()
        >>> session.append(mt.Segment("speech", [1, 5, 6, 2]))
        >>> mark = session.mark()
        >>> _ = session.generate(["text"], do_sample=True, max_new_tokens=4)
        >>> session.rollback(mark)                                                  # to answer otherwise
        >>> len(session.history[0])
        1

        Raises:
            ValueError: The mark is not in this session's past.
        """
        now = [row.history for row in self._rows]
        same = len(now) == len(mark.history) and all(
            len(then) <= len(row) and all(a is b for a, b in zip(then, row, strict=False))
            for then, row in zip(mark.history, now, strict=True)
        )
        if not same:
            raise ValueError(
                "this mark is not in the session's past: it is from another session, or from turns that "
                "were rolled back"
            )
        self._rows = [row.until(len(then)) for row, then in zip(self._rows, mark.history, strict=True)]

    def fork(self) -> Session:
        """Return an independent copy of the session, which shares all tensors."""
        return copy.copy(self)

    def join(self, *others: Session) -> Session:
        """Return a session with the rows of this one and of others; nothing is run, and these do not change.

        So rows can come and go while others continue: decode a few tokens of all, ``split``, and join the
        remaining sessions with new ones.

        >>> import multitower as mt
        >>> from multitower.testing import tiny_model
        >>> model = tiny_model()
        >>> early, late = model.session(), model.session()
        >>> early.append(mt.Segment("speech", [1, 5, 6, 2]))
        >>> late.append(mt.Segment("speech", [1, 9, 2]))
        >>> both = early.join(late)
        >>> _ = both.generate(["text"], max_new_tokens=4)
        >>> early, late = both.split()
        >>> [len(session.history[0]) for session in (early, late)]
        [2, 2]

        Raises:
            ValueError: A session has another model or other ``outputs``.
        """
        for other in others:
            if other.model is not self.model or set(other.outputs) != set(self.outputs):
                raise ValueError(
                    "sessions can be joined if they are of one model and have the same outputs, not "
                    f"{', '.join(self._keeping.outputs)} and {', '.join(other._keeping.outputs)}"
                )
        joined = copy.copy(self)
        joined._rows = [row for session in (self, *others) for row in session._rows]
        return joined

    def split(self) -> list[Session]:
        """Return one session per row; nothing is run, and this one does not change."""
        parts = [copy.copy(self) for _ in self._rows]
        for part, row in zip(parts, self._rows, strict=True):
            part._rows = [row]
        return parts

    def _by_row(self, entries: Any) -> list[Example]:
        if isinstance(entries, Segment | tuple):
            entries = [entries]
        if not isinstance(entries, Sequence) or not any(isinstance(each, list) for each in entries):
            return [entries] * len(self._rows)
        if len(entries) != len(self._rows):
            raise ValueError(
                f"there are {len(entries)} lists of segments for the {len(self._rows)} rows of the session; "
                "give a list for each, or segments alone, which every row gets"
            )
        return list(entries)
