"""Traffic through an engine as a server would run it, and what came of each item."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.traffic import Item
from benchmarks.quality.without import engine_without
from emoe_jax import EmoeError, Engine, RequestOutput, SamplingParams
from emoe_jax.engine_config import EngineConfig
from emoe_jax.requests.contract import RoutingContract

ANSWER_TOKENS = 64

Tell = Callable[[], None]
"""Called when a request has ended."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of the grid. A share of 1 has all experts resident, whatever the policy."""

    policy: str
    contract: RoutingContract
    share: float
    options: tuple[tuple[str, Any], ...] = ()
    """Further options of the engine, by name."""
    model: str | None = None
    """Another checkpoint than the reference's, with the same tokenizer."""
    without: str | None = None
    """A part of `emoe` that its engine lacks, of `benchmarks.quality.without`."""
    misnamed: float | None = None
    """Share of prompts whose request names another task than its own; the others name their own. None: no request
    names a task, and the engine classifies them."""

    @property
    def name(self) -> str:
        """The policy, and what it lacks."""
        return self.policy if self.without is None else f"{self.policy} without {self.without}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one item: the greedy answer (None of a text), the nats of its scored tokens, and what was substituted while
    the answer was written, or the text read."""

    answer: RequestOutput | None
    nats: float
    tokens: int
    substituted: float
    substituted_weight: float


@contextlib.contextmanager
def engine_of(
    model: str, cell: Cell, context: int, concurrency: int, seed: int, profile: Path | None = None
) -> Iterator[Engine]:
    """A warm engine of a cell; `profile` replaces the checkpoint's own task profile."""
    config, model = config_of(cell, context, concurrency, seed, profile), cell.model or model
    if cell.without is not None:
        with engine_without(cell.without, model, config) as engine:
            yield engine
        return
    with Engine.load(model, config) as engine:
        engine.warm_up()
        yield engine


def config_of(cell: Cell, context: int, concurrency: int, seed: int, profile: Path | None = None) -> EngineConfig:
    """The options of a cell's engine. Those of the cell go before all others."""
    options: dict[str, Any] = {
        "expert_memory": f"{100 * cell.share:g}%",
        "routing": cell.contract,
        "policy": cell.policy,
        "max_num_seqs": concurrency,
        "max_model_len": context,
        "prefix_caching": False,
        "audit_rate": 0.0,
        "task_profile": "auto" if profile is None else profile,
        "seed": seed,
    }
    return EngineConfig(**options | dict(cell.options))


def outcomes(
    engine: Engine,
    stream: Sequence[Item],
    concurrency: int,
    tell: Tell,
    name_tasks: bool = False,
    waiting: int | None = None,
) -> list[Outcome]:
    """Every item served once in the order of the stream: prompts answered, texts read. Then the true answers to the
    prompts, in the same order. What is read or given is decoded, one token of each sequence per step.
    """
    first = [(item, free() if item.answer is not None else given(item)) for item in stream]
    served = serve(engine, first, concurrency, tell, name_tasks, waiting)
    then = [(item, given(item)) for item in stream if item.answer is not None]
    told = iter(serve(engine, then, concurrency, tell, name_tasks, waiting))
    found = []
    for item, output in zip(stream, served, strict=True):
        scored = output if item.answer is None else next(told)
        nats = -sum(token.logprob for token in scored.logprobs or ())
        answer = None if item.answer is None else output
        found.append(Outcome(answer, nats, len(item.scored), output.substituted, output.substituted_weight))
    return found


def free() -> SamplingParams:
    return SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0)


def given(item: Item) -> SamplingParams:
    return SamplingParams(forced_token_ids=item.scored, logprobs=0)


def serve(
    engine: Engine,
    requests: Sequence[tuple[Item, SamplingParams]],
    concurrency: int,
    tell: Tell,
    name_tasks: bool = False,
    waiting: int | None = None,
    first: int = 0,
) -> list[RequestOutput]:
    """All outputs, in order. `concurrency` requests are computed together, and `waiting` (as many) wait for their turn.

    Requests name no task unless `name_tasks`: the engine classifies them. Their ids are numbers from `first` on. Raises
    `EmoeError` where one failed.
    """
    outputs: dict[int, RequestOutput] = {}
    at_once = concurrency + (concurrency if waiting is None else waiting)
    added = 0
    while len(outputs) < len(requests):
        while added < len(requests) and added - len(outputs) < at_once:
            item, params = requests[added]
            engine.add_request(str(first + added), item.prompt, params, task=item.task if name_tasks else None)
            added += 1
        for delta in engine.step():
            if delta.finish_reason is not None:
                number = int(delta.request_id) - first
                outputs[number] = engine.pop(delta.request_id)
                if delta.error is not None:
                    raise EmoeError(f"a prompt of {requests[number][0].task} failed: {delta.error}")
                tell()
    return [outputs[number] for number in range(len(requests))]
