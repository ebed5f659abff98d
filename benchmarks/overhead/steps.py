"""Host work of a step: everything that `Engine.step` does but to compute on the device."""

import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emoe_jax import EmoeError, Engine, SamplingParams

PROMPT = 16  # tokens before decoding starts


class Replayed:
    """Stands for an engine's executables: a function is run once for each key, then its results are given again.

    The cache that a replayed step returns is the one that its first run made: it is given away to nobody since.
    """

    def __init__(self, call: Callable[..., Any]):
        self.runs = 0
        self._call = call
        self._results: dict[tuple[Any, Hashable], Any] = {}

    def __call__(self, function: Callable[..., Any], key: Hashable, *args: Any, **statics: Any) -> Any:
        if (function, key) not in self._results:
            self.runs += 1
            self._results[function, key] = jax.block_until_ready(self._call(function, key, *args, **statics))
        return self._results[function, key]


def host_overhead(model: str | Path, batch: int, steps: int) -> dict[str, float]:
    """Milliseconds per decode step of so many sequences: of the clock, and of the engine's thread on a CPU."""
    usual = {"prefix_caching": False, "expert_memory": "40%", "audit_rate": 0.0}
    with Engine.load(model, max_num_seqs=batch, max_model_len=PROMPT + steps + 24, **usual) as engine:
        rng = np.random.default_rng(0)
        params = SamplingParams(max_tokens=steps + 20, temperature=0.0, ignore_eos=True)
        for number in range(batch):
            prompt = rng.integers(0, engine.config.vocab_size, PROMPT).tolist()
            engine.add_request(str(number), prompt, params, routing="resident")
        while not all(engine.output(str(number)).token_ids for number in range(batch)):
            engine.step()
        executables = engine._runner.executables
        executables.call = replayed = Replayed(executables.call)
        for _ in range(4):
            engine.step()
        wall, cpu, runs = [], [], replayed.runs
        for _ in range(steps):
            began, began_cpu = time.perf_counter(), time.thread_time()
            engine.step()
            wall.append(time.perf_counter() - began)
            cpu.append(time.thread_time() - began_cpu)
        if replayed.runs > runs:
            raise EmoeError(
                f"{replayed.runs - runs} executables ran during steps whose host work alone was to be timed"
            )
    return {
        "host_ms_per_step": 1e3 * statistics.median(wall),
        "host_ms_per_step_p99": 1e3 * float(np.percentile(wall, 99)),
        "host_cpu_ms_per_step": 1e3 * statistics.mean(cpu),
    }
