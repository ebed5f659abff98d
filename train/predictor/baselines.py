"""The simple things that usually beat learned predictors, on the same inputs and judged by the same numbers."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from emoe_jax.predictor.inputs import History
from emoe_jax.predictor.kernel import unit_rows
from emoe_jax.predictor.prompts import Prompts, frequencies
from emoe_jax.predictor.regression import fit_ridge

Shares = Float[np.ndarray, "P M E"]
_PENALTIES = (0.3, 1.0, 2.0, 4.0, 8.0, 16.0)


def random_order(prompts: Prompts, seed: int) -> Shares:
    scores = np.random.default_rng(seed).random(prompts.counts.shape, dtype=np.float32)
    return scores / scores.sum(-1, keepdims=True)


def global_frequency(trained: Prompts, prompts: Prompts) -> Shares:
    return np.broadcast_to(frequencies(trained.counts.sum(0)), prompts.counts.shape)


def task_frequency(trained: Prompts, prompts: Prompts) -> Shares:
    """Each task's frequencies; experts that it never chose, and tasks never seen, by global frequency."""
    everything = trained.counts.sum(0)
    shares = np.empty(prompts.counts.shape, np.float32)
    for task in set(prompts.tasks):
        same = [row for row, name in enumerate(trained.tasks) if name == task]
        rows = [row for row, name in enumerate(prompts.tasks) if name == task]
        shares[rows] = frequencies(trained.counts[same].sum(0) + 1e-3 * frequencies(everything))
    return shares


def previous_prompt(trained: Prompts, prompts: Prompts) -> Shares:
    """The routing of the prompt before; the first one gets the global frequency."""
    shares = frequencies(np.concatenate([trained.counts.sum(0)[None], prompts.counts[:-1]]))
    return (shares + 1e-3 * global_frequency(trained, prompts)) / 1.001


def best_fixed_set(prompts: Prompts) -> Shares:
    """The prompt's own frequencies: no set that stays for a whole prompt covers more."""
    return frequencies(prompts.counts)


def ridge(trained: Prompts, prompts: Prompts, with_first: bool, with_history: bool = False) -> Shares:
    """Linear regression of frequencies on task and embedding, and the first tokens' or previous prompts' routing.

    The penalty is the one that predicts left-out training prompts best; leaving one out has a closed form.
    """
    names = sorted(set(trained.tasks))

    def features(of: Prompts) -> Float[np.ndarray, "P features"]:
        tasks = np.array([[task == name for name in names] for task in of.tasks], np.float64)
        columns = [tasks, unit_rows(of.embedding)]
        if with_first:
            columns.append(3 * np.sqrt(frequencies(of.first)).reshape(len(of), -1) / of.counts.shape[1] ** 0.5)
        if with_history:
            mean = frequencies(trained.counts).mean(0)
            recent = np.stack([np.where(np.isnan(h.recent), mean, h.recent) for h in History.of(of.counts)])
            columns.append(3 * np.sqrt(recent).reshape(len(of), -1) / of.counts.shape[1] ** 0.5)
        return np.concatenate(columns, axis=1)

    known, asked = features(trained), features(prompts)
    centre = known.mean(0)
    known, asked = known - centre, asked - centre
    targets = frequencies(trained.counts).reshape(len(trained), -1)
    mean = targets.mean(0)
    weights = fit_ridge(known, targets - mean, _PENALTIES).weights
    shares = np.maximum(asked @ weights + mean, 1e-6).reshape(prompts.counts.shape)
    return (shares / shares.sum(-1, keepdims=True)).astype(np.float32)
