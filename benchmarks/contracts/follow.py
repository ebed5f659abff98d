"""A quality target over time: the tolerances that audits lead to, and what every answer lost, audited or not."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax, rel_entr

from benchmarks.quality.measure import FULL
from benchmarks.quality.served import Cell, engine_of, free, given, serve
from benchmarks.quality.traffic import Item, in_bursts
from emoe_jax import Engine
from emoe_jax.audit.findings import Estimate
from emoe_jax.requests.sequence import Sequence as EngineSequence
from emoe_jax.requests.served import ServedLogits
from emoe_jax.residency.accounts import UNCLASSIFIED

WINDOW = 50
"""Requests of a row of the summary."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """A request that ended: under which tolerance it was served, and what it lost."""

    request: int
    task: str
    tolerance: float
    tokens: int
    kl: float
    """KL(all experts || as served) per token, in nats, by a forward of another engine that has all experts."""
    audited: bool
    settled: bool
    """Whether the tolerance of its task was settled by then."""


class Rescored:
    """Keeps the logits of every answer of an engine, and compares them with those of an engine that has all experts.

    Which answers the engine audits does not change by that.
    """

    def __init__(self, engine: Engine, full: Engine):
        self.answered: list[Answered] = []
        self.seconds = 0.0
        """What scoring again took of the engine's steps."""
        self._engine, self._full = engine, full
        self._drawn: set[EngineSequence] = set()
        self._arrived, self._ended = engine.auditor.arrived, engine.auditor.ended
        engine.auditor.arrived, engine.auditor.ended = self._keep, self._compare

    def _keep(self, sequences: Sequence[EngineSequence]) -> None:
        self._arrived(sequences)
        first = sequences[0]
        if first.served is not None:
            self._drawn.add(first)
        else:
            first.served = ServedLogits(first.seed)

    def _compare(self, sequence: EngineSequence) -> None:
        began = time.monotonic()
        served = sequence.served
        assert served is not None
        positions = served.positions
        text = sequence.tokens(0, int(positions[-1]) + 1)
        ours = log_softmax(self._full.logits(text)[positions].astype(np.float64), axis=-1)
        theirs = log_softmax(served.logits(positions).astype(np.float64), axis=-1)
        kl = rel_entr(np.exp(ours), np.exp(theirs)).sum(axis=-1).mean()
        task = sequence.task or UNCLASSIFIED
        target = self._engine.auditor.target
        settled = target is not None and target.search(sequence.task).settled
        tolerance = sequence.allowance.tolerance
        row = (int(sequence.request_id), task, tolerance, len(sequence.generated), float(kl))
        self.answered.append(Answered(*row, sequence in self._drawn, settled))
        self.seconds += time.monotonic() - began
        if sequence in self._drawn:
            self._drawn.remove(sequence)
        else:
            sequence.served = None
        self._ended(sequence)


def follow(
    model: str,
    phases: Sequence[dict[str, list[Item]]],
    context: int,
    share: float,
    batch: int,
    policy: str,
    target: str,
    audit_rate: float,
    seed: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Serve the phases one after another, tasks of the same phase in bursts, under a quality target."""
    cell = Cell(policy, "bounded", share, (("quality_target", target), ("audit_rate", audit_rate)))
    with (
        engine_of(model, dataclasses.replace(FULL, policy="static"), context, 1, seed) as full,
        engine_of(model, cell, context, batch, seed) as engine,
    ):
        rescored = Rescored(engine, full)
        ends: list[int] = []
        for number, items in enumerate(phases):
            stream = in_bursts(items, seed + number)
            tell(f"phase {number + 1}: {len(stream)} requests of {', '.join(items)}")
            asked = [(item, free() if item.answer is not None else given(item)) for item in stream]
            serve(engine, asked, batch, lambda: None, first=len(rescored.answered))
            ends.append(len(rescored.answered))
        state = engine.state()
    answered = sorted(rescored.answered, key=lambda each: each.request)
    audit = state["audit"]
    return {
        "target": target,
        "share": share,
        "batch": batch,
        "phases": [{"tasks": list(items), "ends": end} for items, end in zip(phases, ends, strict=True)],
        "windows": list(windows(answered)),
        "estimates": list(estimates(answered, audit["contracts"].get("bounded", {}))),
        "audit_rate": audit_rate,
        "audits": audit["audits"],
        "audit_share": audit["seconds"] / (audit["seconds"] + state["step_seconds"] - rescored.seconds),
        "given_up": audit["given_up"],
        "tasks": audit["target"]["tasks"],
        "requests": [dataclasses.asdict(each) for each in answered],
    }


def windows(answered: Sequence[Answered]) -> Iterator[dict[str, Any]]:
    """By so many requests: tolerances, what was lost, and the share of the requests whose tolerance was settled."""
    for start in range(0, len(answered), WINDOW):
        part = answered[start : start + WINDOW]
        kl = Estimate.of([each.kl for each in part], [each.tokens for each in part])
        yield {
            "requests": f"{start}-{start + len(part) - 1}",
            "tolerance": float(np.mean([each.tolerance for each in part])),
            "perplexity_ratio": math.exp(kl.mean),
            "error": math.exp(kl.mean) * kl.error,
            "settled": float(np.mean([each.settled for each in part])),
            "audited": float(np.mean([each.audited for each in part])),
        }


def estimates(answered: Sequence[Answered], found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """By task: the audits' estimate under the last tolerance, and the same of all answers under it."""
    for task, numbers in found.items():
        every = [each for each in answered if each.task == task and each.tolerance == numbers["tolerance"]]
        if not every or numbers["kl"][2] is None:
            continue
        truth = Estimate.of([each.kl for each in every], [each.tokens for each in every])
        _, low, high = numbers["kl"]
        yield {
            "task": task,
            "tolerance": numbers["tolerance"],
            "answers": len(every),
            "audited": sum(each.audited for each in every),
            "kl": numbers["kl"][0],
            "low": low,
            "high": high,
            "kl_of_all": truth.mean,
            "within": bool(low <= truth.mean <= high),
        }
