"""What requests may hold. What cannot be honoured is no field, or a field of a single value."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
SoundForm = Literal["mp3", "wav", "flac", "ogg", "pcm"]


class Body(BaseModel):
    """A JSON body: no other fields, no other types."""

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
    """A text in a message."""

    type: Literal["text"]
    text: str


class Sound(Body):
    """A sound file in base64."""

    data: str
    format: Literal["wav", "mp3"]


class AudioPart(Body):
    """A sound in a message."""

    type: Literal["input_audio"]
    input_audio: Sound


Part = Annotated[TextPart | AudioPart, Field(discriminator="type")]


class ChatMessage(Body):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]


class ChatAudio(Body):
    """In which form a chat is answered in sound."""

    voice: Literal["default"] = "default"
    format: Literal["mp3", "wav", "flac", "ogg", "pcm16"]


class StreamOptions(Body):
    """Whether the last chunk of a stream says how many tokens there were."""

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
    """A text that a client of a live session adds."""

    type: Literal["text"]
    text: str


class Commit(Body):
    """What a client of a live session sends when it wants an answer."""

    type: Literal["commit"]
    output: Literal["text", "audio"] = "text"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
