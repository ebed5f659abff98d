"""Engines of all modes in one process, which prefill and decode the same prompts in turns."""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import timing
from benchmarks.quality.traffic import Count, draw
from benchmarks.timing import DecodingBatch
from benchmarks.transfers.active import active_shares
from benchmarks.transfers.modes import MODES
from emoe_jax import Engine, SamplingParams
from emoe_jax.errors import ConfigError
from emoe_jax.traces import RoutingTrace
from train.tasks import TASKS

CONTEXT = 256
"""Tokens that an engine is loaded for."""
TOKENS_PER_SEQUENCE = 16
"""Room of a step, so that the first prompts of a batch do not end before the last ones have been read: the largest
batch says in which chunks prompts are read, at least 32 tokens."""

Tell = Callable[[str], None]
Save = Callable[[dict[str, Any]], None]


class Settings(NamedTuple):
    """What is measured: how often, how long, and over which link."""

    model: str
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    modes: tuple[str, ...] = tuple(MODES)
    share: float = 0.4
    """Of the experts that are resident in all modes but `all`."""
    link_gbps: float | None = None
    """The modelled link, in gigabytes (1e9 bytes) per second; None is the machine's own alone."""
    repeats: int = 3
    steps: int = 32
    """Decode steps that are timed: the tokens of an answer."""
    seed: int = 0


class Cell(NamedTuple):
    """A mode, and whether its loads go over the modelled link."""

    mode: str
    modelled: bool


class Once(NamedTuple):
    """One batch of prompts in one engine. Seconds are of wall time; counts are of prefill and decode together."""

    prefill_seconds: float
    step_seconds: float
    substituted: float
    counts: dict[str, float]


def measure(settings: Settings, tell: Tell = lambda _: None, save: Save = lambda _: None) -> dict[str, Any]:
    """A row per mode, link and batch: medians over repeats in which all modes take turns; `save` gets what there is.

    Raises `ConfigError` for an unknown mode, or where a policy needs what the checkpoint has not.
    """
    if unknown := [mode for mode in settings.modes if mode not in MODES]:
        raise ConfigError(f"unknown mode {unknown[0]!r}; expected some of {', '.join(MODES)}")
    cells = [Cell(mode, False) for mode in settings.modes]
    if settings.link_gbps is not None:
        cells += [Cell(mode, True) for mode in settings.modes if not MODES[mode].everything]
    results: dict[str, Any] = settings._asdict() | {"active": {}, "rows": []}
    with contextlib.ExitStack() as stack:
        engines: dict[Cell, Engine] = {}
        for cell in cells:
            tell(f"loading {_name(cell)}")
            engines[cell] = stack.enter_context(_engine(settings, cell))
        first = engines[cells[0]]
        prompts = Prompts(first, settings.seed)
        for cell, engine in engines.items():
            tell(f"compiling {_name(cell)}")
            compile_shapes(engine, prompts.by_length(), max(settings.batches))
        found: dict[tuple[Cell, int], list[Once]] = {}
        for repeat in range(settings.repeats + 1):  # the first is not timed: it says which experts are active
            for batch in settings.batches:
                tell(f"batch {batch}, {f'repeat {repeat} of {settings.repeats}' if repeat else 'warming up'}")
                asked = prompts.take(batch)
                for cell, engine in engines.items():
                    if repeat:
                        once = run_once(engine, asked, settings.steps)
                        found.setdefault((cell, batch), []).append(once)
                    elif MODES[cell.mode].everything:
                        results["active"][str(batch)] = _active(engine, asked, settings.steps)
                    else:
                        run_once(engine, asked, settings.steps)
            if repeat:
                results["rows"] = [
                    _row(cell, batch, engines[cell], each, settings) for (cell, batch), each in found.items()
                ]
                save(results)
    return results


class Prompts:
    """Test prompts of all tasks in one random order; each batch gets the next ones."""

    def __init__(self, engine: Engine, seed: int):
        if engine.tokenizer is None:
            raise ConfigError("the model has no tokenizer; this measurement reads the tasks' prompts")
        self._engine, self._seed = engine, seed
        self._round = 0
        self._left = self._more()

    def by_length(self) -> list[list[int]]:
        """One prompt, or more, of each length that engines tell apart, from the next ones. Takes none of them."""
        return list({max(len(prompt) - 1, 1).bit_length(): prompt for prompt in self._left}.values())

    def take(self, count: int) -> list[list[int]]:
        """The next prompts, as token ids."""
        while len(self._left) < count:
            self._left += self._more()
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def _more(self) -> list[list[int]]:
        assert self._engine.tokenizer is not None
        seed = self._seed + self._round
        self._round += 1
        items, _ = draw(self._engine.tokenizer, self._engine.config, TASKS, "test", seed, Count(20, 0))
        drawn = [list(item.prompt) for task in TASKS for item in items[task]]
        random.Random(seed).shuffle(drawn)
        return drawn


def compile_shapes(engine: Engine, prompts: Sequence[Sequence[int]], most: int) -> None:
    """Run every shape that prompts of these lengths and batches of up to `most` can meet, so that none is compiled
    while the clock runs. Unlike `Engine.warm_up` this compiles for the engine's own contract and no longer prompts.
    """
    params = SamplingParams(max_tokens=1, temperature=0)
    engine.generate([list(prompt) for prompt in prompts], params)
    shortest = min(prompts, key=len)
    for batch in [*(2**power for power in range((most - 1).bit_length())), most]:
        decoding = DecodingBatch(engine, [shortest] * batch, 2)
        decoding.step()
        decoding.stop()


def _name(cell: Cell) -> str:
    return f"{cell.mode} over the modelled link" if cell.modelled else cell.mode


def run_once(engine: Engine, prompts: Sequence[Sequence[int]], steps: int) -> Once:
    """Prefill a batch and time `steps` decode steps of all of it."""
    before = _totals(engine)
    began = time.perf_counter()
    decoding = DecodingBatch(engine, prompts, steps + 1)
    prefill = time.perf_counter() - began
    step = timing.per_call(decoding.step, steps).wall
    substituted = decoding.substituted()
    decoding.stop()
    after = _totals(engine)
    return Once(prefill, step, substituted, {name: after[name] - before[name] for name in after})


def _active(engine: Engine, prompts: Sequence[Sequence[int]], steps: int) -> dict[str, float]:
    """Which experts a batch uses, from a recording of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.npz"
        engine.record_traces(path)
        run_once(engine, prompts, steps)
        engine.stop_recording()
        return active_shares(RoutingTrace.load(path))


@contextlib.contextmanager
def _engine(settings: Settings, cell: Cell) -> Iterator[Engine]:
    most = max(settings.batches)
    with Engine.load(
        settings.model,
        **MODES[cell.mode].options(settings.share),
        link_gbps=settings.link_gbps if cell.modelled else None,
        max_num_seqs=most,
        max_num_batched_tokens=max(32, TOKENS_PER_SEQUENCE * most),
        max_model_len=CONTEXT,
        scheduling_policy="fcfs",
        prefix_caching=False,
        audit_rate=0.0,
    ) as engine:
        yield engine


def _totals(engine: Engine) -> dict[str, float]:
    """What an engine has done so far; only differences count."""
    state = engine.state()["residency"]
    loads = state["loads"]
    wishes = sum(map(sum, state["wishes"]))
    ahead = state["ahead"] or {}
    return {
        "wishes": wishes,
        "covered": round((state["coverage"] or 0.0) * wishes),
        "loads": loads["loads"],
        "moved_bytes": loads["staged_bytes"],
        "busy_seconds": loads["busy_seconds"],
        "waited_loads": loads["waited_loads"],
        "waited_seconds": loads["wait_seconds"],
        **{f"ahead_{name}": ahead.get(name, 0) for name in ("misses", "asked", "spared", "late", "useless")},
    }


def _row(cell: Cell, batch: int, engine: Engine, each: Sequence[Once], settings: Settings) -> dict[str, Any]:
    """One row of the results. Seconds, loads and bytes are of one batch of requests, from prompts to last tokens."""

    def median(values: Iterator[float]) -> float:
        return statistics.median(values)

    def total(name: str) -> float:
        return sum(once.counts[name] for once in each)

    per_batch = {name: total(name) / len(each) for name in ("loads", "moved_bytes", "busy_seconds", "waited_loads")}
    request = median(once.prefill_seconds + settings.steps * once.step_seconds for once in each)
    waited = median(once.counts["waited_seconds"] for once in each)
    transfer = per_batch["busy_seconds"]
    if cell.modelled and settings.link_gbps is not None:
        transfer = per_batch["moved_bytes"] / (1e9 * settings.link_gbps)
    report = engine.memory_report()
    asked, misses = total("ahead_asked"), total("ahead_misses")
    return {
        "mode": cell.mode,
        "link": "modelled" if cell.modelled else "machine",
        "batch": batch,
        "token_seconds": median(once.step_seconds for once in each),
        "prefill_seconds": median(once.prefill_seconds for once in each),
        "request_seconds": request,
        "expert_bytes": report["slab"],
        "transfer_seconds": transfer,
        "waited_seconds": waited,
        "compute_seconds": max(0.0, request - waited),
        "missed_share": 1 - total("covered") / max(total("wishes"), 1),
        "loads": per_batch["loads"],
        "waited_loads": per_batch["waited_loads"],
        "moved_bytes": per_batch["moved_bytes"],
        "substituted": statistics.mean(once.substituted for once in each),
        "spared_share": total("ahead_spared") / misses if misses else None,
        "asked_share": (total("ahead_spared") + total("ahead_late")) / misses if misses else None,
        "useless_share": total("ahead_useless") / asked if asked else None,
    }
