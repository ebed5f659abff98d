"""Audits: whether they find what scoring every token again finds, and what they cost in throughput."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import log_softmax, rel_entr

from benchmarks.quality.measure import FULL, Traffic
from benchmarks.quality.served import Cell, engine_of, free, given, serve
from benchmarks.quality.traffic import Item, in_bursts
from emoe_jax import Engine
from emoe_jax.audit.findings import LEAST, MOST_NATS, interval_of
from emoe_jax.requests.sequence import Sequence as EngineSequence
from emoe_jax.requests.served import MOST_KEPT, ServedLogits
from emoe_jax.residency.accounts import UNCLASSIFIED

PAUSE_AFTER = 8
"""Requests of the check after which none come until what waits for its audit has been audited."""

DRAWS = 2_000
"""Sets of audits that are drawn to tell how often their interval holds what all tokens lost; and sets of turns."""

Tell = Callable[[str], None]


class EveryToken(ServedLogits):
    """Keeps the logits of all tokens of an answer. An audit finds the sample that it would find without."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.rows: dict[int, Float[np.ndarray, " V"]] = {}
        """By position of the token that was fed."""

    def slot(self, token: int) -> int | None:
        """A place for every token."""
        return token

    def keep(self, token: int, position: int, logits: Float[np.ndarray, " V"]) -> None:
        self.rows[position] = logits
        slot = super().slot(token)
        if slot is not None:
            self._slots[slot] = position, logits


@dataclasses.dataclass(frozen=True)
class Scored:
    """An answer, all of whose tokens were scored again with all experts."""

    task: str
    kl: Float[np.ndarray, " tokens"]
    """KL(all experts || as served) of each token, in nats."""
    agrees: Bool[np.ndarray, " tokens"]
    """Whether both have the same most probable token."""
    audited: bool
    """Whether it was drawn for an audit."""

    def summary(self) -> dict[str, Any]:
        """Means over tokens, as JSON-able values."""
        means = {"kl": float(self.kl.mean()), "top1_agreement": float(self.agrees.mean())}
        return {"task": self.task, "tokens": len(self.kl), **means, "audited": self.audited}


class ScoredAgain:
    """Scores all tokens of all answers of an engine again, by one that has all experts. What is audited stays as is."""

    def __init__(self, engine: Engine, full: Engine):
        self.answers: list[Scored] = []
        self._full = full
        self._drawn: set[EngineSequence] = set()
        self._arrived, self._ended = engine.auditor.arrived, engine.auditor.ended
        engine.auditor.arrived, engine.auditor.ended = self._keep, self._score

    def _keep(self, sequences: Sequence[EngineSequence]) -> None:
        self._arrived(sequences)
        first = sequences[0]
        if first.served is not None:
            self._drawn.add(first)
        first.served = EveryToken(first.seed)

    def _score(self, sequence: EngineSequence) -> None:
        served = sequence.served
        assert isinstance(served, EveryToken)
        positions = sorted(served.rows)
        logits = self._full.logits(sequence.tokens(0, positions[-1] + 1))[positions]
        theirs = np.stack([served.rows[position] for position in positions])
        ours, served_log = (log_softmax(each.astype(np.float64), axis=-1) for each in (logits, theirs))
        kl = rel_entr(np.exp(ours), np.exp(served_log)).sum(axis=-1)
        agrees = logits.argmax(axis=-1) == theirs.argmax(axis=-1)
        self.answers.append(Scored(sequence.task or UNCLASSIFIED, kl, agrees, sequence in self._drawn))
        if sequence in self._drawn:
            self._drawn.remove(sequence)
        else:
            sequence.served = None
        self._ended(sequence)


def check(model: str, traffic: Traffic, cell: Cell, batch: int, seed: int, tell: Tell) -> dict[str, Any]:
    """Serve the traffic under a cell's contract and audit rate. Compare audits with all tokens, scored again."""
    stream = in_bursts(traffic.items, seed)
    everything = dataclasses.replace(FULL, policy="static")
    with (
        engine_of(model, everything, traffic.context, 1, seed) as full,
        engine_of(model, cell, traffic.context, batch, seed) as engine,
    ):
        again = ScoredAgain(engine, full)
        for first in range(0, len(stream), PAUSE_AFTER):
            tell(f"{first} of {len(stream)} requests")
            part = stream[first : first + PAUSE_AFTER]
            serve(engine, [(item, _asked(item)) for item in part], batch, lambda: None, first=first)
            while engine.has_work():
                engine.step()
        audit = engine.state()["audit"]
    rows = list(compared(again.answers, audit["contracts"][cell.contract], seed))
    return {
        "contract": cell.contract,
        "share": cell.share,
        "batch": batch,
        **dict(cell.options),
        "answers": len(again.answers),
        "tokens": sum(len(each.kl) for each in again.answers),
        "audits": audit["audits"],
        "given_up": audit["given_up"],
        "rows": rows,
        "requests": [each.summary() for each in again.answers],
    }


def _asked(item: Item) -> Any:
    return free() if item.answer is not None else given(item)


def compared(answers: Sequence[Scored], found: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """By task and measure: what audits say (`found`, of the engine's state), and what all tokens of all answers say.

    `covers`: of intervals that as many audits of these answers would give, the share that holds the latter.
    """
    common = {measure: _mean(answers, measure) for measure in ("kl", "top1_agreement")}
    for task, numbers in found.items():
        own = [each for each in answers if each.task == task]
        audits = numbers["audits"]
        truth = {measure: _mean(own, measure) for measure in common}
        truth["perplexity_ratio"] = math.exp(min(truth["kl"], MOST_NATS))
        covers = coverage(own, audits, common, seed) if audits >= LEAST else {}
        for measure, value in truth.items():
            estimate, low, high = numbers[measure]
            yield {
                "task": task,
                "measure": measure,
                "answers": len(own),
                "audited": audits,
                "estimate": estimate,
                "low": low,
                "high": high,
                "of_all": value,
                "within": None if low is None else bool(low <= value <= high),
                "covers": covers.get(measure),
            }


def coverage(answers: Sequence[Scored], audits: int, common: dict[str, float], seed: int) -> dict[str, float]:
    """How often the interval of so many audits, drawn from a task's answers with replacement, holds what all of them
    lost. `common` is the mean over all tasks.
    """
    rng = np.random.default_rng(seed)
    tokens = [len(each.kl) for each in answers]
    truth, held = {measure: _mean(answers, measure) for measure in common}, dict.fromkeys(common, 0)
    for _ in range(DRAWS):
        drawn = rng.integers(len(answers), size=audits)
        picks = [rng.permutation(tokens[index])[:MOST_KEPT] for index in drawn]
        weights = [tokens[index] for index in drawn]
        for measure, lossless, worst in (("kl", 0.0, MOST_NATS), ("top1_agreement", 1.0, 0.0)):
            values = [
                float(_of(answers[index], measure)[pick].mean()) for index, pick in zip(drawn, picks, strict=True)
            ]
            interval = interval_of(values, weights, lossless, worst, common[measure])
            assert interval is not None
            held[measure] += interval[1] - 1e-9 <= truth[measure] <= interval[2] + 1e-9
    shares = {measure: count / DRAWS for measure, count in held.items()}
    return shares | {"perplexity_ratio": shares["kl"]}  # one follows from the other


def _mean(answers: Sequence[Scored], measure: str) -> float:
    """Over all their tokens."""
    return float(np.concatenate([_of(each, measure) for each in answers]).mean())


def _of(answer: Scored, measure: str) -> np.ndarray:
    return answer.kl if measure == "kl" else answer.agrees


def cost(model: str, traffic: Traffic, cell: Cell, batch: int, turns: int, seed: int, tell: Tell) -> dict[str, Any]:
    """Tokens per second of an engine while it audits at the cell's rate, over those while it does not, in turns.

    One engine does both, because two engines that audit nothing differ by some per cent. It is given the same tokens
    each time, in another order each turn. A turn with audits ends when the last of them is done.
    """
    rate = dict(cell.options)["audit_rate"]
    stream = [item for items in traffic.items.values() for item in items]
    speeds: dict[bool, list[float]] = {True: [], False: []}
    with engine_of(model, cell, traffic.context, batch, seed) as engine:
        before: dict[str, Any] = {}
        step_seconds = 0.0
        for turn in range(turns + 1):  # the first is not timed: residents settle, and what is left is compiled
            random.Random(seed + turn).shuffle(stream)
            asked = [(item, given(item)) for item in stream]
            for audited in (True, False) if turn % 2 else (False, True):
                engine.auditor.rate = rate if audited else 0.0
                steps, began = engine.state()["step_seconds"], time.perf_counter()
                outputs = serve(engine, asked, batch, lambda: None, first=turn * len(stream))
                while engine.has_work():
                    engine.step()
                seconds = time.perf_counter() - began
                tokens = sum(len(item.prompt) for item, _ in asked)
                tokens += sum(len(output.completions[0].token_ids) for output in outputs)
                if turn:
                    speeds[audited].append(tokens / seconds)
                    step_seconds += engine.state()["step_seconds"] - steps if audited else 0.0
                tell(f"turn {turn}, {'with' if audited else 'without'} audits: {tokens / seconds:.0f} tokens/s")
            if not turn:
                before = _spent(engine)
        spent = _spent(engine)
    done = {name: spent[name] - value for name, value in before.items()}
    ratios = [one / other for one, other in zip(speeds[True], speeds[False], strict=True)]
    return {
        "contract": cell.contract,
        "share": cell.share,
        "batch": batch,
        "audit_rate": rate,
        "requests": turns * len(stream),
        "audits": done["audits"],
        "given_up": done["given_up"],
        "tokens_per_s": statistics.median(speeds[True]),
        "tokens_per_s_without": statistics.median(speeds[False]),
        **cost_of(ratios),
        "audit_share": done["seconds"] / (done["seconds"] + step_seconds),
        "ratios": ratios,
    }


def cost_of(ratios: Sequence[float]) -> dict[str, float | None]:
    """What a turn loses in the median, with its 95 % bootstrap interval over turns: one turn in which the machine did
    something else must not count for many. `ratios`: speeds with audits over those without; the ends are None for one.
    """
    low = high = None
    if len(ratios) > 1:
        drawn = np.random.default_rng(0).choice(np.asarray(ratios), (DRAWS, len(ratios)))
        high, low = (1 - float(end) for end in np.quantile(np.median(drawn, axis=1), [0.025, 0.975]))
    return {"cost": 1 - statistics.median(ratios), "low": low, "high": high}


def _spent(engine: Engine) -> dict[str, float]:
    audit = engine.state()["audit"]
    return {name: audit[name] for name in ("audits", "given_up", "seconds")}
