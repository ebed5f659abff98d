"""What the server's process takes, as Prometheus metrics: memory and time by their usual names, and compilations."""

import functools
import threading
from collections.abc import Iterator

import jax
from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric


class ProcessMetrics:
    """Counts compilations from its making on. Made once per process: nothing takes a listener off JAX again."""

    def __init__(self) -> None:
        self.compilations = 0
        self._read = threading.local()
        """`last`: whether what this thread asked the compiler for last was in the cache of an earlier start."""
        self._usual = ProcessCollector(registry=None)  # which tells nothing where there is no /proc
        jax.monitoring.register_event_listener(self._hear_of_cache)
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _hear_of_cache(self, event: str, **_: str | int) -> None:
        self._read.last = event == "/jax/compilation_cache/cache_hits" or getattr(self._read, "last", False)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            self.compilations += not getattr(self._read, "last", False)
            self._read.last = False

    def families(self, model_name: str) -> Iterator[Metric]:
        """The metrics up to now. Only the compilations are labelled with `model_name`."""
        yield from self._usual.collect()
        family = CounterMetricFamily(
            "emoe:compilations",
            "Compilations since the server began to answer; none is expected.",
            labels=["model_name"],
        )
        family.add_metric([model_name], self.compilations)
        yield family


@functools.cache
def process_metrics() -> ProcessMetrics:
    """Those of this process."""
    return ProcessMetrics()
