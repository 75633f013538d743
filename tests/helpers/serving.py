"""A server on loopback, in a thread of the test's process."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

for needed in ("fastapi", "prometheus_client", "python_multipart", "soundfile", "websockets"):
    pytest.importorskip(needed, reason="the server needs the extra serve")
uvicorn = pytest.importorskip("uvicorn", reason="the server needs the extra serve")

LIMIT = 20
"""Maximum number of tokens that the tests' servers decode."""


@dataclass(frozen=True)
class Running:
    """A running server: its app and port."""

    app: Any
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metric values, by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Wait until no request is being processed."""
        end = time.monotonic() + seconds
        while self.metrics["multitower_requests_under_way"]:
            assert time.monotonic() < end, "a request is still being processed"
            time.sleep(0.05)


@contextmanager
def running(app: Any, **options: Any) -> Iterator[Running]:
    """Run an app with uvicorn on a free port."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", ws="websockets-sansio", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield Running(app, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive(), "the server did not end"


def send(server: Running, path: str, body: bytes, kind: str = "application/json") -> tuple[int, bytes]:
    """Send a raw body; return the status and the body of the response."""
    request = urllib.request.Request(server.url + path, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
