"""Limits on requests to a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits on requests to a server.

    Attributes:
        requests: Maximum number of concurrent requests and live sessions; others get 503.
        body_bytes: Maximum size of a request, or of a message in a live session.
        audio_seconds: Maximum duration of a sound, or of the audio between JSON messages in a live session.
        input_tokens: Maximum number of tokens in a request, or in a whole live session.
        tokens: Maximum, and default, number of tokens to decode per tower.
        seconds: Maximum time of a response, or of silence in a live session.
        stall_seconds: Maximum time for which a client may neither send nor read.
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
