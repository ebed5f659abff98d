"""When the requests of `emoe bench serve` come."""

from typing import Literal

import numpy as np

from benchmarks.serving.arrivals import poisson

Process = Literal["poisson", "gamma", "constant", "closed"]
"""`closed` has no arrival times: so many users each ask again when they are answered."""


def arrival_times(process: Process, rate: float | None, count: int, seed: int, burstiness: float) -> list[float]:
    """Seconds from the start at which `count` requests come, `rate` of them per second on average.

    Without a rate all come at once. Gaps of `gamma` have the shape `burstiness`, as in vLLM: 1 is Poisson, less comes
    in bursts, and more is even.
    """
    if rate is None:
        return [0.0] * count
    if process == "constant":
        return [number / rate for number in range(count)]
    if process == "gamma":
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
        return np.cumsum(gaps).tolist()
    return poisson(rate, count, seed)
