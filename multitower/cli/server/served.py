"""Asynchronous access to a served pipeline: encoding, generation, and decoding."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock
from typing import Any, TypeVar

import networkx as nx
from torch import Tensor

from ...batch.collate import Segment
from ...generate.rows import Turn
from ...generate.session import Session
from ...pipeline.codec import Codec
from ...pipeline.pipeline import Pipeline
from ...plugins.modality import Modality
from .audio import bytes_of, pcm_in_pieces, raw_of
from .engine import Decoding, Engine, Event, Job, Piece
from .errors import Refusal, as_refusal
from .limits import Limits
from .metrics import Metrics

T = TypeVar("T")


@dataclass(frozen=True)
class Offer:
    """The text and audio towers of a server.

    Attributes:
        text: The text tower.
        audio: The audio tower, if any.
        hears: Whether the text tower reads the audio tower.
        speaks: Whether the audio tower reads the text tower.
    """

    text: str
    audio: str | None
    hears: bool
    speaks: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        """The towers that can be decoded."""
        return (self.text, *([self.audio] if self.audio is not None and self.speaks else []))


def offer_of(pipe: Pipeline, text: str | None = None, audio: str | None = None) -> Offer:
    """Determine the text and audio towers of a pipeline."""
    text, audio = _tower(pipe, "text", text), _tower(pipe, "audio", audio)
    if text is None:
        raise ValueError(
            "no tower has a modality of text, so there is nothing to serve: all endpoints read or write text"
        )
    graph = pipe.model.graph.to_networkx()
    hears, speaks = (audio is not None and nx.has_path(graph, *way) for way in ((audio, text), (text, audio)))
    return Offer(text, audio, hears, speaks)


def _tower(pipe: Pipeline, media: str, chosen: str | None) -> str | None:
    fitting = [name for name, modality in pipe.modalities.items() if modality.media == media]
    if chosen is not None and chosen not in fitting:
        raise ValueError(
            f"tower {chosen!r} is none of {media}; of {media} are: {', '.join(fitting) or 'none'}"
        )
    if chosen is None and len(fitting) > 1:
        raise ValueError(
            f"several towers are of {media}: {', '.join(fitting)}; choose one by --{media}-tower"
        )
    return chosen or next(iter(fitting), None)


class Served:
    """A pipeline, its decoding engine, and one thread per modality for encoding and decoding raw data."""

    def __init__(self, pipe: Pipeline, offer: Offer, limits: Limits, name: str, metrics: Metrics) -> None:
        self.pipe, self.offer, self.limits, self.name, self.metrics = pipe, offer, limits, name, metrics
        self.created = int(time.time())
        self.engine = Engine(Codec(pipe.model, pipe.modalities), offer.outputs, observe=metrics.stepped)
        self._threads = {name: ThreadPoolExecutor(1, f"multitower-{name}") for name in pipe.modalities}
        self._streams = ThreadPoolExecutor(limits.requests, "multitower-stream")
        self._locks = {name: Lock() for name in pipe.modalities}

    def close(self) -> None:
        """End all threads."""
        self.engine.close()
        for threads in (self._streams, *self._threads.values()):
            threads.shutdown()

    def check_model(self, name: str) -> None:
        """Raise if a request is for another model."""
        if name != self.name:
            raise Refusal(
                404, f"there is no model {name!r}; this server has {self.name!r}", "model", "model_not_found"
            )

    @property
    def audio(self) -> str:
        """The audio tower; there must be one."""
        assert self.offer.audio is not None, "no endpoint of sound is offered"
        return self.offer.audio

    async def text(self, text: str) -> Segment:
        """Encode a text."""
        return await self._encode(self.offer.text, lambda _: text)

    async def sound(self, data: bytes) -> Segment:
        """Encode a sound file."""
        return await self._encode(
            self.audio, lambda modality: raw_of(modality, data, self.limits.audio_seconds)
        )

    def stream_of_sound(self) -> Callable[..., Iterator[Tensor]]:
        """Return the audio modality's ``encode_stream``."""
        encode = getattr(self.pipe.modalities[self.audio], "encode_stream", None)
        if encode is None:
            raise Refusal(400, f"the modality of tower {self.audio!r} does not encode sound as it comes")
        stream: Callable[..., Iterator[Tensor]] = encode
        return stream

    async def decode(self, tower: str, tokens: Tensor) -> Any:
        """Decode tokens to raw data."""
        return await self._in_thread(tower, lambda modality: modality.decode(tokens))

    async def sound_file(self, tokens: Tensor, form: str) -> bytes:
        """Decode audio tokens to a sound file."""
        return await self._in_thread(
            self.audio, lambda modality: bytes_of(modality, modality.decode(tokens), form)
        )

    @property
    def speaks_in_pieces(self) -> bool:
        """Whether the audio modality supports streaming."""
        return type(self.pipe.modalities[self.audio]).decode_stream is not Modality.decode_stream

    async def pcm(self, parts: AsyncIterator[Tensor]) -> AsyncIterator[bytes]:
        """Decode audio tokens while they arrive; yield 16-bit mono PCM at 24 kHz."""
        loop, modality = asyncio.get_running_loop(), self.pipe.modalities[self.audio]
        lock = self._locks[self.audio]
        tokens, made = SimpleQueue[Tensor | None](), asyncio.Queue[bytes | Exception | None]()

        def coming() -> Iterator[Tensor]:
            while True:
                lock.release()  # others make sound while this waits
                part = tokens.get()
                lock.acquire()
                if part is None:
                    return
                yield part

        def make() -> None:
            end: Exception | None = None
            with lock:
                try:
                    for part in pcm_in_pieces(modality, modality.decode_stream(coming())):
                        loop.call_soon_threadsafe(made.put_nowait, part)
                except Exception as error:
                    end = error
            loop.call_soon_threadsafe(made.put_nowait, end)

        async def feed() -> None:
            try:
                async for part in parts:
                    tokens.put(part)
            finally:
                tokens.put(None)

        maker = loop.run_in_executor(self._streams, make)
        feeder = asyncio.create_task(feed())
        try:
            while (part := await made.get()) is not None:
                if isinstance(part, Exception):
                    if feeder.done():
                        feeder.result()
                    raise part
                yield part
            await feeder
        finally:
            feeder.cancel()
            await asyncio.wait([feeder, maker])

    def session(self, wanted: Sequence[Decoding]) -> Session:
        """Start a session with the wanted outputs."""
        return self.pipe.model.session(outputs=sorted({each.tower for each in wanted}))

    def check_given(self, given: Sequence[Segment], before: int = 0) -> int:
        """Raise if the input exceeds the limit; return the number of its tokens, added to ``before``."""
        count = before + sum(len(segment.tokens) for segment in given)
        if count > self.limits.input_tokens:
            raise Refusal(
                400,
                f"the input has {count} tokens, and {self.limits.input_tokens} are allowed; send less",
                code="context_length_exceeded",
            )
        for segment in given:
            self.metrics.given.labels(segment.tower).inc(len(segment.tokens))
        return count

    def most(self, asked: int | None) -> int:
        """Return the maximum number of tokens to decode; raise if more are requested than allowed."""
        if asked is not None and asked > self.limits.tokens:
            raise Refusal(
                400,
                f"max_tokens={asked}, and {self.limits.tokens} are allowed; ask for less",
                "max_tokens",
            )
        return self.limits.tokens if asked is None else asked

    @asynccontextmanager
    async def events(
        self,
        session: Session,
        given: Sequence[Turn],
        wanted: Sequence[Decoding],
        *,
        lasting: bool = False,
    ) -> AsyncIterator[AsyncIterator[Piece | Session]]:
        """Extend a session by the engine; yield its events. Leaving the context cancels the job."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        job = Job(
            session,
            given,
            wanted,
            seconds=self.limits.seconds,
            lasting=lasting,
            emit=lambda event: loop.call_soon_threadsafe(queue.put_nowait, event),
        )

        async def come() -> AsyncIterator[Piece | Session]:
            while True:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise as_refusal(event)
                if isinstance(event, Piece):
                    self.metrics.decoded.labels(event.tower).inc(event.new)
                yield event
                if isinstance(event, Session):
                    return

        self.engine.submit(job)
        try:
            yield come()
        finally:
            job.cancel()

    async def _encode(self, tower: str, raw: Callable[[Modality], Any]) -> Segment:
        try:
            tokens = await self._in_thread(tower, lambda modality: modality.encode(raw(modality)))
        except (TypeError, ValueError, OSError) as error:
            raise Refusal(400, str(error)) from error
        return Segment(tower, tokens)

    async def _in_thread(self, tower: str, work: Callable[[Modality], T]) -> T:
        """Do some work of a modality: one at a time, since not all can do several.

        Where they could, threads that compute at once would still keep each other, and the engine, waiting.
        """
        loop, modality = asyncio.get_running_loop(), self.pipe.modalities[tower]

        def alone() -> T:
            with self._locks[tower]:
                return work(modality)

        return await loop.run_in_executor(self._threads[tower], alone)
