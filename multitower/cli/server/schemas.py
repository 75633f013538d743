"""Schemas of requests. Options of OpenAI's API that are not supported are missing or have a single value."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
SoundForm = Literal["mp3", "wav", "flac", "ogg", "pcm"]


class Body(BaseModel):
    """A JSON body, validated strictly: no unknown fields, no type coercion."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Transcription(BaseModel):
    """The form of ``/v1/audio/transcriptions``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    file: UploadFile
    model: str
    response_format: Literal["json", "text"] = "json"
    temperature: Temperature = 0.0
    stream: bool = False


class Speech(Body):
    """The body of ``/v1/audio/speech``; there is one voice, whose name is "default"."""

    model: str
    input: Annotated[str, Field(min_length=1)]
    voice: Literal["default"] = "default"
    response_format: SoundForm = "mp3"
    speed: Literal[1] = 1
    stream_format: Literal["audio"] = "audio"


class TextPart(Body):
    """Text in a message."""

    type: Literal["text"]
    text: str


class Sound(Body):
    """A sound file in base64."""

    data: str
    format: Literal["wav", "mp3"]


class AudioPart(Body):
    """Audio in a message."""

    type: Literal["input_audio"]
    input_audio: Sound


Part = Annotated[TextPart | AudioPart, Field(discriminator="type")]


class ChatMessage(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]


class ChatAudio(Body):
    """The format of audio in the response."""

    voice: Literal["default"] = "default"
    format: Literal["mp3", "wav", "flac", "ogg", "pcm16"]


class StreamOptions(Body):
    """Whether a stream ends with a chunk of token counts."""

    include_usage: bool = False


class Chat(Body):
    """The body of ``/v1/chat/completions``."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    modalities: Annotated[list[Literal["text", "audio"]], Field(min_length=1)] = ["text"]
    audio: ChatAudio | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] = False


class Said(Body):
    """A live session's message that appends text."""

    type: Literal["text"]
    text: str


class Commit(Body):
    """A live session's message that requests output."""

    type: Literal["commit"]
    output: Literal["text", "audio"] = "text"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
