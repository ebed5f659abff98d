"""Judge a predictor on a trace, prompt after prompt as an engine would ask it, beside the baselines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from emoe_jax.policies.dynamics import DYNAMICS_FILE, Dynamics
from emoe_jax.predictor import Predictor, Prompts
from emoe_jax.predictor.inputs import History
from emoe_jax.predictor.predictor import MAX_MEMORY
from emoe_jax.predictor.prior import KernelPrior
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.traces import RoutingTrace
from train.predictor import baselines
from train.predictor.answers import judge
from train.predictor.coverage import coverage_table, scores
from train.predictor.examples import DataError

REFIT_EVERY = 16  # prompts; what the prior may learn from is at least so old

Shares = Float[np.ndarray, "P M E"]


class Answers(NamedTuple):
    """Token by token, what the forecast within answers is judged on: a trace of the prompts judged, in their order."""

    trace: RoutingTrace
    dynamics: Dynamics


def answers_of(directory: Path, trace: RoutingTrace) -> Answers | None:
    """The predictor's forecast within answers, if its directory has one, and the trace's prompts that have tokens."""
    path = directory / DYNAMICS_FILE
    if not path.exists():
        return None
    routed = np.flatnonzero(np.bincount(trace.sample, minlength=trace.num_prompts))
    return Answers(trace.select(routed), Dynamics.load(path, trace.num_layers, trace.num_experts))


def prompts_of(trace: RoutingTrace, predictor: Predictor) -> Prompts:
    """The trace's prompts as this predictor needs them. Raises where the trace is of another model."""
    config = predictor.config
    config.check_model(trace.num_layers, trace.num_experts, trace.top_k, f"the trace {trace.source}")
    if trace.prompt_embedding is not None:
        config.check_embedding(trace.prompt_embedding.shape[1], f"the trace {trace.source}")
    if config.embedding_dim == 0:
        trace = trace.without_embedding()
    prompts = Prompts.of(trace, config.first_tokens, config.embedding_dim).routed()
    if len(prompts) == 0:
        raise DataError(f"the trace {trace.source} has no prompt with routing")
    return prompts


def evaluate(
    predictor: Predictor,
    prompts: Prompts,
    updates: bool = True,
    seed: int = 0,
    baselines_from: Prompts | None = None,
    answers: Answers | None = None,
) -> dict[str, Any]:
    """All numbers of `predictor` on `prompts`, which are in arrival order; what it learns meanwhile stays in it.

    The predictor knows of each prompt its task and embedding, how the prompts before it were routed, and, under
    `with_first_tokens`, its first answer tokens. With `updates` its prior also learns from the trace's earlier prompts.
    Baselines learn from the prompts the predictor was trained on, or from `baselines_from`. With `answers`, the
    forecast within answers is judged too.
    """
    top_k = predictor.config.top_k
    trained, remembered = baselines_from or predictor.trained, predictor.memory
    frozen = [prior.predict(prompts) for prior in predictor.priors]
    milliseconds = time_predictions(predictor, prompts)
    opinions, histories = ask_in_order(predictor, prompts) if updates else (frozen, History.of(prompts.counts))
    starts = [predictor.by_tokens(prompts, opinions[first], bool(first)) for first in (False, True)]
    predicted = [predictor.correct(prompts, opinions[first], histories, bool(first)) for first in (False, True)]
    fixed = [predictor.correct(prompts, frozen[first], histories, bool(first)) for first in (False, True)]
    result: dict[str, Any] = {
        **scores(predicted[0], prompts.counts, top_k),
        "milliseconds_per_prediction": milliseconds,
        "parameters": predictor.num_parameters,
        "remembered_prompts": len(remembered),
        "prompts": len(prompts),
        "assignments": int(prompts.counts.sum()),
        "seen_prompts": count_seen(trained, prompts),
        "unseen_tasks": len(set(prompts.tasks) - set(trained.tasks)),
        "config": predictor.config.to_json(),
    }
    rows: dict[str, Shares] = {
        "random": baselines.random_order(prompts, seed),
        "global_frequency": baselines.global_frequency(trained, prompts),
        "task_frequency": baselines.task_frequency(trained, prompts),
        "previous_prompt": baselines.previous_prompt(trained, prompts),
        "ridge": baselines.ridge(trained, prompts, with_first=False),
        "ridge_with_history": baselines.ridge(trained, prompts, with_first=False, with_history=True),
        "prior_alone": opinions[0],
        **({"closed_forms": starts[0]} if predictor.reads_tokens else {}),
        "without_updates": fixed[0],
        "shuffled_labels": shuffled_prior(predictor, trained, prompts, seed),
        "best_fixed_set": baselines.best_fixed_set(prompts),
    }
    result["baselines"] = {name: flattened(scores(shares, prompts.counts, top_k)) for name, shares in rows.items()}
    rows = {
        "first_tokens_only": frequencies(prompts.first + 1e-3 * baselines.global_frequency(trained, prompts)),
        "ridge": baselines.ridge(trained, prompts, with_first=True),
        "prior_alone": opinions[1],
        **({"closed_forms": starts[1]} if predictor.reads_tokens else {}),
        "without_updates": fixed[1],
    }
    later = np.maximum(prompts.counts - prompts.first, 0)
    result["with_first_tokens"] = {
        "tokens": predictor.config.first_tokens,
        **scores(predicted[1], prompts.counts, top_k),
        "coverage_of_later_tokens": coverage_table(predicted[1], later),
        "baselines": {name: flattened(scores(shares, prompts.counts, top_k)) for name, shares in rows.items()},
    }
    if predictor.layers is not None:
        routed = frequencies(prompts.counts)
        given = predictor.given_layers(prompts, starts[0], histories, routed)
        rows = {"prior_alone": opinions[0], "closed_form": predictor.layers.predict(starts[0], routed)}
        result["given_earlier_layers"] = _with_top_k(scores(given, prompts.counts, top_k))
        result["given_earlier_layers"]["baselines"] = {
            name: _with_top_k(flattened(scores(shares, prompts.counts, top_k))) for name, shares in rows.items()
        }
    if answers is not None:
        result["given_last_tokens"] = judge(answers.trace, frozen[0], answers.dynamics, seed)
    return result


def _with_top_k(numbers: dict[str, Any]) -> dict[str, Any]:
    return {**numbers, "top_k": numbers["top_k_accuracy"]}


def ask_in_order(predictor: Predictor, prompts: Prompts) -> tuple[list[Shares], list[History]]:
    """The prior's opinions of each prompt when it arrives, without and with first tokens, and each one's history."""
    predictor.forget_history()
    opinions: tuple[list[Shares], list[Shares]] = ([], [])
    histories: list[History] = []
    for start in range(0, len(prompts), REFIT_EVERY):
        block = prompts.take(range(start, min(start + REFIT_EVERY, len(prompts))))
        if predictor.num_unlearned:
            predictor.refit()
        for kind, prior in zip(opinions, predictor.priors, strict=True):
            kind.append(prior.predict(block))
        for row, task in enumerate(block.tasks):
            histories.append(predictor.history)
            embedding = block.embedding[row] if predictor.config.embedding_dim else None
            predictor.observe(task, block.counts[row], embedding, block.first[row])
    return [np.concatenate(kind) for kind in opinions], histories


def time_predictions(predictor: Predictor, prompts: Prompts, repeats: int = 30) -> float:
    """Median milliseconds of one `predict`, after warm-up."""
    embedding = prompts.embedding[0] if predictor.config.embedding_dim else None
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        predictor.predict(prompts.tasks[0], embedding)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]) * 1e3)


def shuffled_prior(predictor: Predictor, trained: Prompts, prompts: Prompts, seed: int) -> Shares:
    """The prior refitted with the remembered routing dealt to other prompts: what is left is not learned from inputs.

    The networks' correction was trained on true labels and is left out; `--shuffle-labels` trains all on dealt ones.
    """
    known = trained.shuffled(seed)
    return KernelPrior(predictor.kernel, known.latest(MAX_MEMORY), False).predict(prompts)


def count_seen(trained: Prompts, prompts: Prompts) -> int:
    """How many of the prompts the predictor was trained on: coverage of those says nothing."""
    known = {
        (task, counts.tobytes()) for task, counts in zip(trained.tasks, trained.counts.astype(np.int32), strict=True)
    }
    return sum(
        (task, counts.tobytes()) in known
        for task, counts in zip(prompts.tasks, prompts.counts.astype(np.int32), strict=True)
    )


def flattened(numbers: dict[str, Any]) -> dict[str, Any]:
    """A baseline's numbers with its coverage also at the top: `["ridge"]["0.25"]`."""
    return {**numbers["coverage"], **numbers}
