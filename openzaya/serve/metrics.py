"""Numbers for Prometheus, at /metrics: requests and latencies counted here, the engine's state read when asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from openzaya.infer.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

_GAUGES = {
    "num_running": ("openzaya_requests_running", "Sequences that are being decoded or prefilled"),
    "num_waiting": ("openzaya_requests_waiting", "Sequences in the queue"),
    "blocks_total": ("openzaya_cache_blocks", "Blocks of the key-value cache"),
    "blocks_free": ("openzaya_cache_blocks_free", "Blocks that nothing uses"),
    "blocks_cached": ("openzaya_cache_blocks_cached", "Unused blocks that hold a prefix for later requests"),
}
_COUNTERS = {
    "tokens_generated": ("openzaya_generated_tokens", "Tokens generated"),
    "prompt_tokens": ("openzaya_prompt_tokens", "Prompt tokens of admitted requests"),
    "cached_tokens": ("openzaya_cached_tokens", "Prompt tokens taken from the prefix cache"),
    "preemptions": ("openzaya_preemptions", "Sequences that gave their blocks away and were computed again"),
    "steps": ("openzaya_engine_steps", "Steps of the engine"),
}


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        stats = self._engine.stats()
        for name, (metric, text) in _GAUGES.items():
            yield GaugeMetricFamily(metric, text, value=getattr(stats, name))
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, text, value=getattr(stats, name))
        yield GaugeMetricFamily("openzaya_weights_version", "Counts updates of the weights", value=self._engine.version)


class ServerMetrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.registry = CollectorRegistry()
        if engine is not None:
            self.registry.register(_EngineCollector(engine))
        self.requests = Counter("openzaya_http_requests", "Answers", ("endpoint", "status"), registry=self.registry)
        self.seconds = Histogram(
            "openzaya_http_request_seconds",
            "From a request's arrival to its last byte",
            ("endpoint",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.seconds_to_first = Histogram(
            "openzaya_time_to_first_token_seconds", "From admission", buckets=SECONDS, registry=self.registry
        )
        self.seconds_per_token = Histogram(
            "openzaya_time_per_output_token_seconds",
            "After the first token, for one candidate",
            buckets=SECONDS_PER_TOKEN,
            registry=self.registry,
        )
        self.open_requests = self._gauge("openzaya_open_requests", "Requests without a whole answer yet")
        self.jobs = self._gauge("openzaya_jobs", "Requests that the engine, an RSA run or an upstream works on")
        self.tasks = self._gauge("openzaya_tasks", "Tasks of the event loop, that of the reader included")
        self.rollouts = Counter("openzaya_rsa_rollouts", "Ended rollouts", ("status",), registry=self.registry)
        self.rollout_tokens = Counter(
            "openzaya_rsa_generated_tokens", "Tokens that rollouts generated", registry=self.registry
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        self.requests.labels(endpoint, str(status)).inc()
        self.seconds.labels(endpoint).observe(seconds)

    def finished(self, seconds_to_first: float | None, num_tokens: int, num_candidates: int, seconds: float) -> None:
        """A job has ended: its candidates made ``num_tokens`` in ``seconds`` since admission."""
        if seconds_to_first is None:
            return
        self.seconds_to_first.observe(seconds_to_first)
        if num_tokens > num_candidates:
            steps = (num_tokens - num_candidates) / num_candidates
            self.seconds_per_token.observe(max(0.0, seconds - seconds_to_first) / steps)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
