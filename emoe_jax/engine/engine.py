"""The programmatic interface: load a checkpoint under an expert-memory budget, generate, stream, look inside."""

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from emoe_jax.config import ModelConfig
from emoe_jax.device.runner import Dispatched
from emoe_jax.engine.answer import Answer
from emoe_jax.engine.deliveries import Deliveries
from emoe_jax.engine.intake import Intake, Prompt
from emoe_jax.engine.loading import EngineParts, Progress, load_parts
from emoe_jax.engine.quality import Quality
from emoe_jax.engine_config import EngineConfig
from emoe_jax.errors import ConfigError, RequestError
from emoe_jax.memory.trade import MemoryTrade
from emoe_jax.requests.grammar import Grammars
from emoe_jax.requests.guide import settle
from emoe_jax.requests.request import (
    SLO,
    Completion,
    Delta,
    FinishReason,
    RequestOutput,
    RoutingContract,
    SamplingParams,
)
from emoe_jax.requests.sequence import Sequence, SequenceStatus
from emoe_jax.residency.admission import admission_policy
from emoe_jax.residency.foresight import Foresight
from emoe_jax.scheduling.plan import StepPlan, StepResult
from emoe_jax.tasks import TaskProfile
from emoe_jax.traces.recorder import TraceRecorder

log = logging.getLogger(__name__)

NOT_FINITE = "the model computed numbers that are not finite"

ROWS_AT_ONCE = 4096


class Engine:
    """Generates from a Mixture-of-Experts checkpoint with a fixed number of experts per layer on the device.

    Use `Engine.load`. One thread owns an engine: nothing here locks. Each `step` commits experts that have been
    staged, runs one scheduled batch and returns what it added to the requests. A context manager; `close` joins the
    loader's threads.

        with Engine.load("checkpoints/demo", expert_memory="40%") as engine:
            print(engine.generate("Summarize: ...", SamplingParams(max_tokens=64))[0].text)
    """

    def __init__(self, parts: EngineParts):
        """The parts are the engine's from now on; `close` closes them."""
        runner, scheduler, residency = parts.runner, parts.scheduler, parts.residency
        self.options = parts.options
        """As they were given, with what depends on the device filled in."""
        self.model_name = parts.model_name
        self.sampling_defaults = parts.sampling_defaults
        """Fields of `SamplingParams` for requests that leave them open, as the checkpoint says."""
        self.tokenizer = parts.tokenizer
        self.routing: RoutingContract = parts.options.routing
        self.config: ModelConfig = runner.config
        self.memory = parts.memory
        self.grammars = Grammars(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)
        self._intake = Intake(self.config, self.tokenizer, self.grammars, parts.options.seed)
        self._runner = runner
        self._scheduler = scheduler
        self._scheduling_policies = {scheduler.policy.name: scheduler.policy}
        self._residency = residency
        self._foresight = Foresight(residency, parts.planner, parts.regret, self.config.top_k)
        self._trade = MemoryTrade(self.memory, residency, scheduler, runner, self._foresight.slots_changed)
        self._in_flight: deque[Dispatched] = deque()  # oldest first, at most two
        self._waited_before: deque[float] = deque()  # seconds that steps had waited when each was planned
        self._waited_at_collect = 0.0
        self._over: tuple[float, float] | None = None  # when the oldest step was, if known, and the waits until then
        self._overlap = parts.options.overlap
        self._collected_at = 0.0
        self._step_seconds = 0.0
        self._load_wait = parts.options.load_wait_ms / 1e3
        self._answers: dict[str, Answer] = {}
        self._deliveries = Deliveries()
        self._suspect = False  # whether a step has failed since weights were last looked after
        self._closed = False
        self._next_id = 0
        self._steps = 0
        self._not_finite = 0
        self.use_task_profile(parts.profile)

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: EngineConfig | None = None,
        *,
        progress: Progress | None = None,
        **keywords: Any,
    ) -> "Engine":
        """Open a checkpoint directory (or hub id) and make as many of its experts resident as fit or are asked for.

        Options are an `EngineConfig`, which describes each of them, or its fields as keywords:

            Engine.load(path, expert_memory="40%", routing="exact")
            Engine.load(path, EngineConfig(expert_memory="40%", routing="exact"))

        `progress` is called with a stage ("weights", "experts"), what of it is done, and what there is to do. Raises
        `CheckpointError`, `ConfigError` or `CapacityError` with one line that names what is wrong; nothing stays
        allocated then.
        """
        if config is None:
            config = EngineConfig.of(**keywords)
        elif not isinstance(config, EngineConfig):
            raise ConfigError(f"config is {type(config).__name__}; expected an EngineConfig")
        elif keywords:
            raise ConfigError(f"{next(iter(keywords))} is given beside an EngineConfig; put it there")
        parts = load_parts(path, config, progress)
        try:
            engine = cls(parts)
            if config.record_traces is not None:
                engine.record_traces(config.record_traces, config.record_prompt_tokens)
        except BaseException:
            parts.close()
            raise
        return engine

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._scheduler.max_model_len

    @property
    def task_profile(self) -> TaskProfile | None:
        """What is known of the tasks of requests."""
        return self._intake.task_profile

    def use_task_profile(self, profile: TaskProfile | None) -> None:
        """Classify requests that name no task by this profile. Raises `ConfigError` when it is of another model."""
        self._intake.use_task_profile(profile)

    def use_scheduling_policy(self, name: str) -> None:
        """Admit by this policy from now on. One that was used before goes on with what it has learned.

        Raises `ConfigError` for an unknown name, `ValueError` while requests wait.
        """
        scheduler, policies = self._scheduler, self._scheduling_policies
        if name not in policies:
            policies[name] = admission_policy(name, self.task_profile, self._residency, scheduler)
        scheduler.use_policy(policies[name])

    def record_traces(self, path: str | Path, prompt_tokens: bool = False) -> None:
        """Record the routing of requests that come from now on, in a trace that `stop_recording` or `close` finishes.

        With `prompt_tokens` the trace also holds the token ids of their prompts, which a predictor learns to read.

        Raises `ConfigError` when the file exists or cannot be written.
        """
        self.stop_recording()
        config, table = self.config, self._runner.embedding_table()
        choices = (len(config.moe_layers), config.num_experts, config.top_k)
        self._runner.recorder = TraceRecorder(path, *choices, embedding_size=table.shape[1], tokens=prompt_tokens)

    def stop_recording(self) -> None:
        """Finish the trace, if one is being recorded. Raises `ConfigError` when it could not be written."""
        recorder, self._runner.recorder = self._runner.recorder, None
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            sequence.sample = -1
        if recorder is not None:
            recorder.close()

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compile all step shapes now, so that no request waits for the compiler.

        Raises `CapacityError` when it turns out that a step takes more memory than the plan has left for it.
        """
        self._trade.warm_up(None if progress is None else functools.partial(progress, "compile"))
        self.memory = self.memory.measured(self._runner.executables.workspace_bytes)
        self._foresight.warm_up()
        self.grammars.warm_up()

    def generate(
        self,
        prompts: Prompt | Rows[Prompt],
        params: SamplingParams | None = None,
        *,
        task: str | None = None,
        routing: RoutingContract | None = None,
        slo: SLO | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answers to all prompts (strings, or lists of token ids), in order. Raises `RequestError` before starting.

        May be called while iterators of `stream` are open, which then find what its steps did for them. A step that
        fails raises here if one of these prompts was part of it.
        """
        if not isinstance(params, SamplingParams | None):
            raise RequestError(f"params are {type(params).__name__}; expected one SamplingParams for all prompts")
        params = params or SamplingParams(**self.sampling_defaults)
        ids = []
        try:
            for prompt in _as_prompts(prompts):
                ids.append(self._new_id())
                self.add_request(ids[-1], prompt, params, task=task, routing=routing, slo=slo, cache_salt=cache_salt)
                self._deliveries.open(ids[-1], keep=False)
            while not all(self.output(request_id).finished for request_id in ids):
                self._advance()
                for request_id in ids:
                    self._deliveries.check(request_id)
            return [self.output(request_id) for request_id in ids]
        finally:
            for request_id in ids:
                self._forget(request_id)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        task: str | None = None,
        routing: RoutingContract | None = None,
        slo: SLO | None = None,
        cache_salt: str | None = None,
    ) -> Iterator[Delta]:
        """The answer to one prompt piece by piece. The first `next` starts it, closing the iterator aborts it.

        Several iterators may be open at once, beside calls of `generate` and `step`: whichever advances the engine,
        each iterator gets all its own deltas. A step that fails raises from the iterators that were part of it.
        """
        request_id = self._new_id()
        params = params or SamplingParams(**self.sampling_defaults)
        self.add_request(request_id, prompt, params, task=task, routing=routing, slo=slo, cache_salt=cache_salt)
        self._deliveries.open(request_id)
        answer = self._answers[request_id]
        try:
            while not answer.finished:
                yield from self._deliveries.take(request_id)
                if not answer.finished:
                    self._advance()
            yield from self._deliveries.take(request_id)
        finally:
            self._forget(request_id)

    def logits(self, token_ids: Rows[int], routing: RoutingContract | None = None) -> Float[np.ndarray, "T V"]:
        """Float32 logits of one uncached forward under the routing contract; NaN where the model computes NaN."""
        self._check_open()
        self._intake.check_tokens(token_ids)
        return self._runner.logits(token_ids, routing or self.routing)

    def quality(self, text: Prompt) -> Quality:
        """Perplexity of a text under the present residents and under all experts, and the KL between the two.

        Two uncached forwards. Raises `RequestError` for a text of fewer than two tokens, and where the model's logits
        are not finite.
        """
        token_ids = self._intake.tokenize(text)
        if len(token_ids) < 2:
            raise RequestError(f"the text has {len(token_ids)} tokens; 2 are needed to predict one", param="text")
        return Quality.of(token_ids, self.logits(token_ids, "resident"), self.logits(token_ids, "exact"))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        task: str | None = None,
        routing: RoutingContract | None = None,
        slo: SLO | None = None,
        arrival: float | None = None,
        cache_salt: str | None = None,
    ) -> list[int]:
        """Queue a request and return its prompt's token ids. Raises `RequestError`, queueing nothing.

        Its deadlines count from `arrival`, in seconds of `time.monotonic`: by default from now.
        It reuses, and leaves for reuse, only what was computed under the same `cache_salt`.
        """
        self._check_open()
        if request_id in self._answers:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        if routing not in (None, "resident", "exact"):
            raise RequestError(f"routing is {routing!r}; expected 'resident' or 'exact'", param="routing")
        routing = routing or self.routing
        sequences = self._intake.sequences(request_id, prompt, params, task, routing, slo, arrival, cache_salt)
        try:
            for sequence in sequences:
                self._scheduler.add(sequence)
        except RequestError:
            self._scheduler.abort(request_id)  # those of its sequences that came before the one refused
            raise
        self._foresee(sequences)
        token_ids = sequences[0].prompt_token_ids
        completions = [Completion(index, logprobs=None if params.logprobs is None else []) for index in range(params.n)]
        output = RequestOutput(request_id, token_ids, completions, sequences[0].task, sequences[0].routing)
        output.prompt_logprobs = None if params.prompt_logprobs is None else []
        self._answers[request_id] = Answer(output, sequences, self._intake.text_stream, self.config.top_k)
        return token_ids

    def has_work(self) -> bool:
        """Whether `step` has something to do or to return."""
        return self._scheduler.has_work or self._deliveries.has_others

    def on_staged(self, call: Callable[[], None]) -> None:
        """Have `call` called, from another thread, when experts are staged: a sleeping owner may `step` then."""
        self._residency.on_staged(call)

    def step(self) -> list[Delta]:
        """Commit staged experts, run one scheduled batch, and return what it added; `[]` when there is no work.

        What the batch added to requests of `stream` is left to their iterators. What the steps of `stream` and
        `generate` added to other requests since the last call is returned too.

        With `overlap` the batch after it is dispatched before its tokens are read, so that the device computes while
        the host books them.

        An exception of the device or of the expert store ends the requests of the batch with `error` and is raised
        after that; other requests go on with the next step. A sequence for which the model computes NaN or infinity
        ends with `error` and without another token; nothing is raised.
        """
        self._advance()
        return self._deliveries.take_others()

    def _advance(self) -> None:
        """One step. Raises only what no request's owner will be told of."""
        self._check_open()
        try:
            self._deliveries.put(self._run_step())
        except Exception as error:
            if not self._deliveries.is_assigned(error):
                raise

    def _run_step(self) -> list[Delta]:
        if self._in_flight and all(sequence.finished for sequence in self._in_flight[0].plan.sequences):
            self._collect()  # nobody waits for it
        due = self._trade.look()
        if not self._in_flight:
            if due is not None:
                self._trade.trade(due)
            self._dispatch()
        if self._overlap and due is None and self._in_flight and not self._in_flight[-1].plan.needs_tokens:
            self._dispatch()
        return self._collect() if self._in_flight else []

    def _dispatch(self) -> None:
        """Have the device begin the next step, if there is anything to do."""
        held = [sequence for sequence in self._scheduler.running if sequence.held]
        if held:
            guides = [s.adjustment.guide for s in held if s.adjustment is not None and s.adjustment.guide is not None]
            only = len(held) == self._scheduler.num_running and not self._scheduler.num_waiting
            settle(guides, idle=only and not self._in_flight)
        began = time.monotonic()
        if self._suspect:
            if self._in_flight:
                return  # its tokens are read first: the failed step may have taken the KV cache along
            self._residency.mend()
            if self._runner.mend():
                count = self._scheduler.num_running
                log.error("a failed step lost the KV cache; %d running sequences are computed again", count)
                self._scheduler.pages_lost()
            self._suspect = False
        self._residency.commit()
        if not self._scheduler.has_work:
            return
        plan = self._scheduler.schedule(began)
        waited = self._foresight.waited_seconds
        self._foresight.before_step(plan, self._scheduler, idle=not self._in_flight, wait=self._load_wait)
        if not plan:
            return
        if not self._in_flight:
            self._foresight.settle(plan, self._load_wait)
        elif self._runner.waits_within(plan):  # most of this step is over once it is dispatched: it is timed apart
            self._runner.wait(self._in_flight[0])
            self._over = time.monotonic(), self._foresight.waited_seconds
        try:
            self._in_flight.append(self._runner.dispatch(plan))
            self._waited_before.append(waited)
        except Exception as error:
            self._fail(plan, error)
            raise
        self._scheduler.dispatched(plan)

    def _collect(self) -> list[Delta]:
        """Wait for the oldest step in flight and book it."""
        dispatched, waited_before = self._in_flight.popleft(), self._waited_before.popleft()
        plan = dispatched.plan
        try:
            result = self._runner.collect(dispatched)
        except Exception as error:
            self._over = None
            self._fail(plan, error)
            self._scheduler.update(plan, StepResult({}))
            raise
        ended = time.monotonic()
        over, waited_by_then = self._over or (ended, self._foresight.waited_seconds)
        self._over = None
        seconds = over - max(plan.now, self._collected_at)  # the device was busy with the step before until then
        self._collected_at = over
        # Of that time, what went into waiting for loads and predictions is no computing time.
        waited = waited_by_then - max(waited_before, self._waited_at_collect)
        self._waited_at_collect = waited_by_then
        self._steps += 1
        awaited = [sequence for sequence in result.sampled if sequence.status is SequenceStatus.RUNNING]
        lost = [sequence for sequence in result.not_finite if sequence.status is SequenceStatus.RUNNING]
        self._scheduler.update(plan, result, seconds, waited=waited, ended=ended)
        self._foresight.after_step(plan, result.wishes, max(0.0, seconds - waited))
        deltas = [self._lose(sequence) for sequence in lost]
        for sequence in awaited:
            answer = self._answers[sequence.request_id]
            delta, stopped = answer.add(sequence, result.sampled[sequence])
            if stopped:
                self._scheduler.finish(sequence, "stop")
            deltas.append(delta)
            if sequence.adjustment is not None and not sequence.finished:
                sequence.adjustment.update(sequence.generated)
            if answer.finished:
                self._foresight.ended(answer.sequences)
        self._step_seconds += seconds + time.monotonic() - ended
        return deltas

    def _lose(self, sequence: Sequence) -> Delta:
        """End a completion for which the model computed NaN or infinity."""
        answer = self._answers[sequence.request_id]
        if all(completion.error is None for completion in answer.output.completions):  # once per request
            fields = {"request": sequence.request_id, "routing": sequence.routing, "tokens": sequence.num_known}
            log.error("a request ended: %s", NOT_FINITE, extra={"fields": fields})
        self._not_finite += 1
        delta = answer.fail(sequence, NOT_FINITE)
        if answer.finished:
            self._foresight.ended(answer.sequences)
        return delta

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """End the sequences of a plan that came to nothing."""
        self._suspect = True
        for sequence in plan.sequences:
            if not sequence.finished:
                self._deliveries.fail(sequence.request_id, error)
                self._scheduler.finish(sequence, "error")
                self._end(sequence, "error")

    def abort(self, request_id: str) -> None:
        """End a request and free its pages. Unknown and finished ids are fine."""
        for sequence in self._scheduler.abort(request_id):
            self._end(sequence, "abort")

    def output(self, request_id: str) -> RequestOutput:
        """The request so far. Raises `KeyError` for an unknown id."""
        return self._answers[request_id].output

    def pop(self, request_id: str) -> RequestOutput:
        """The request's output, forgetting (and aborting) the request."""
        self.abort(request_id)
        output = self.output(request_id)
        self._forget(request_id)
        return output

    def state(self) -> dict[str, Any]:
        """What the engine is doing, as JSON-able values. Commits what is staged if no step is in flight."""
        if not self._in_flight:
            self._residency.commit()
        return {
            "model": self.model_name,
            "family": self.config.family,
            "routing": self.routing,
            "steps": self._steps,
            "step_seconds": round(self._step_seconds, 6),
            "not_finite": self._not_finite,
            **self._foresight.state(),
            "scheduler": self._scheduler.state(),
            "memory": self.memory_report(),
            "memory_trade": self._trade.state(),
        }

    def memory_report(self) -> dict[str, int]:
        """Bytes on the device by purpose, and of the host tier."""
        return self.memory.report(self._trade.split)

    def trade_memory(self, lean: bool) -> None:
        """Have slab and KV cache trade places, or back, before the next step that finds no other in flight.

        What `memory_trade` does by itself when requests lack pages. Going back waits until the pages in use fit. Raises
        `ConfigError` where the memory plan has no such trade.
        """
        self._trade.ask(lean)

    def close(self) -> None:
        """Stop the loader's threads and finish the trace, if one is recorded.

        Afterwards outputs and state can be read; whatever would compute raises `RuntimeError`.
        """
        self._closed = True
        self.grammars.close()
        self._foresight.close()
        self.stop_recording()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")

    def _new_id(self) -> str:
        while True:
            self._next_id += 1
            if (request_id := f"engine-{self._next_id}") not in self._answers:
                return request_id

    def _forget(self, request_id: str) -> None:
        """Abort a request and drop all that is known of it; unknown ids are fine."""
        self.abort(request_id)
        self._answers.pop(request_id, None)
        self._deliveries.close(request_id)

    def _foresee(self, sequences: Rows[Sequence]) -> None:
        """Tell recorder and planner of a request that came."""
        recorder = self._runner.recorder
        token_ids, embedding = sequences[0].prompt_token_ids, None
        if recorder is not None or self._foresight.wants_embeddings:
            embedding = mean_row(self._runner.embedding_table(), token_ids)
            if not np.isfinite(embedding).all():
                embedding = None  # the predictor remembers those of earlier prompts
        self._foresight.arrived(sequences[0], embedding)
        if recorder is not None:
            for sequence in sequences:
                sequence.sample = recorder.begin(sequence.task, len(token_ids), embedding, token_ids)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a completion without a token, and with the last one its request."""
        answer = self._answers[sequence.request_id]
        answer.end(sequence, reason)
        if answer.finished:
            self._foresight.ended(answer.sequences)


def mean_row(table: Float[np.ndarray, "V D"], token_ids: Rows[int]) -> Float[np.ndarray, " D"]:
    """The mean of a table's rows, each distinct one read once and few at a time, in float32."""
    tokens, counts = np.unique(np.asarray(token_ids, np.int64), return_counts=True)
    total = np.zeros(table.shape[1], np.float32)
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        rows = table[tokens[start : start + ROWS_AT_ONCE]].astype(np.float32)
        total += counts[start : start + ROWS_AT_ONCE].astype(np.float32) @ rows
    return total / np.float32(len(token_ids))


def _as_prompts(prompts: Prompt | Rows[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Rows | np.ndarray):
        message = f"prompts are {type(prompts).__name__}; expected text, token ids, or a list of them"
        raise RequestError(message, param="prompt")
    items = list(prompts)
    if items and all(isinstance(item, int | np.integer) for item in items):
        return [items]  # pyright: ignore[reportReturnType]
    return items  # pyright: ignore[reportReturnType]
