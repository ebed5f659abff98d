"""Requests to an engine in this process, whose scheduling policies take turns: no server per policy, and no HTTP.

All policies see the same engine, so that a machine's load, its compiled steps and its memory are the same for all.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from benchmarks.serving.client import clock
from benchmarks.serving.live import Report, Traffic, measure
from benchmarks.serving.report import Record
from benchmarks.serving.server import FIXED, ServerFailed
from benchmarks.serving.settings import Setting
from benchmarks.serving.workload import Job
from emoe_jax import Engine, SamplingParams
from emoe_jax.errors import RequestError
from emoe_jax.requests.contract import RoutingContract
from serve.generation import Submission
from serve.options import parse_options
from serve.refusals import EngineFailure
from serve.start import keep_compilations
from serve.start import load as load_engine
from serve.telemetry.metrics import RequestMetrics
from serve.telemetry.stats import RequestStats
from serve.worker import EngineWorker


class EngineClient:
    """Sends jobs to an engine that admits by the policy `name` from `begin` on."""

    def __init__(self, engine: Engine, worker: EngineWorker, name: str, routing: RoutingContract | None, most: int):
        self._engine = engine
        self._worker = worker
        self._name = name
        self._routing: RoutingContract | None = routing
        self._max_tokens = most

    async def begin(self) -> None:
        """Admit by this policy. Nothing may wait."""
        await self._worker.call(lambda _: self._engine.use_scheduling_policy(self._name))

    async def answer(self, job: Job, began: float) -> Record:
        """Send a job and read its answer; `began` is when the run did, on `clock`. Raises `ServerFailed`."""
        assert self._engine.tokenizer is not None
        prompt = self._engine.tokenizer.chat(list(job.sample.messages))
        fixed = job.answer_tokens
        params = SamplingParams(max_tokens=fixed or self._max_tokens, temperature=0, ignore_eos=fixed is not None)
        submission = Submission(prompt, params, job.task, self._routing, slo=job.slo)
        times: list[float] = []
        try:
            generation = self._worker.submit([submission], RequestStats(RequestMetrics()))
            await generation.accepted()
            async for batch in generation.batches():
                times += [clock() - began] * sum(len(progress.delta.token_ids) for progress in batch)
                if any(progress.delta.finish_reason == "error" for progress in batch):
                    raise ServerFailed("an answer broke off")
        except (RequestError, EngineFailure) as error:
            raise ServerFailed(f"a request failed: {error}") from None
        return Record(job, tuple(times))


def run_in_process(
    settings: Sequence[Setting],
    policies: Sequence[str],
    arguments: Sequence[str],
    loads: Sequence[Traffic],
    report: Report,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """What `run_live` gives, for each setting and each of the loads, which differ in their seeds: `keep` gets it when
    it is there. An engine is loaded for each residency, as a server with these `arguments` would load it.
    """
    keep_compilations()
    for residency, group in itertools.groupby(settings, key=lambda setting: setting.residency):
        size = ["--max-num-seqs", str(loads[0].concurrency), "--max-num-queued-reqs", str(loads[0].queued)]
        options = parse_options([*FIXED, *size, *Setting(residency).server_arguments, *arguments])
        engine = load_engine(options).engine
        try:
            engine.warm_up()  # what a server would leave for later
            asyncio.run(_run(engine, list(group), policies, loads, report, keep))
        finally:
            engine.close()


async def _run(
    engine: Engine,
    settings: Sequence[Setting],
    policies: Sequence[str],
    loads: Sequence[Traffic],
    report: Report,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    async with _working(engine, loads[0]) as worker:
        for setting in settings:
            clients = {
                name: EngineClient(engine, worker, name, setting.routing, loads[0].max_tokens) for name in policies
            }
            for load in loads:
                found = setting.of(await measure(clients, load, report), load.seed)
                state = await worker.call(lambda engine: engine.state())
                residency = state["residency"]
                found["engine"] = {"scheduler": state["scheduler"]} | {
                    key: residency[key] for key in ("loads", "coverage")
                }
                keep(found)


@contextlib.asynccontextmanager
async def _working(engine: Engine, load: Traffic) -> AsyncIterator[EngineWorker]:
    worker = EngineWorker(engine, load.concurrency + load.queued)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
