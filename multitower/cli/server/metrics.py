"""Prometheus metrics of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server.

    Attributes:
        under_way: Active requests and live sessions.
        given: Input tokens, by tower.
        decoded: Decoded tokens, by tower.
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.under_way = Gauge("multitower_requests_under_way", "Being answered.", registry=registry)
        self._requests = Counter(
            "multitower_requests", "Answered, by status.", ["endpoint", "status"], registry=registry
        )
        self._seconds = Histogram(
            "multitower_request_seconds", "Time to the end of the answer.", ["endpoint"], registry=registry
        )
        self.given = Counter("multitower_given_tokens", "Tokens given.", ["tower"], registry=registry)
        self.decoded = Counter("multitower_decoded_tokens", "Tokens decoded.", ["tower"], registry=registry)
        self._rows = Histogram(
            "multitower_rows", "Rows of a step of decoding.", ["tower"], registry=registry, buckets=ROWS
        )
        self._steps = Histogram(
            "multitower_step_seconds", "Time of a step of decoding.", ["tower"], registry=registry
        )

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Record a request."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def stepped(self, tower: str, rows: int, seconds: float) -> None:
        """Record a decoding step."""
        self._rows.labels(tower).observe(rows)
        self._steps.labels(tower).observe(seconds)

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()
