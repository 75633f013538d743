"""Stream raw data during generation: text with transformers' streamer, other data with the modality."""

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

END = object()
"""What ``next`` returns at the end of an iterator, which may yield anything else."""


def stream(
    generate: Callable[..., object], modality: Modality, begin: int | None, options: Mapping[str, Any]
) -> Iterator[Any]:
    """Yield the raw data of a segment piece by piece, while ``generate`` runs in a thread.

    The thread inherits the caller's ``torch.autocast``, default device and CUDA stream. When the iterator is
    closed, generation stops after the current token. ``options`` are those of transformers' ``generate``; a
    streamer and a stopping criterion are added.
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
    """Turn an iterator into an async one: each item is awaited in a thread."""
    pieces: Any = await asyncio.to_thread(begin)
    waiting: asyncio.Future[Any] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(asyncio.to_thread(next, pieces, END))
            piece = await asyncio.shield(waiting)
            if piece is END:
                return
            yield piece
    finally:
        if waiting is not None:
            await asyncio.wait([waiting])  # a running generator cannot be closed
        await asyncio.to_thread(pieces.close)


class TokenStreamer:
    """A streamer for transformers' ``generate`` that puts tokens into a queue.

    Attributes:
        queue: Each token as a tensor of shape (1,), and None at the end.
    """

    def __init__(self) -> None:
        self.queue: SimpleQueue[Tensor | None] = SimpleQueue()
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Skip the prompt, which comes first; queue each token after it."""
        if not self._prompt:
            self.queue.put(value.reshape(-1).cpu())
        self._prompt = False

    def end(self) -> None:
        """Mark the end of the tokens."""
        self.queue.put(None)


def _surroundings() -> Callable[[ExitStack], None]:
    """Capture torch's thread-local state; return a function that enters it in another thread."""
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
            stack.enter_context(torch.cuda.stream(stream))  # also selects its device
        if default != torch.get_default_device():
            stack.enter_context(default)
        for cast in casts:
            stack.enter_context(cast)

    return enter


class TokenizerOf:
    r"""Adapts a modality to the tokenizer interface of transformers' streamer.

    The streamer decodes each line by itself. As decoding a token may depend on earlier ones, this class keeps
    all tokens, decodes them together, and returns the text after the earlier lines.

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
