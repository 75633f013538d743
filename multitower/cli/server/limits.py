"""How much a client may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much a client may ask of a server, and how long things may take.

    Attributes:
        requests: How many requests and live sessions may be under way; others get 503.
        body_bytes: How large a request may be, and a message of a live session.
        audio_seconds: How long a sound may be, and what is said between two commits of a live session.
        input_tokens: How many tokens may be given in a request, or in all of a live session.
        tokens: How many tokens of a tower may be decoded; also how many are where a request does not say.
        seconds: How long it may take to answer, and how long a live session may be silent.
        stall_seconds: How long a client may take to send or to read some more.
    """

    requests: int = 64
    body_bytes: int = 25 * 2**20
    audio_seconds: float = 120.0
    input_tokens: int = 8192
    tokens: int = 1024
    seconds: float = 300.0
    stall_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be more than 0")
