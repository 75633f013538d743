"""Conversations on raw data."""

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
    """A conversation, one example per row, that grows turn by turn; started by ``pipe.session()``.

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

    Generated segments stay in the conversation as tokens, and are not encoded again.

    Args:
        codec: Encodes and decodes raw data.
        session: The conversation in tokens.
    """

    def __init__(self, codec: Codec, session: Session) -> None:
        self._codec, self._session = codec, session

    def __repr__(self) -> str:
        return repr(self._session)

    @property
    def history(self) -> list[list[Turn]]:
        """The examples so far, as segments; ``Pipeline.decode`` converts them to raw data."""
        return self._session.history

    def append(self, entries: Any) -> None:
        """Encode entries, append them, and run the model on them.

        Args:
            entries: A pair ``(tower, raw)``, a segment, or a tuple of these that start at the same time; or a
                list of these, appended to every row; or a list with such a list for each row.

        Raises:
            ValueError: See ``Session.append`` and ``Pipeline``. The session is then unchanged.
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
        """Generate outputs, append them, and return them as raw data.

        Args:
            output: A tower, a tuple of towers, a list of both, or a function, as for ``Pipeline``.
            return_segments: Whether to return segments of tokens instead of raw data.
            options: Options of ``FusedModel.generate``.

        Returns:
            The result in the form of ``output``, as for a call of the pipeline; a list of these if there are
            several rows.

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
        """Generate text while the input is still arriving.

        >>> chunks = microphone()                                                  # doctest: +SKIP
        >>> for words in session.listen("speech", speech.encode_stream(chunks), "text"):  # doctest: +SKIP
        ...     print(words, end="", flush=True)

        Each piece is run once, when it arrives. In the end, the conversation contains the input and the text.

        Args:
            source: The tower of the input.
            pieces: Tokens, int64, each of shape (length,), from the modality's ``encode_stream``: the begin
                token in the first, the end token in the last.
            output: The tower to decode; its modality must be text.
            policy: Decides when to read and when to write: ``Agreement``, ``WaitK``, ``AtPauses``, ``AtEnd``,
                or one of your own.
            options: Options of ``FusedModel.generate``.

        Yields:
            Additions to the text, which are final.

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
        whole = str(modality.decode(torch.tensor(tokens))) if tokens else ""
        if len(whole) > len(text):
            yield whole[len(text) :]

    def mark(self) -> Mark:
        """Return a mark of the present state for ``rollback``; see ``Session.mark``."""
        return self._session.mark()

    def rollback(self, mark: Mark) -> None:
        """Roll back to a mark; see ``Session.rollback``."""
        self._session.rollback(mark)

    def fork(self) -> RawSession:
        """Return an independent copy; see ``Session.fork``."""
        return RawSession(self._codec, self._session.fork())

    def join(self, *others: RawSession) -> RawSession:
        """Return a conversation with the rows of this one and others; see ``Session.join``."""
        return RawSession(self._codec, self._session.join(*(each._session for each in others)))

    def split(self) -> list[RawSession]:
        """Return one conversation per row; see ``Session.split``."""
        return [RawSession(self._codec, each) for each in self._session.split()]
