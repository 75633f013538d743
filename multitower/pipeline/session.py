"""A conversation of raw data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..generate.generate import Policy
from ..generate.rows import Turn
from ..generate.session import Mark, Session
from .codec import Codec, leaves
from .live import Agreement, LivePolicy, listen


class RawSession:
    """Examples of raw data that grow turn by turn; ``pipe.session()`` begins one.

    >>> import torch, multitower as mt
    >>> from multitower.testing import tiny_model
    >>> class Letters(mt.Modality):
    ...     name, accepts, vocab_size, begin, end = "letters", (str,), 16, 1, 2
    ...     def encode(self, raw):
    ...         return torch.tensor([1, *(ord(letter) - 94 for letter in raw), 2])
    ...     def decode(self, tokens):
    ...         return "".join(chr(token + 94) for token in tokens.tolist() if token > 2)
    >>> pipe = mt.Pipeline(tiny_model(), {"text": Letters(), "speech": Letters()})
    >>> session = pipe.session()
    >>> session.append(("speech", "ab"))
    >>> type(session.generate("text", max_new_tokens=4)).__name__
    'str'
    >>> [segment.tower for segment in session.history[0]]
    ['speech', 'text']

    What was decoded stays in the conversation as the tokens that it was, and is not encoded anew.

    Args:
        codec: Encodes and decodes.
        session: What keeps the tokens.
    """

    def __init__(self, codec: Codec, session: Session) -> None:
        self._codec, self._session = codec, session

    def __repr__(self) -> str:
        return repr(self._session)

    @property
    def history(self) -> list[list[Turn]]:
        """The examples so far, of segments; ``Pipeline.decode`` makes raw data of them."""
        return self._session.history

    def append(self, entries: Any) -> None:
        """Encode what is given, add it, and run it.

        Args:
            entries: A pair ``(tower, raw)``, a segment, or a tuple of such that begin at the same time; or a
                list of these; for every row. Or a list with such a list for each row.

        Raises:
            ValueError: See ``Session.append`` and ``Pipeline``. The session is then as it was.
            TypeError: See ``Pipeline``.
        """
        by_row = isinstance(entries, list) and any(isinstance(each, list) for each in entries)
        if by_row:
            self._session.append(self._codec.encode(entries))
        else:
            (example,) = self._codec.encode([entries if isinstance(entries, list) else [entries]])
            self._session.append(example)

    def generate(
        self,
        output: str | tuple[str, ...] | Sequence[Any] | Policy,
        *,
        return_segments: bool = False,
        **options: Any,
    ) -> Any:
        """Decode what is asked for, add it, and return it as raw data.

        Args:
            output: As ``Pipeline`` takes it: a tower, a tuple of towers, a list of both, or a function.
            return_segments: Whether to return segments of tokens in place of raw data.
            options: Options of ``FusedModel.generate``.

        Returns:
            The result in the form of ``output``, as a call of the pipeline gives it; with several rows, a
            list of one for each.

        Raises:
            ValueError: See ``Session.generate`` and ``Pipeline``.
        """
        wanted: Any = output if callable(output) or isinstance(output, list) else [output]
        if not callable(wanted) and not return_segments:
            for name in leaves([wanted]):
                self._codec.modality(name, "output")
        rows: Any = self._session.generate(wanted, **self._codec.with_edges(options))
        decoded = rows if return_segments else self._codec.decode(rows, pairs=callable(output))
        results = decoded if wanted is output else [row[0] for row in decoded]
        return results if len(results) > 1 else results[0]

    def listen(
        self,
        source: str,
        pieces: Iterable[Tensor],
        output: str,
        policy: LivePolicy = Agreement(),  # noqa: B008  # frozen
        **options: Any,
    ) -> Iterator[str]:
        """Write a text while what it is made of still comes in.

        >>> chunks = microphone()                                                  # doctest: +SKIP
        >>> for words in session.listen("speech", speech.encode_stream(chunks), "text"):  # doctest: +SKIP
        ...     print(words, end="", flush=True)

        Each piece is run once, when it comes. In the end the conversation holds what was read and what was
        written.

        Args:
            source: The tower that the pieces are of.
            pieces: Tokens, int64, each of shape (length,), as a modality's ``encode_stream`` gives them: the
                begin token in the first, the end token in the last.
            output: The tower to decode, one whose raw data are text.
            policy: When to read on and when to write: ``Agreement``, ``WaitK``, ``AtPauses``, ``AtEnd``, or
                one of yours.
            options: Options of ``FusedModel.generate``.

        Yields:
            What is added to the text; it is never changed afterwards.

        Raises:
            ValueError: The conversation has several rows, or see ``generate``.
        """
        if len(self.history) != 1:
            raise ValueError(f"one row listens at a time, not {len(self.history)}; split() the conversation")
        modality, tokens, text = self._codec.modality(output, "output"), list[int](), ""
        listened = listen(self._session, source, pieces, output, policy, self._codec.with_edges(options))
        for new in listened:
            tokens += new
            whole = str(modality.decode(torch.tensor(tokens)))
            if len(whole) > len(text) and not whole.endswith("\ufffd"):  # half a character
                yield whole[len(text) :]
                text = whole

    def mark(self) -> Mark:
        """Return this point, to go back to; see ``Session.mark``."""
        return self._session.mark()

    def rollback(self, mark: Mark) -> None:
        """Go back to a point; see ``Session.rollback``."""
        self._session.rollback(mark)

    def fork(self) -> RawSession:
        """Return a conversation that goes on from here by itself; see ``Session.fork``."""
        return RawSession(self._codec, self._session.fork())

    def join(self, *others: RawSession) -> RawSession:
        """Return a conversation of the rows of this one and of others; see ``Session.join``."""
        return RawSession(self._codec, self._session.join(*(each._session for each in others)))

    def split(self) -> list[RawSession]:
        """Return a conversation of each row; see ``Session.split``."""
        return [RawSession(self._codec, each) for each in self._session.split()]
