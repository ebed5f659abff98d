"""Runs step plans: dispatches their batches, computes those again that missed experts they need, reads the tokens."""

import dataclasses
import time
from collections import deque
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from emoe_jax.device.batch import Batch, batches_of
from emoe_jax.device.readback import keep_for_audits, keep_prompt_logprobs, not_finite, sampled_token
from emoe_jax.device.recording import counts_by_sequence, record_routing
from emoe_jax.device.report import Report
from emoe_jax.device.runner import BatchRun, Runner
from emoe_jax.device.ways import Ways
from emoe_jax.policies.policy import ChunkWishes
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.residency import Residency, StepWishes
from emoe_jax.scheduling.plan import SampledToken, StepPlan, StepResult

MOST_FORWARDS = 3
"""Whole forwards of a batch with prompts, each with the experts that the one before missed. Then it goes by layers."""


@dataclasses.dataclass(eq=False)
class Dispatched:
    """A plan that the device is computing."""

    plan: StepPlan
    runs: list[BatchRun]
    error: Exception | None = None
    """What went wrong before it was collected."""


@dataclasses.dataclass(frozen=True)
class RunResult(StepResult):
    """A step's tokens, and how often its routers wished for each expert."""

    wishes: StepWishes


class Dispatcher:
    """`dispatch` plans, and `collect` them in the order of `in_flight`: one call on the device and one wait per batch.

    The next plan may be dispatched before the one before it is collected: it finds the tokens that it feeds on the
    device. A batch whose rows may need absent experts is first computed as if they needed none. Where its report says
    otherwise, it goes on from the first router that chose an absent expert, layer by layer; with prompts in it, the
    experts are loaded and it is computed again. So is all that was dispatched after it: what the KV cache got is
    overwritten.
    """

    def __init__(self, runner: Runner, residency: Residency):
        self.forwards: dict[str, int] = {"whole": 0, "again": 0, "layered": 0}
        """Of batches that might need absent experts: whole ones, those of them that were computed again, others."""
        self._runner, self._residency = runner, residency
        self._places: dict[Sequence, int] = {}  # of the tokens that the newest plan samples
        self._first_place = 0  # of the newest plan: plans take turns
        self.ways = Ways()
        self._looks_ahead = residency.waves.ahead is not None  # from layer to layer: a forward has to stop at each
        self.in_flight: deque[Dispatched] = deque()
        """Oldest first. Who collects a plan takes it off."""
        self._read_at = 0.0
        self._compiled = 0.0

    def dispatch(self, plan: StepPlan) -> Dispatched:
        """Start computing a plan, whose sequences may wait for tokens of the plan before.

        Raises what the expert store raises where it is computed layer by layer; the cache stays usable.
        """
        buckets, config = self._runner.buckets, self._runner.config
        tables = self._runner.tables
        tables.begin_plan()
        batches = batches_of(plan, buckets, tables, alone=config.router.capacity_factor is not None)
        before, self._places = self._places, {}
        self._first_place = (self._first_place + buckets.sequences[-1]) % buckets.token_places
        dispatched = Dispatched(plan, [])
        self.in_flight.append(dispatched)
        try:
            for batch in batches:
                batch.await_tokens(before)
                batch.keep_tokens(self._places, self._first_place)
                dispatched.runs.append(self._start(batch))
        except Exception:
            self.in_flight.pop()
            tables.forget()
            raise
        return dispatched

    def waits_within(self, plan: StepPlan) -> bool:
        """Whether `dispatch` waits for the device: where it stops at routers, which say what is to be loaded."""
        if not self._may_miss(any(sequence.routing != "resident" for sequence in plan.sequences)):
            return False
        buckets = self._runner.buckets
        chunks = [chunk.length for chunk in plan.prefills if chunk.length > 1]
        if not buckets.fits(chunks):
            return True
        shape = buckets.fit(len(plan.decodes) + len(plan.prefills), chunks)
        return self._looks_ahead or self.ways.peek(shape) == "layered"

    def is_doubtful(self, dispatched: Dispatched) -> bool:
        """Whether a plan that builds on this one would likely have to be computed again with it."""
        return not self.ways.overlaps and any(
            run.way == "whole" and self._may_miss(run.batch.may_need) for run in dispatched.runs if run.read is None
        )

    def wait(self, dispatched: Dispatched) -> None:
        """Wait until the device is done with a plan. What went wrong is raised by `collect`."""
        self._settle_plan(dispatched)

    def collect(self, dispatched: Dispatched) -> RunResult:
        """Wait for a plan's tokens, and count the expert assignments of each sequence that has not ended meanwhile."""
        self._settle_plan(dispatched)
        if dispatched.error is not None:
            raise dispatched.error
        config, recorder = self._runner.config, self._runner.recorder
        sampled: dict[Sequence, SampledToken] = {}
        lost: set[Sequence] = set()
        choices = len(config.moe_layers) * config.top_k
        wish_counts = np.zeros((len(config.moe_layers), config.num_experts), np.int64)
        resident_counts = np.zeros_like(wish_counts)
        chunks: list[ChunkWishes] = []
        for run in dispatched.runs:
            batch, output = run.batch, run.read
            assert output is not None
            report = Report.read(output.report, batch.shape, config)
            tokens = report.tokens if output.tokens is None else output.tokens
            wish_counts += report.wish_counts
            resident_counts += report.wish_counts * run.resident
            prompt_logprobs = None
            if output.prompt_logprobs:
                prompt_logprobs = jax.tree.map(lambda *parts: np.concatenate(parts), *output.prompt_logprobs)
            spoilt = not_finite(batch, report.finite, prompt_logprobs)
            lost |= spoilt
            if recorder is not None and output.ranked_probs is not None:
                record_routing(recorder, batch, report.ranked, output.ranked_probs, spoilt)
            keep_for_audits(batch, output.kept, output.comparison)
            routed = counts_by_sequence(batch, report.ranked[..., : config.top_k], config.num_experts)
            for place, piece in enumerate(batch.pieces):
                if piece.length > 1 and piece.sequence not in spoilt:
                    chunks.append(ChunkWishes(routed[place], piece.length))  # of an ended one too: `report` has them
                if piece.sequence.finished or piece.sequence in spoilt:
                    continue
                piece.sequence.add_routing(routed[place])
                piece.sequence.substituted += int(report.substituted_choices[place])
                piece.sequence.substituted_weight += float(report.substituted_weight[place])
                piece.sequence.assigned += piece.length * choices
                if prompt_logprobs is not None:
                    keep_prompt_logprobs(batch, place, prompt_logprobs)
                if piece.samples:
                    token = int(tokens[place])
                    sampled[piece.sequence] = sampled_token(piece.sequence, token, output.logprobs, place)
        return RunResult(sampled, StepWishes(wish_counts, resident_counts, chunks), not_finite=frozenset(lost))

    def _may_miss(self, may_need: bool) -> bool:
        return may_need and not self._residency.is_full

    def _start(self, batch: Batch) -> BatchRun:
        """Dispatch a batch for the first time, in the way that takes less time."""
        run = BatchRun(batch, "whole")
        if self._may_miss(batch.may_need):
            run.way = "layered" if self._looks_ahead else self.ways.choose(batch.shape)
            self.forwards[run.way] += 1
        if run.way == "layered":
            for dispatched in self.in_flight:  # it is not to be computed again with what came before
                self._settle_plan(dispatched)
            run.began = time.monotonic()
        self._runner.compute(run)
        return run

    def _settle_plan(self, dispatched: Dispatched) -> None:
        """Have a plan stand, where those before it do. What goes wrong is kept with the plan."""
        try:
            for run in dispatched.runs:
                self._settle(run)
        except Exception as error:
            dispatched.error = dispatched.error or error

    def _settle(self, run: BatchRun) -> None:
        """Wait for a batch, and compute it again until no expert that it needs is absent."""
        if run.read is not None:
            return
        might_miss, first_way = self._may_miss(run.batch.may_need), run.way
        tries, read = 1, jax.device_get(run.outputs)
        while run.way == "whole" and might_miss and (layer := self._first_missing(run, read)) is not None:
            tries += 1
            if run.stops is not None:
                run.way = "layered"  # from there on
                outputs = self._runner.go_on(run, layer)
            else:
                if tries > MOST_FORWARDS or not self._loads(run, read):
                    run.way = "layered"
                outputs = self._runner.compute(run)
            read = jax.device_get(outputs)
        run.read = read
        if might_miss:
            compiled, now = self._runner.executables.seconds, time.monotonic()
            seconds = now - max(run.began, self._read_at) - (compiled - self._compiled)
            self.ways.took(run.batch.shape, first_way, max(0.0, seconds), tries > 1)
            self._compiled = compiled
            self.forwards["again"] += tries - 1
        self._read_at = time.monotonic()
        if tries > 1:
            for later in self._unread():
                self._runner.compute(later)

    def _first_missing(self, run: BatchRun, read: Any) -> int | None:
        """The first MoE layer in which a whole forward needed an absent expert. None where it stands."""
        assert run.seen is not None
        missing = self._needed(run, read) & ~run.seen
        return int(np.flatnonzero(missing.any(axis=1))[0]) if missing.any() else None

    def _loads(self, run: BatchRun, read: Any) -> bool:
        """Load what a whole forward needed, as a guess behind the first layer that missed an expert, too. False, and
        nothing is loaded, where that layer has fewer slots.
        """
        assert run.seen is not None
        needed = self._needed(run, read)
        fits = needed.sum(axis=1) <= np.asarray(self._residency.table.capacities)
        if not fits[np.flatnonzero((needed & ~run.seen).any(axis=1))[0]]:
            return False
        self._residency.load(needed & fits[:, None])
        return True

    def _needed(self, run: BatchRun, read: Any) -> Bool[np.ndarray, "M E"]:
        return Report.read(read.report, run.batch.shape, self._runner.config).needed

    def _unread(self) -> list[BatchRun]:
        """What was dispatched after the last batch that was read, in order."""
        return [run for dispatched in self.in_flight for run in dispatched.runs if run.read is None]
