"""``WS /v1/live``: a conversation over a WebSocket, with audio encoded while it arrives."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import Field, TypeAdapter, ValidationError

from ...batch.collate import Segment
from ...generate.session import Session
from .answers import Growing, new_text
from .engine import Decoding
from .errors import Refusal, as_refusal, body_of, refusal_of
from .schemas import Commit, Said
from .served import Served

MESSAGE: TypeAdapter[Said | Commit] = TypeAdapter(Annotated[Said | Commit, Field(discriminator="type")])
Samples: TypeAlias = npt.NDArray[np.int16]
RATES = range(8_000, 48_001)
BAD, LATE = 1008, 1001
"""Close codes of the WebSocket: invalid message; timeout."""


def live(served: Served) -> APIRouter:
    """Return the router of the endpoint."""
    router = APIRouter()

    @router.websocket("/v1/live")
    async def converse(socket: WebSocket) -> None:
        """Hold a conversation."""
        await socket.accept()
        conversation = _Conversation(served, socket)
        try:
            await conversation.hold()
        except WebSocketDisconnect:
            pass
        except Exception as error:
            refusal = as_refusal(error)
            await socket.send_json({"type": "error", **body_of(refusal)})
            await socket.close(LATE if refusal.status_code == 408 else BAD)
        finally:
            conversation.end()

    return router


class _Conversation:
    """The session of one client."""

    def __init__(self, served: Served, socket: WebSocket) -> None:
        self.served, self.socket = served, socket
        self.session: Session = served.pipe.model.session(outputs=served.offer.outputs)
        self.count = 0
        self.listening: _Listening | None = None

    async def hold(self) -> None:
        """Handle messages until the client disconnects."""
        rate = self._rate()
        while True:
            try:
                async with asyncio.timeout(self.served.limits.seconds):
                    message = await self.socket.receive()
            except TimeoutError:
                raise Refusal(
                    408, f"nothing came for {self.served.limits.seconds:g} s", code="timeout"
                ) from None
            if message["type"] == "websocket.disconnect":
                return
            if message.get("bytes") is not None:
                await self._hear(message["bytes"], rate)
            else:
                await self._read(message["text"])

    def end(self) -> None:
        """End the encoding thread, if any."""
        if self.listening is not None:
            self.listening.end()

    def _rate(self) -> int:
        rate = self.socket.query_params.get("rate", "16000")
        if not (rate.isdecimal() and len(rate) < 6 and int(rate) in RATES):
            raise Refusal(400, f"rate={rate!r}: give {RATES[0]} to {RATES[-1]} Hz, as in ?rate=16000", "rate")
        return int(rate)

    async def _hear(self, data: bytes, rate: int) -> None:
        """Handle audio samples; append the tokens that are already final."""
        if not self.served.offer.hears:
            raise Refusal(400, "this model does not read sound")
        if len(data) % 2:
            raise Refusal(400, f"a message has {len(data)} bytes, which is no whole number of 16-bit samples")
        if not data:
            return
        if self.listening is None:
            self.listening = _Listening(self.served.stream_of_sound(), rate)
        self.listening.heard += len(data) / 2 / rate
        if self.listening.heard > self.served.limits.audio_seconds:
            raise Refusal(400, f"the sound is longer than {self.served.limits.audio_seconds:g} s")
        self.listening.add(np.frombuffer(data, "<i2"))
        await self._listened(self.listening.certain())

    async def _read(self, text: str) -> None:
        """Handle a JSON message; audio before it is encoded to its end first."""
        try:
            message = MESSAGE.validate_json(text)
        except ValidationError as error:
            raise refusal_of(error.errors()) from error
        if self.listening is not None:
            listening, self.listening = self.listening, None
            await self._listened(await listening.rest())
        if isinstance(message, Said):
            await self._add(await self.served.text(message.text))
        else:
            await self._answer(message)

    async def _listened(self, tokens: torch.Tensor | None) -> None:
        """Append audio tokens to the session."""
        if tokens is not None and len(tokens):
            await self._add(Segment(self.served.audio, tokens))

    async def _add(self, segment: Segment) -> None:
        """Append a segment, or a part of one, to the session."""
        self.count = self.served.check_given([segment], self.count)
        async with self.served.events(self.session, [segment], [], lasting=True) as events:
            async for event in events:
                if isinstance(event, Session):
                    self.session = event

    async def _answer(self, asked: Commit) -> None:
        """Generate the requested output, and send text as it is decoded."""
        spoken = asked.output == "audio"
        if spoken and not self.served.offer.speaks:
            raise Refusal(400, "this model gives no sound", "output")
        tower = self.served.audio if spoken else self.served.offer.text
        wanted = Decoding(tower, self.served.most(asked.max_tokens), asked.temperature, asked.top_p)
        text, written, tokens = Growing(), "", list[torch.Tensor]()
        finish: str | None = None
        async with self.served.events(self.session, [], [wanted], lasting=True) as events:
            async for event in events:
                if isinstance(event, Session):
                    self.session = event
                    continue
                self.count, finish = self.count + event.new, event.finish
                if spoken:
                    tokens.append(event.tokens)
                elif new := await new_text(self.served, event, text, tokens):
                    written += new
                    await self.socket.send_json({"type": "delta", "delta": new})
        done = {"type": "done", "finish_reason": finish}
        if spoken:
            sound = await self.served.sound_file(torch.cat(tokens), "wav")
            await self.socket.send_json({**done, "audio": base64.b64encode(sound).decode()})
        else:
            await self.socket.send_json({**done, "text": written})


class _Listening:
    """Encodes audio in a thread while it arrives."""

    def __init__(self, encode: Callable[..., Iterator[torch.Tensor]], rate: int) -> None:
        self.heard = 0.0
        self._chunks = SimpleQueue[Samples | None]()
        self._found = asyncio.Queue[torch.Tensor | Exception | None]()
        loop = asyncio.get_running_loop()

        def tell(found: torch.Tensor | Exception | None) -> None:
            with suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(self._found.put_nowait, found)

        def run() -> None:
            try:
                for tokens in encode(self._come(), rate):
                    tell(tokens)
                tell(None)
            except Exception as error:
                tell(error)

        Thread(target=run, name="multitower-live", daemon=True).start()

    def add(self, samples: Samples) -> None:
        """Queue samples."""
        self._chunks.put(samples)

    def end(self) -> None:
        """Mark the end of the audio."""
        self._chunks.put(None)

    def certain(self) -> torch.Tensor | None:
        """Return the tokens that became final since the last call; None if there are none."""
        found = []
        while not self._found.empty():
            found.append(self._found.get_nowait())
        return _joined(found)

    async def rest(self) -> torch.Tensor | None:
        """End the audio, and return all remaining tokens."""
        self.end()
        found = [await self._found.get()]
        while isinstance(found[-1], torch.Tensor):
            found.append(await self._found.get())
        return _joined(found)

    def _come(self) -> Iterator[Samples]:
        while (samples := self._chunks.get()) is not None:
            yield samples


def _joined(found: list[torch.Tensor | Exception | None]) -> torch.Tensor | None:
    for each in found:
        if isinstance(each, Exception):
            raise Refusal(400, str(each)) if isinstance(each, ValueError | TypeError) else each
    tokens = [each for each in found if isinstance(each, torch.Tensor)]
    return torch.cat(tokens) if tokens else None
