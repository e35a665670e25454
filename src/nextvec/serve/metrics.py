"""What Prometheus reads at /metrics."""

from __future__ import annotations

import sys

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """One server's counters. Times are seconds; a row is one text in the making, a request may have many."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        if sys.platform.startswith("linux"):
            ProcessCollector(registry=self.registry)

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"nextvec_{name}", words, labels, registry=self.registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"nextvec_{name}", words, ["model"], buckets=buckets, registry=self.registry)

        self.requests = counter("http_requests", "Answers by path and status", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "model")
        self.tokens = counter("generated_tokens", "Tokens drawn", "model")
        self.patches = counter("patches", "Patches drawn, one per row and step", "model")
        self.steps = counter("steps", "Steps of the engine, each a patch for every row at work", "model")
        self.draws = counter("draws", "Draws of the model, all candidates counted", "model")
        self.cancelled = counter("cancelled_requests", "Requests whose client left before the end", "model")
        self.refused = counter("refused_requests", "Requests answered 429", "model")
        self.failures = counter("engine_failures", "Steps that failed; the engine was made anew", "model")
        self.running = Gauge("nextvec_rows_running", "Rows at work", ["model"], registry=self.registry)
        self.waiting = Gauge("nextvec_rows_waiting", "Rows waiting for a slot", ["model"], registry=self.registry)
        self.first = histogram("time_to_first_token_seconds", "From the request to its first patch", SECONDS)
        self.per_token = histogram("time_per_output_token_seconds", "Between patches, per token", TOKEN_SECONDS)
        self.whole = histogram("request_seconds", "From the request to its end", SECONDS)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)
