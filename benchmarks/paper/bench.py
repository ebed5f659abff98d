"""`Bench`: what the rows are measured on, and the measurements that several of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.paper.cache import Cache
from benchmarks.paper.claim import Numbers
from benchmarks.paper.sizes import Sizes
from benchmarks.quality.measure import FULL, Measured, Traffic, measure
from benchmarks.quality.scores import mean_over
from benchmarks.quality.served import Cell
from benchmarks.quality.traffic import ALL_TASKS, PROMPT_TASKS, Count
from train import traces

ENGINE = ("emoe_jax", "serve", "train")
"""Code that every result depends on, beside its instrument's."""

SHARE = 0.4
"""Experts resident where the paper does not vary them."""
CONCURRENCY = 16
"""Sequences computed together where answers are compared."""


class Bench:
    """A model, routing traces of it and of others, and the results that are kept of them."""

    def __init__(
        self,
        model: str,
        others: Mapping[str, Path],
        sizes: Sizes,
        cache: Cache,
        report: Callable[[str], None],
        seed: int,
        link_gbps: float,
    ):
        """`others` are traces of further models, by the models' names."""
        self.model, self.others, self.sizes, self.seed, self.link_gbps = model, dict(others), sizes, seed, link_gbps
        self.report = report
        self.seconds = 0.0
        """Of the results that were asked for since it was last set to 0."""
        self._cache = cache
        self._cells: dict[Cell, Numbers] = {}
        self._traffic: Traffic | None = None

    def kept(self, name: str, parameters: Mapping[str, Any], code: Sequence[str], make: Callable[[], Any]) -> Any:
        """A JSON-able result of an instrument; made now, or by an earlier run from the same model, traces and code."""

        def reported() -> Any:
            self.report(name)
            return make()

        value, seconds = self._cache.value(name, {"seed": self.seed, **parameters}, code, reported)
        self.seconds += seconds
        return value

    def trace(self) -> Path:
        """Routing of the model on training prompts of all tasks."""

        def record(path: Path) -> None:
            self.report("routing trace of the model")
            argv = ["--model", self.model, "--per-task", str(self.sizes.traced), "--seed", str(self.seed)]
            argv += ["--tasks", *PROMPT_TASKS, "--out", str(path)]
            traces.record(traces.arguments(argv), Console(quiet=True))

        parameters = {"per_task": self.sizes.traced, "seed": self.seed}
        path, seconds = self._cache.file("trace", parameters, ENGINE, ".npz", record)
        self.seconds += seconds
        return path

    @property
    def traces(self) -> dict[str, Path]:
        """All traces by the names of their models; the demo's first."""
        return {"demo": self.trace(), **self.others}

    def traffic(self) -> Traffic:
        """What is asked where answers are compared."""
        if self._traffic is None:
            count = Count(self.sizes.prompts, self.sizes.stretches)
            self._traffic = Traffic.of(self.model, ALL_TASKS, count, self.seed)
        return self._traffic

    def cells(self, wanted: Iterable[Cell]) -> list[Numbers]:
        """Each cell's rows, means with intervals, and the engine's state, compared with all experts resident. What is
        not known yet is measured in one run; each cell is kept as soon as it is done."""
        wanted = [*wanted]
        missing = [cell for cell in dict.fromkeys(wanted) if not self._read(cell)]
        if missing:
            traffic = self.traffic()
            grid = [cell for cell in missing if cell != FULL]
            for done in measure(self.model, grid, traffic, CONCURRENCY, self.seed, self.sizes.draws, self.start):
                cell = done.rows[0].cell
                self._cache.keep(self._path(cell), numbers_of(done), done.seconds)
                self._read(cell)
        for cell in wanted:
            self.seconds += self._cells[cell]["seconds"]
        return [self._cells[cell] for cell in wanted]

    def _read(self, cell: Cell) -> bool:
        if cell not in self._cells and self._path(cell).exists():
            kept = self._cache.value("cell", self._parameters(cell), self._code, lambda: None)
            self._cells[cell] = {**kept.value, "seconds": kept.seconds}
        return cell in self._cells

    _code = (*ENGINE, "benchmarks/quality")

    def _path(self, cell: Cell) -> Path:
        return self._cache.path("cell", self._parameters(cell), self._code, ".json")

    def _parameters(self, cell: Cell) -> dict[str, Any]:
        sizes = self.sizes
        return {
            **dataclasses.asdict(cell),
            "seed": self.seed,
            "prompts": sizes.prompts,
            "stretches": sizes.stretches,
            "draws": sizes.draws if cell.policy == "random" else 1,
        }

    def start(self, title: str, requests: int) -> Callable[[], None]:
        """Say what begins; nothing is said of single requests."""
        self.report(f"{title}: {requests} requests")
        return lambda: None


def numbers_of(done: Measured) -> Numbers:
    """A cell as JSON: `means` has `[mean, low, high]` of each metric over tasks, or over texts for perplexity."""
    asked = [row for row in done.rows if row.task in PROMPT_TASKS]
    read = [row for row in done.rows if row.task not in PROMPT_TASKS]
    means = {name: mean_over(name, asked) for name in ("similarity", "exact_match", "substituted")}
    means["perplexity_ratio"] = mean_over("perplexity_ratio", read or asked)
    state = done.state
    return {
        "rows": {row.task: row.as_json() for row in done.rows},
        "means": means,
        "step_seconds": state["step_seconds"],
        "coverage": state["residency"]["coverage"],
        "loads": state["residency"]["loads"],
        "planner": state.get("planner"),
    }
