"""Raw data while they are decoded: text by transformers' own streamer, the rest as their modality says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
from torch import Tensor

from ..base.extras import require
from ..plugins.modality import Modality


def stream(
    generate: Callable[..., object], modality: Modality, begin: int | None, options: Mapping[str, Any]
) -> Iterator[Any]:
    """Return the raw data of a segment piece by piece, while ``generate`` decodes it in a thread.

    The thread runs under what this call runs under: ``torch.autocast`` and what chooses a device. When the
    iterator is closed, decoding ends after the token that is being computed. The options are those of
    transformers' ``generate``; what stops and follows the decoding is added.
    """
    transformers = require("transformers", "transformers")
    closed = Event()
    if type(modality).decode_stream is not Modality.decode_stream:
        streamer: Any = TokenStreamer()
        queue, raws = streamer.queue, modality.decode_stream(iter(streamer.queue.get, None))
    else:
        streamer = transformers.TextIteratorStreamer(TokenizerOf(modality, begin), skip_prompt=True)
        queue, raws = streamer.text_queue, filter(None, streamer)

    def is_closed(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(tokens),), closed.is_set(), device=tokens.device)

    criteria = transformers.StoppingCriteriaList([*(options.get("stopping_criteria") or ()), is_closed])

    enter, context = _surroundings(), copy_context()

    def run() -> None:
        try:
            with ExitStack() as stack:
                enter(stack)
                generate(**{**options, "streamer": streamer, "stopping_criteria": criteria})
        finally:
            queue.put(None)

    def pieces() -> Iterator[Any]:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(context.run, run)
            try:
                yield from raws
            finally:
                closed.set()
            running.result()

    return pieces()


async def in_a_thread(begin: Callable[[], Iterator[Any]]) -> AsyncIterator[Any]:
    """Return what an iterator gives, each waited for in a thread, so that the event loop goes on."""
    pieces: Any = await asyncio.to_thread(begin)
    waiting: asyncio.Future[Any] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
            piece = await asyncio.shield(waiting)
            if piece is None:
                return
            yield piece
    finally:
        if waiting is not None:
            await asyncio.wait([waiting])  # a generator that runs cannot be closed
        await asyncio.to_thread(pieces.close)


class TokenStreamer:
    """The tokens that are decoded, as transformers' ``generate`` hands them to a streamer.

    Attributes:
        queue: Each as a tensor of shape (1,), and None at the end.
    """

    def __init__(self) -> None:
        self.queue: SimpleQueue[Tensor | None] = SimpleQueue()
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then a token at a time."""
        if not self._prompt:
            self.queue.put(value.reshape(-1).cpu())
        self._prompt = False

    def end(self) -> None:
        """Note that there are no more."""
        self.queue.put(None)


def _surroundings() -> Callable[[ExitStack], None]:
    """Note what torch keeps for this thread alone; return a function that has another enter the same."""
    accelerator = torch.accelerator.current_accelerator()
    casts = [
        torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=torch.is_autocast_cache_enabled())
        for kind in ("cpu", *(() if accelerator is None else (accelerator.type,)))
        if torch.is_autocast_enabled(kind)
    ]
    default = torch.get_default_device()
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch declares none
    stream = torch.cuda.current_stream() if has_cuda else None

    def enter(stack: ExitStack) -> None:
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))  # which chooses its device as well
        if default != torch.get_default_device():
            stack.enter_context(default)
        for cast in casts:
            stack.enter_context(cast)

    return enter


class TokenizerOf:
    r"""A modality, as a streamer sees a tokenizer.

    A streamer begins anew after each line. What a token says may depend on those before it, so they are
    kept here, and the text of all without that of the earlier lines is given.

    >>> from multitower import Modality
    >>> class Words(Modality):
    ...     encode = None
    ...     def decode(self, tokens):
    ...         return " ".join(["one", "\n", "two"][token] for token in tokens.tolist())
    >>> tokenizer = TokenizerOf(Words())
    >>> tokenizer.decode([0, 1]), tokenizer.decode([2])
    ('one \n', ' two')
    """

    def __init__(self, modality: Modality, begin: int | None = None) -> None:
        self._modality = modality
        self._lines = [] if begin is None else [begin]
        self._length_of_lines = 0

    def decode(self, tokens: list[int]) -> str:
        """Return the text of the tokens of this line."""
        text = str(self._modality.decode(torch.tensor([*self._lines, *tokens])))
        new = text[self._length_of_lines :]
        if new.endswith("\n"):
            self._lines += tokens
            self._length_of_lines = len(text)
        return new
