"""From a request to its sequences. A request is checked, and fields that it leaves open are filled in."""

import dataclasses
import time
from collections.abc import Sequence as Rows

import numpy as np

from emoe_jax.audit.target import QualityTarget
from emoe_jax.checkpoint import Tokenizer
from emoe_jax.config import ModelConfig
from emoe_jax.engine_config import EngineConfig
from emoe_jax.errors import RequestError
from emoe_jax.requests.adjustment import LogitAdjustment
from emoe_jax.requests.contract import CONTRACTS, TOLERANCE, Allowance, RoutingContract
from emoe_jax.requests.grammar import Grammars
from emoe_jax.requests.request import SLO, SamplingParams, check_cache_salt, check_number
from emoe_jax.requests.sequence import Sequence
from emoe_jax.requests.text import TextStream
from emoe_jax.tasks import TaskClassifier, TaskProfile

MAX_CLASSIFIED_TOKENS = 4096
"""Of a prompt that came as token ids; the engine's thread turns no more than these into text."""

Prompt = str | Rows[int]


class Intake:
    """Tokenizer, task classifier, grammars and seeds of an engine. Raises `RequestError` for what cannot be served."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, grammars: Grammars, options: EngineConfig):
        self.task_profile: TaskProfile | None = None
        self._config = config
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._classifier: TaskClassifier | None = None
        self.bounded = options.bounded(config.top_k)
        """What requests under `bounded` may give up that name no tolerance, but for what the target says."""
        self._routing: RoutingContract = options.contract
        targets = options.targets
        self.target = None if targets is None else QualityTarget(targets, config.top_k)
        """The tolerances that are tuned, by task."""
        self._seeds = np.random.default_rng(options.seed)

    def use_task_profile(self, profile: TaskProfile | None) -> None:
        """Classify requests that name no task by this profile. Raises `ConfigError` when it is of another model."""
        if profile is not None:
            profile.check(self._config)
        self.task_profile = profile
        self._classifier = None if profile is None else TaskClassifier(profile)

    def contract(
        self, routing: RoutingContract | None, tolerance: float | None
    ) -> tuple[RoutingContract, Allowance | None]:
        """The contract of a request, and what it lets go under `bounded`, if it says so: a tolerance asks for that."""
        bounded = None
        if tolerance is not None:
            check_number("tolerance", tolerance, TOLERANCE)
            if routing not in (None, "bounded"):
                message = f"a tolerance is given with routing {routing!r}; it belongs to 'bounded'"
                raise RequestError(message, param="tolerance")
            routing, bounded = "bounded", dataclasses.replace(self.bounded, tolerance=float(tolerance))
        if routing not in (None, *CONTRACTS):
            *others, last = map(repr, CONTRACTS)
            raise RequestError(f"routing is {routing!r}; expected {', '.join(others)} or {last}", param="routing")
        return routing or self._routing, bounded

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The prompt as a new list of token ids.

        Raises `RequestError` for text where the model has no tokenizer, and for ids that `check_tokens` refuses.
        """
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError("the model has no tokenizer; give the prompt as a list of token ids", param="prompt")
            return self._tokenizer.encode(prompt)
        token_ids = list(prompt)
        self.check_tokens(token_ids)
        return token_ids

    def check_tokens(self, token_ids: Rows[int]) -> None:
        """Raises `RequestError` that names the first token id that is no integer or is outside the vocabulary."""
        vocab_size = self._config.vocab_size
        if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size:
            return  # nearly always, and ten times as fast as a look at each
        for token in token_ids:
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise RequestError(f"token id {token!r} is not an integer", param="prompt")
            if not 0 <= token < vocab_size:
                raise RequestError(f"token id {token} is outside the vocabulary of {vocab_size}", param="prompt")

    def sequences(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        task: str | None,
        contract: tuple[RoutingContract, Allowance | None],
        slo: SLO | None,
        arrival: float | None = None,
        cache_salt: str | None = None,
    ) -> list[Sequence]:
        """The `params.n` sequences of a request that arrived at `arrival`, by default now."""
        now = time.monotonic()
        check_cache_salt(cache_salt)
        token_ids = self.tokenize(prompt)
        if params.stop and self._tokenizer is None:
            raise RequestError("the model has no tokenizer, so stop strings cannot be found", param="stop")
        vocab_size = self._config.vocab_size
        for name in ("logit_bias", "stop_token_ids", "ending_token_ids", "forced_token_ids"):
            tokens = getattr(params, name)
            if beyond := [token for token in tokens if token >= vocab_size]:
                raise RequestError(f"{name} names token {beyond[0]}; the vocabulary has {vocab_size}", param=name)
        seed = params.seed if params.seed is not None else int(self._seeds.integers(2**63))
        if task is None:
            task = self._classify(prompt, token_ids)
        routing, bounded = contract
        tuned = routing == "bounded" and bounded is None and self.target is not None
        if tuned and self.target is not None:
            search = self.target.search(task)
            search.arrived()
            bounded = dataclasses.replace(self.bounded, tolerance=search.tolerance)
        return [
            Sequence(
                request_id,
                token_ids,
                params,
                index=index,
                routing=routing,
                bounded=bounded or self.bounded,
                tuned=tuned,
                task=task,
                slo=slo or self._usual_slo(task),
                arrival=now if arrival is None else min(arrival, now),
                queued_at=now,
                cache_salt=cache_salt,
                seed=seed,
                adjustment=LogitAdjustment.of(params, token_ids, vocab_size, self._grammars.guide(params)),
            )
            for index in range(params.n)
        ]

    def text_stream(self, sequence: Sequence) -> TextStream:
        """Turns a sequence's tokens into text as they come."""
        tokenizer = self._tokenizer
        params = sequence.params
        stream = None if tokenizer is None else tokenizer.stream(sequence.prompt_token_ids, params.shown_token_ids)
        return TextStream(stream, params.stop)

    def _classify(self, prompt: Prompt, token_ids: list[int]) -> str | None:
        """The task of a prompt, None without a task profile or without text."""
        if self._classifier is None or self._tokenizer is None:
            return None
        if isinstance(prompt, str):
            return self._classifier.classify(prompt)
        if len(token_ids) > MAX_CLASSIFIED_TOKENS:  # requests begin or end with what they ask for
            half = MAX_CLASSIFIED_TOKENS // 2
            token_ids = [*token_ids[:half], *token_ids[-half:]]
        return self._classifier.classify(self._tokenizer.decode(token_ids))

    def _usual_slo(self, task: str | None) -> SLO:
        """The deadlines of a request that names none: its task's, if it has some."""
        profiled = None if self.task_profile is None or task is None else self.task_profile.tasks.get(task)
        return SLO() if profiled is None or profiled.slo is None else profiled.slo


def as_prompts(prompts: Prompt | Rows[Prompt]) -> list[Prompt]:
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
