"""What /metrics tells, in Prometheus' words."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mpillama.replicas.runner import EngineStats
from mpillama.server.async_engine import AsyncEngine
from mpillama.server.engine_requests import Output

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
MEMORY_SECONDS = 10.0
"""How old the memory stats may be: every rank is asked for them."""
GAUGES = {
    "running": "Sequences that are computed",
    "waiting": "Sequences that wait in the engine",
    "blocks": "Blocks of the KV cache, of 64 positions each",
    "blocks_used": "Blocks of the KV cache that sequences hold",
    "prompt_room": "Prompt tokens that a step beside running answers has room for, of late",
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens of finished requests",
    "cached_tokens": "Prompt tokens that the prefix cache had",
    "sampled_tokens": "Tokens sampled",
    "steps": "Steps of the engine",
    "blocks_saved": "Blocks and states that went to files of --cache-dir",
    "blocks_loaded": "Blocks and states that came from files of --cache-dir",
    "late_steps": "Steps with running answers that took longer than --max-token-delay",
    "preemptions": "Sequences that gave their blocks back to older ones",
    "step_seconds": "Seconds in steps",
    "model_seconds": "Seconds of steps in the model",
    "communication_seconds": "Seconds of steps in collectives, waiting included",
}


class Metrics:
    """Counters and histograms of requests, and the engines' stats when asked for."""

    def __init__(self, engine: AsyncEngine):
        self.engine = engine
        self.registry = CollectorRegistry()
        self.requests = Counter("mpillama_requests", "Requests answered", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "mpillama_request_seconds", "Seconds from request to the end of its answer", ["path"],
            registry=self.registry, buckets=SECONDS,
        )  # fmt: skip
        self.first_token = Histogram(
            "mpillama_first_token_seconds", "Seconds from request to first token", registry=self.registry,
            buckets=SECONDS,
        )  # fmt: skip
        self.token = Histogram(
            "mpillama_token_seconds", "Seconds from one token of an answer to the next", registry=self.registry,
            buckets=SECONDS,
        )  # fmt: skip
        self.registry.register(EngineCollector(engine))
        self._asked = 0.0

    def note(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def page(self) -> bytes:
        """The text of /metrics."""
        now = time.monotonic()
        if now - self._asked > MEMORY_SECONDS:
            self._asked = now
            self.engine.ask_memory()
        return generate_latest(self.registry)


class TokenWatch:
    """Times the tokens of a request's answers, from now on."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._last: dict[int, float] = {}
        self._begin = time.monotonic()

    def note(self, index: int, output: Output) -> None:
        if not output.token_ids:
            return
        now, count = time.monotonic(), len(output.token_ids)
        last = self._last.get(index)
        self._last[index] = now
        if last is None:
            self._metrics.first_token.observe(now - self._begin)
            return
        for _ in range(count):
            self._metrics.token.observe((now - last) / count)


class EngineCollector(Collector):
    """The engines' state, one time series for each replica."""

    def __init__(self, engine: AsyncEngine):
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("mpillama_active_tasks", "Answers under way or waiting", self.engine.active)
        replicas = self.engine.state.replicas if self.engine.state else ()
        known = [(str(r.ranks.start), r.stats) for r in replicas]
        yield GaugeMetricFamily(
            "mpillama_replicas_failed",
            "Replicas that failed",
            sum(bool(r.failure) for r in replicas),
        )
        yield from (_series(GaugeMetricFamily, name, text, known) for name, text in GAUGES.items())
        yield from (_series(CounterMetricFamily, name, text, known) for name, text in COUNTERS.items())
        yield _memory([(r.ranks, r.stats) for r in replicas])


def _series(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, text: str,
    known: list[tuple[str, EngineStats]],
) -> Metric:  # fmt: skip
    family = kind(f"mpillama_{name}", text, labels=["replica"])
    for replica, stats in known:
        family.add_metric([replica], getattr(stats, name))
    return family


def _memory(known: list[tuple[range, EngineStats]]) -> Metric:
    family = GaugeMetricFamily("mpillama_memory_bytes", "Resident memory", labels=["rank"])
    for ranks, stats in known:
        for rank, resident in zip(ranks, stats.memory, strict=False):
            family.add_metric([str(rank)], resident)
    return family
