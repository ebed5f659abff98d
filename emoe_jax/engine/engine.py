"""The programmatic interface: load a checkpoint under an expert-memory budget, generate, stream, look inside."""

import functools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from emoe_jax.audit.auditor import Auditor
from emoe_jax.config import ModelConfig
from emoe_jax.engine.answer import Answer
from emoe_jax.engine.arrivals import announce
from emoe_jax.engine.deliveries import Deliveries
from emoe_jax.engine.intake import Intake, Prompt, as_prompts
from emoe_jax.engine.keywords import config_of, with_options_of
from emoe_jax.engine.loading import EngineParts, StageProgress, load_parts
from emoe_jax.engine.loop import StepLoop
from emoe_jax.engine.quality import Quality
from emoe_jax.engine.vitals import Vitals
from emoe_jax.engine_config import EngineConfig
from emoe_jax.errors import RequestError
from emoe_jax.memory.trade import MemoryTrade
from emoe_jax.requests.contract import RoutingContract, allowance_of
from emoe_jax.requests.grammar import Grammars
from emoe_jax.requests.request import SLO, Delta, RequestOutput, SamplingParams
from emoe_jax.residency.admission import ExpertLoading
from emoe_jax.residency.foresight import Foresight
from emoe_jax.scheduling.registry import make_admission_policy
from emoe_jax.tasks import TaskProfile
from emoe_jax.traces.recorder import TraceRecorder


class Engine:
    """Generates from a Mixture-of-Experts checkpoint with a fixed number of experts per layer on the device.

    Use `Engine.load`. One thread owns an engine: nothing here locks. Each `step` commits experts that have been
    staged, runs one scheduled batch and returns what it added to the requests. A context manager; `close` joins the
    loader's threads.

        with Engine.load("checkpoints/demo", expert_memory="40%") as engine:
            print(engine.generate("Summarize: ...", SamplingParams(max_tokens=64))[0].text)
    """

    def __init__(self, parts: EngineParts):
        """The parts are the engine's from now on, and to be looked at only; `close` closes them."""
        runner, scheduler, residency = parts.runner, parts.scheduler, parts.residency
        self.parts = parts
        self.options = parts.options
        """As they were given, with what depends on the device filled in."""
        self.model_name = parts.model_name
        self.sampling_defaults = parts.sampling_defaults
        """Fields of `SamplingParams` for requests that leave them open, as the checkpoint says."""
        self.tokenizer = parts.tokenizer
        self.config: ModelConfig = runner.config
        self.memory = parts.memory
        self.grammars = Grammars(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)
        self._intake = Intake(self.config, self.tokenizer, self.grammars, parts.options)
        self._runner = runner
        self._scheduler = scheduler
        self._scheduling_policies = {scheduler.policy.name: scheduler.policy}
        self._residency = residency
        self.foresight = Foresight(residency, parts.planner, parts.regret, self.config.top_k)
        self._trade = MemoryTrade(self.memory, residency, scheduler, runner, self.foresight.slots_changed)
        self._answers: dict[str, Answer] = {}
        self._deliveries = Deliveries()
        self._closed = False
        self._next_id = 0
        self.auditor = Auditor(parts.dispatcher, residency, scheduler, parts.options, self._intake.target)
        self.loop = StepLoop(parts, self.foresight, self._trade, self.auditor, self._answers, self._deliveries)
        self.use_task_profile(parts.profile)

    @with_options_of(EngineConfig)
    @classmethod
    def load(
        cls,
        path: str | Path,
        config: EngineConfig | None = None,
        progress: StageProgress | None = None,
        **options: Any,
    ) -> "Engine":
        """Open a checkpoint directory (or hub id) and make as many of its experts resident as fit or are asked for.

        Options are an `EngineConfig`, which describes each of them, or its fields as keywords:

            Engine.load(path, expert_memory="40%", routing="exact")
            Engine.load(path, EngineConfig(expert_memory="40%", routing="exact"))

        `progress` is called with a stage ("weights", "experts"), what of it is done, and what there is to do. Raises
        `CheckpointError`, `ConfigError` or `CapacityError` with one line that names what is wrong; nothing stays
        allocated then.
        """
        config = config_of(config, options)
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
            policies[name] = make_admission_policy(
                name, scheduler, self.task_profile, ExpertLoading(self.task_profile, self._residency).seconds
            )
        scheduler.use_policy(policies[name])

    def record_traces(self, path: str | Path, prompt_tokens: bool = False) -> None:
        """Record the routing of requests that come from now on, in a trace that `stop_recording` or `close` finishes.

        With `prompt_tokens` the trace also holds the token ids of their prompts, which a predictor learns to read. It
        holds as many ranks of a router as the engine was loaded with (`trace_ranks`).

        Raises `ConfigError` when the file exists or cannot be written.
        """
        self.stop_recording()
        config = self.config
        choices = (len(config.moe_layers), config.num_experts, config.top_k, config.ranks)
        self._runner.recorder = TraceRecorder(path, *choices, embedding_size=config.hidden_size, tokens=prompt_tokens)

    def stop_recording(self) -> None:
        """Finish the trace, if one is being recorded. Raises `ConfigError` when it could not be written."""
        recorder, self._runner.recorder = self._runner.recorder, None
        for sequence in (*self._scheduler.running, *self._scheduler.waiting):
            sequence.sample = -1
        if recorder is not None:
            recorder.close()

    def warm_up(self, progress: StageProgress | None = None) -> None:
        """Compile all step shapes now, so that no request waits for the compiler.

        Raises `CapacityError` when it turns out that a step takes more memory than the plan has left for it.
        """
        self._trade.warm_up(None if progress is None else functools.partial(progress, "compile"))
        self.memory = self.memory.measured(self._runner.workspace_bytes)
        self.foresight.warm_up()
        self.grammars.warm_up()

    def generate(
        self,
        prompts: Prompt | Rows[Prompt],
        params: SamplingParams | None = None,
        *,
        task: str | None = None,
        routing: RoutingContract | None = None,
        tolerance: float | None = None,
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
        options = {"task": task, "routing": routing, "tolerance": tolerance, "slo": slo, "cache_salt": cache_salt}
        ids = []
        try:
            for prompt in as_prompts(prompts):
                ids.append(self._new_id())
                self.add_request(ids[-1], prompt, params, **options)
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
        tolerance: float | None = None,
        slo: SLO | None = None,
        cache_salt: str | None = None,
    ) -> Iterator[Delta]:
        """The answer to one prompt piece by piece. The first `next` starts it, closing the iterator aborts it.

        Several iterators may be open at once, beside calls of `generate` and `step`: whichever advances the engine,
        each iterator gets all its own deltas. A step that fails raises from the iterators that were part of it.
        """
        request_id = self._new_id()
        params = params or SamplingParams(**self.sampling_defaults)
        options = {"task": task, "routing": routing, "tolerance": tolerance, "slo": slo, "cache_salt": cache_salt}
        self.add_request(request_id, prompt, params, **options)
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

    def logits(
        self, token_ids: Rows[int], routing: RoutingContract | None = None, tolerance: float | None = None
    ) -> Float[np.ndarray, "T V"]:
        """Float32 logits of one uncached forward under the routing contract; NaN where the model computes NaN."""
        self._check_open()
        self._intake.check_tokens(token_ids)
        contract, bounded = self._intake.contract(routing, tolerance)
        return self._runner.logits(token_ids, allowance_of(contract, bounded or self._intake.bounded))

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
        tolerance: float | None = None,
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
        contract = self._intake.contract(routing, tolerance)
        sequences = self._intake.sequences(request_id, prompt, params, task, contract, slo, arrival, cache_salt)
        try:
            for sequence in sequences:
                self._scheduler.add(sequence)
        except RequestError:
            self._scheduler.abort(request_id)  # those of its sequences that came before the one refused
            raise
        announce(sequences, self._runner, self.foresight)
        self.auditor.arrived(sequences)
        self._answers[request_id] = Answer.of(sequences, self._intake.text_stream, self.config.top_k)
        return sequences[0].prompt_token_ids

    def has_work(self) -> bool:
        """Whether `step` has something to do or to return; without requests that is to audit answers."""
        return self._scheduler.has_work or self._deliveries.has_others or self.auditor.has_work

    def on_staged(self, call: Callable[[], None]) -> None:
        """Have `call` called, from another thread, when experts are staged: a sleeping owner may `step` then."""
        self._residency.on_staged(call)

    @property
    def vitals(self) -> Vitals:
        """From any thread: what tells a step that hangs from one that is at work."""
        return self.loop.vitals

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
            self._deliveries.put(self.loop.run())
        except Exception as error:
            if not self._deliveries.is_assigned(error):
                raise

    def abort(self, request_id: str) -> None:
        """End a request and free its pages. Unknown and finished ids are fine."""
        for sequence in self._scheduler.abort(request_id):
            self.loop.end(sequence, "abort")

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
        if not self.loop.in_flight:
            self._residency.commit()
        return {
            "model": self.model_name,
            "family": self.config.family,
            "routing": self.options.routing,
            "tolerance": self._intake.bounded.tolerance,
            "audit": self.auditor.state(),
            "forwards": dict(self.loop.dispatcher.forwards),
            "steps": self.loop.steps,
            "step_seconds": round(self.loop.step_seconds, 6),
            "not_finite": self.loop.not_finite,
            **self.foresight.state(),
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
        self.foresight.close()
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
