"""Which tile sizes of the MoE op's kernels are fastest for a model's experts on this device, by rows per expert.

For each mean number of rows per expert, a search begins with the default sizes and changes one of them at a time,
keeping what is faster. Sizes that do not compile, or give other numbers than the default ones, are counted and left.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.verify_gpu.kernels import TOLERANCE
from emoe_jax.config import ModelConfig
from emoe_jax.errors import EmoeError
from emoe_jax.experts.record_format import RecordArray, RecordFormat
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.moe.kernel_config import DEFAULT_TABLE, KernelConfig, KernelTable
from emoe_jax.moe.operands import Operands
from emoe_jax.moe.triton import triton
from emoe_jax.planning.rates import seconds

Report = Callable[[str], None]


class Search(NamedTuple):
    """What is tried, and how long."""

    limits: tuple[int, ...] = (2, 16, 32, 64)
    """Rows per expert up to which a set of sizes holds; the last set is for all above."""
    means: tuple[int, ...] = (1, 8, 24, 48, 128)
    """Rows per expert at which each set is measured."""
    values: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("rows", (16, 32, 64, 128)),
        ("tile_in", (32, 64, 128)),
        ("tile_out", (32, 64, 128)),
        ("depth", (32, 64, 128)),
        ("warps", (4, 8)),
        ("stages", (2, 3, 4, 5)),
    )
    repetitions: int = 5
    calls: int = 16
    """Of the op in one measurement, so that starting it does not count."""
    interpret: bool = False


DRY = Search((2,), (1, 3), (("tile_in", (16, 32)), ("warps", (4, 8))), repetitions=1, calls=1, interpret=True)
"""The same path in moments, without a GPU."""


def small(config: ModelConfig) -> ModelConfig:
    """A model of the same kind whose kernels can be interpreted."""
    experts = min(4, config.num_experts)
    return config.replace(hidden_size=32, expert_hidden=64, num_experts=experts, top_k=min(2, experts, config.top_k))


def tune(
    config: ModelConfig, dtype: str, expert_format: str, search: Search, report: Report
) -> tuple[KernelTable, list[dict[str, Any]]]:
    """The fastest sizes, and a row of numbers for each limit. Raises `EmoeError` where none work."""
    experts = random_experts(config, expert_format)
    configs, rows = [], []
    for limit, mean in zip((*search.limits, None), search.means, strict=True):
        counts = [max(1, mean * config.num_experts // config.top_k)]
        if mean == 1 and counts[0] > 1:  # a sequence alone, too
            counts.insert(0, 1)
        cases = [case_of(config, dtype, experts, count) for count in counts]
        start = DEFAULT_TABLE.choose(counts[-1] * config.top_k, config.num_experts)
        trials = Trials(config, dtype, cases, search)
        best = trials.search(start)
        configs.append(best)
        row = {
            "rows_per_expert": limit,
            "rows": counts,
            "seconds": trials.taken[best],
            "default_seconds": trials.taken.get(start),
            "config": dataclasses.asdict(best),
            "tried": len(trials.taken),
            "failed": dict(trials.failed),
        }
        rows.append(row)
        report(f"{_named(limit)} rows per expert: {len(trials.taken)} sets of sizes, {1e3 * row['seconds']:.4g} ms")
    return KernelTable(search.limits, tuple(configs)), rows


class Trials:
    """Times of sets of sizes on the same cases, each measured once."""

    def __init__(self, config: ModelConfig, dtype: str, cases: Sequence[Operands], search: Search):
        self.taken: dict[KernelConfig, float] = {}
        """Seconds: the geometric mean over the cases."""
        self.failed: Counter[str] = Counter()
        self._config = config
        self._tolerance = TOLERANCE[dtype]
        self._cases = cases
        self._search = search
        self._wanted: list[np.ndarray] | None = None

    def search(self, start: KernelConfig) -> KernelConfig:
        """The fastest set that is found from `start` on. Raises `EmoeError` where none works."""
        best, least = start, self._time(start)
        for name, values in self._search.values:
            for changed in _changes(best, name, values):
                taken = self._time(changed)
                if taken < least:
                    best, least = changed, taken
        if math.isinf(least):
            found = ", ".join(self.failed) or "none was tried"
            raise EmoeError(f"no tile sizes work on this device: {found}")
        return best

    def _time(self, sizes: KernelConfig) -> float:
        if sizes in self.taken:
            return self.taken[sizes]
        run = partial(
            _run, config=self._config, sizes=sizes, calls=self._search.calls, interpret=self._search.interpret
        )
        try:
            results = [np.asarray(run(case), np.float32) for case in self._cases]
            if self._wanted is None:
                self._wanted = results
            if not all(map(self._is_right, results, self._wanted)):
                self.failed["other numbers than the default sizes give"] += 1
                return math.inf
            times = [seconds(partial(run, case), self._search.repetitions) for case in self._cases]
        except Exception as error:  # whatever the compiler says of sizes that a card cannot take
            self.failed[f"{type(error).__name__}: {error}".splitlines()[0][:200]] += 1
            return math.inf
        self.taken[sizes] = math.exp(sum(map(math.log, times)) / len(times)) / self._search.calls
        return self.taken[sizes]

    def _is_right(self, found: np.ndarray, wanted: np.ndarray) -> bool:
        return bool(np.max(np.abs(found - wanted)) <= self._tolerance * np.max(np.abs(wanted)))


def _changes(sizes: KernelConfig, name: str, values: Sequence[int]) -> Iterator[KernelConfig]:
    return (dataclasses.replace(sizes, **{name: value}) for value in values if value != getattr(sizes, name))


@partial(jax.jit, static_argnames=("config", "sizes", "calls", "interpret"))
def _run(operands: Operands, *, config: ModelConfig, sizes: KernelConfig, calls: int, interpret: bool) -> jax.Array:
    """The op so many times, one after the other, on the same rows."""
    table = KernelTable((), (sizes,))

    def call(_: Any, before: jax.Array) -> jax.Array:
        same_rows = operands.rows + before * jnp.zeros((), before.dtype)  # the compiler must not see that
        return triton(operands._replace(rows=same_rows), config, table=table, interpret=interpret)

    return jax.lax.fori_loop(0, calls, call, jnp.zeros_like(operands.rows))


def random_experts(config: ModelConfig, expert_format: str) -> ExpertWeights:
    """All experts of a layer, of any values, on the default device."""
    record = RecordFormat.of(config, expert_format)
    keys = jax.random.split(jax.random.key(0), len(record.arrays))
    made = {array.name: _random(key, config.num_experts, array) for key, array in zip(keys, record.arrays, strict=True)}
    return ExpertWeights(**made)


def _random(key: jax.Array, count: int, array: RecordArray) -> jax.Array:
    shape = (count, *array.shape)
    if array.name.endswith("scales"):
        if array.dtype == np.uint8:
            return jax.random.randint(key, shape, 118, 125, jnp.uint8)
        return jax.random.uniform(key, shape, array.dtype, 0.0001, 0.002)
    if array.dtype in (np.int8, np.uint8):
        return jax.random.randint(key, shape, 0, 120, array.dtype)
    return jax.random.normal(key, shape, array.dtype) * jnp.asarray(shape[-1] ** -0.5, array.dtype)


def case_of(config: ModelConfig, dtype: str, experts: ExpertWeights, count: int) -> Operands:
    """So many rows, each of which goes to random experts, all resident in shuffled slots."""
    rng, E, k = np.random.default_rng(count), config.num_experts, config.top_k
    ids = np.argsort(rng.random((count, E)), axis=1)[:, :k].astype(np.int32)
    rows = jax.random.normal(jax.random.key(count), (count, config.hidden_size), dtype)
    weights = jnp.full(ids.shape, 1 / k, jnp.float32)
    slots = jnp.asarray(rng.permutation(E).astype(np.int32))
    return Operands(rows, jnp.asarray(ids), weights, slots, experts, jnp.zeros_like(rows))


def _named(limit: int | None) -> str:
    return "more" if limit is None else f"up to {limit}"
