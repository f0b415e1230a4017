"""Counters for Prometheus, of one application; two applications in one process do not mix."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from qr_integrations.serving.counting import Cost
from qr_integrations.serving.work import Engine

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_BY_MODEL = {
    "running": "Jobs in a model.",
    "loaded": "1 for each model that is loaded.",
}
_JOBS = {
    "done": ("qr_jobs_done", "Jobs done."),
    "refused": ("qr_jobs_refused", "Jobs for which there was no room in the queue."),
    "cancelled": ("qr_jobs_cancelled", "Jobs called off."),
    "seconds": ("qr_model_seconds", "Of the model's time."),
}
_SUMS = {
    "cache_hits": "Documents whose keys and values were found in memory or on disk.",
    "cache_misses": "Documents that had to be read.",
}
_NOW = {
    "cache_bytes": "Memory that keys and values of documents take.",
    "cache_documents": "Documents whose keys and values are in memory.",
}


class Metrics:
    """What has been counted since the application was made.

    Args:
        engine: is asked when somebody wants to know; see `EngineCollector`.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "method", "status")
        self._requests = Counter("qr_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "qr_request_seconds",
            "From the head of a request to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("qr_requests_in_flight", "Requests being answered.", registry=self.registry)
        self._refused = Counter(
            "qr_refused", "Requests not answered as asked, by reason.", ["reason"], registry=self.registry
        )
        self._gone = Counter("qr_clients_gone", "Clients that left before their work was done.", registry=self.registry)
        self._documents = Counter("qr_documents", "Documents sent to be ranked.", registry=self.registry)
        self._read = Counter(
            "qr_tokens_read", "Tokens of documents, queries and conversations.", registry=self.registry
        )
        self._written = Counter("qr_tokens_written", "Tokens of answers.", registry=self.registry)
        self.registry.register(EngineCollector(engine))

    def add(self, route: str, method: str, status: int, seconds: float, code: str | None, cost: Cost) -> None:
        """Count a request.

        Args:
            route: the template of its path, not the path, of which there is no end.
            method: of HTTP.
            status: of the answer.
            seconds: that it took.
            code: why it was refused; None: it was not.
            cost: what it took from the model.
        """
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if code is not None:
            self._refused.labels(code).inc()
        self._gone.inc(cost.is_cancelled)
        self._documents.inc(cost.documents)
        self._read.inc(cost.tokens_read)
        self._written.inc(cost.tokens_written)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """What an engine tells about itself: ``stats()``, if it has that; see `LocalEngine.stats`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked of the engine when the collector is registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Ask the engine."""
        yield GaugeMetricFamily("qr_ready", "1 while there is work to be had.", value=self._engine.state == "ready")
        tell: Callable[[], Mapping[str, Any]] = getattr(self._engine, "stats", dict)
        stats = tell()
        depth = GaugeMetricFamily("qr_queue_depth", "Jobs that wait.", labels=("model", "kind"))
        yield _filled(depth, stats.get("queue_depth", {}))
        for key, told in _BY_MODEL.items():
            yield _filled(GaugeMetricFamily(f"qr_model_{key}", told, labels=("model",)), stats.get(key, {}))
        for key, (name, told) in _JOBS.items():
            yield _filled(CounterMetricFamily(name, told, labels=("model", "kind")), stats.get(key, {}))
        yield from (CounterMetricFamily(f"qr_{key}", told, value=stats.get(key, 0)) for key, told in _SUMS.items())
        yield from (GaugeMetricFamily(f"qr_{key}", told, value=stats.get(key, 0)) for key, told in _NOW.items())
        yield _batches(stats.get("batches", {}))


def _filled(family: Any, numbers: Mapping[Any, Any]) -> Metric:
    """With a number for each model, or for each model and kind of work."""
    for labels, number in numbers.items():
        family.add_metric([labels] if isinstance(labels, str) else list(labels), number)
    filled: Metric = family
    return filled


def _batches(counts: Mapping[int, int]) -> Metric:
    buckets = [(str(float(most)), sum(n for size, n in counts.items() if size <= most)) for most in _SIZES]
    buckets.append(("+Inf", sum(counts.values())))
    total = sum(size * n for size, n in counts.items())
    return HistogramMetricFamily("qr_batch_size", "Rankings that went through a model together.", buckets, total)
