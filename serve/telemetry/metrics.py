"""What requests went through, as Prometheus metrics. Names and meaning are vLLM's, under `emoe:`."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0,
)  # fmt: skip
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
ANSWER_SECONDS = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)  # fmt: skip


class Histogram:
    """Counts of values up to each of `bounds`, which rise."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]):
        self._name, self._documentation = name, documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value. One that equals a bound is in that bound's bucket."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, model_name: str) -> Metric:
        """The cumulative counts up to now."""
        bounds = (floatToGoString(bound) for bound in (*self._bounds, float("inf")))
        family = HistogramMetricFamily(self._name, self._documentation, labels=["model_name"])
        family.add_metric([model_name], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        return family


class RequestMetrics:
    """Observed on the event loop while tokens are handed out, each of a request's answers by itself."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        """Answers that ended, by their finish reason."""
        self.first_token = Histogram(
            "emoe:time_to_first_token_seconds", "From a request's arrival to an answer's first token.",
            FIRST_TOKEN_SECONDS,
        )  # fmt: skip
        self.inter_token = Histogram(
            "emoe:inter_token_latency_seconds", "From one token of an answer to the next.", TOKEN_SECONDS
        )
        self.per_output_token = Histogram(
            "emoe:request_time_per_output_token_seconds", "Mean of an answer's times between tokens.", TOKEN_SECONDS
        )
        self.latency = Histogram(
            "emoe:e2e_request_latency_seconds", "From a request's arrival to an answer's last token.", ANSWER_SECONDS
        )
        self.queue = Histogram(
            "emoe:request_queue_time_seconds", "From arrival at the engine to an answer's first step.", ANSWER_SECONDS
        )

    def families(self, model_name: str) -> Iterator[Metric]:
        """All metrics of requests up to now, each labelled with `model_name`."""
        for name, documentation, value in (
            ("emoe:prompt_tokens", "Prompt tokens, cached ones included.", self.prompt_tokens),
            ("emoe:generation_tokens", "Tokens generated.", self.generation_tokens),
        ):
            family = CounterMetricFamily(name, documentation, labels=["model_name"])
            family.add_metric([model_name], value)
            yield family
        finished = CounterMetricFamily(
            "emoe:request_success", "Answers that ended.", labels=["model_name", "finished_reason"]
        )
        for reason, count in sorted(self.finished.items()):
            finished.add_metric([model_name, reason], count)
        yield finished
        for histogram in (self.first_token, self.inter_token, self.per_output_token, self.latency, self.queue):
            yield histogram.family(model_name)


class _Collector:
    """What a registry asks for metrics."""

    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def exposition(families: Iterable[Metric]) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(list(families)))  # pyright: ignore[reportArgumentType]
    return generate_latest(registry)
