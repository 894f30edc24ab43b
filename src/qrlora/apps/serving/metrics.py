"""Prometheus metrics of the server."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The front's counters, in a registry of their own. No label holds what a client sent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        common: dict[str, Any] = {"namespace": "qrlora", "registry": self.registry}
        self.requests = Counter("requests", "Requests for pictures, by HTTP status", ["status"], **common)
        self.request_seconds = Histogram(
            "request_seconds", "From a request to its answer's end, if it was fulfilled", buckets=SECONDS, **common
        )
        self.pictures = Counter("pictures", "Pictures made", **common)
        self.withdrawn = Counter("withdrawn", "Requests whose client went before the answer", **common)
        self.waiting = Gauge("waiting_pictures", "Pictures in the queue", **common)
        self.running = Gauge("running_pictures", "Pictures being made", **common)
        self.batch_pictures = Histogram("batch_pictures", "Pictures of a batch", buckets=SIZES, **common)
        self.batch_compositions = Histogram(
            "batch_compositions", "Different compositions of a batch", buckets=SIZES, **common
        )
        self.permission_seconds = Histogram(
            "permission_seconds", "Time to check a request's permission", buckets=FAST, **common
        )
        self.batch_seconds = Histogram("batch_seconds", "Time of a batch", buckets=SECONDS, **common)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
