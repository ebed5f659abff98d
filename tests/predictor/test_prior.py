"""The closed-form prior: similarity of prompts, leaving one out, learning, falling to the mean."""

import numpy as np
import pytest

from emoe_jax.predictor.kernel import PromptKernel, name_parts
from emoe_jax.predictor.prior import KernelPrior, _fit
from emoe_jax.predictor.prompts import Prompts, frequencies
from tests.traces.synthetic import make_trace
from train.predictor import baselines
from train.predictor.coverage import coverage_at


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts.of(make_trace(prompts=80), first_tokens=4)


@pytest.fixture(scope="module")
def split(prompts) -> tuple[Prompts, Prompts]:
    return prompts.take(range(60)), prompts.take(range(60, 80))


def test_frequencies_sum_to_one_and_are_uniform_where_nothing_is_known():
    shares = frequencies(np.array([[1, 3, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_allclose(shares, [[0.25, 0.75, 0, 0], [0.25] * 4])


def test_parts_of_a_task_name_weigh_one_together():
    for name in ("mmlu/college_physics", "chat", "a-b/c d/e"):
        assert sum(weight**2 for _, weight in name_parts(name)) == pytest.approx(1)
    assert {part for part, _ in name_parts("mmlu/college_physics")} >= {"/mmlu", "college", "physics"}


def test_left_out_predictions_are_those_of_a_fit_without_the_prompt():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(12, 4))
    similarity, components = points @ points.T + 1, rng.normal(size=(12, 3))
    weight = rng.uniform(0.5, 2, size=12)
    fit = _fit(similarity, components, weight)
    others = np.arange(12) != 5
    # The noise that was chosen, found again from the weights: (K + noise / weight) w = z.
    noise = (weight[:, None] * (components - similarity @ fit.weights) / fit.weights).mean(0)
    for component in range(3):
        inner = similarity[np.ix_(others, others)] + noise[component] * np.diag(1 / weight[others])
        expected = similarity[5, others] @ np.linalg.solve(inner, components[others, component])
        assert fit.left_out[5, component] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_prior_beats_task_frequency_and_ridge(split):
    known, asked = split
    predicted = KernelPrior(PromptKernel(known), known, False).predict(asked)
    np.testing.assert_allclose(predicted.sum(-1), 1, rtol=1e-5)
    others = (baselines.task_frequency(known, asked), baselines.ridge(known, asked, False))
    for residency in (0.25, 0.5):
        reached = coverage_at(predicted, asked.counts, residency)
        assert reached > max(coverage_at(other, asked.counts, residency) for other in others)


def test_first_tokens_help(split):
    known, asked = split
    kernel = PromptKernel(known)
    plain, early = (KernelPrior(kernel, known, first).predict(asked) for first in (False, True))
    assert coverage_at(early, asked.counts, 0.25) > coverage_at(plain, asked.counts, 0.25)


def test_predictions_do_not_depend_on_the_routing_they_predict(split):
    known, asked = split
    prior = KernelPrior(PromptKernel(known), known, False)
    blind = Prompts(asked.tasks, asked.embedding, np.zeros_like(asked.counts), np.zeros_like(asked.first))
    np.testing.assert_array_equal(prior.predict(asked), prior.predict(blind))


def test_unseen_tasks_and_missing_embeddings_are_predicted_too(split):
    known, asked = split
    prior = KernelPrior(PromptKernel(known), known, False)
    strange = Prompts(("",) * len(asked), np.zeros_like(asked.embedding), asked.counts, asked.first)
    predicted = prior.predict(strange)
    assert np.isfinite(predicted).all()
    expected = frequencies(known.counts.sum(0))
    assert np.abs(predicted - expected).mean() < 0.03


def test_without_embeddings_the_task_is_what_is_left():
    prompts = Prompts.of(make_trace(prompts=60, dim=0), first_tokens=4)
    known, asked = prompts.take(range(45)), prompts.take(range(45, 60))
    predicted = KernelPrior(PromptKernel(known), known, False).predict(asked)
    by_task = baselines.task_frequency(known, asked)
    assert coverage_at(predicted, asked.counts, 0.25) == pytest.approx(
        coverage_at(by_task, asked.counts, 0.25), abs=0.01
    )


def test_shuffled_labels_fall_to_global_frequency():
    prompts = Prompts.of(make_trace(prompts=160), first_tokens=4)
    known, asked = prompts.take(range(120)).shuffled(0), prompts.take(range(120, 160))
    predicted = KernelPrior(PromptKernel(known), known, False).predict(asked)
    by_all = baselines.global_frequency(known, asked)
    for residency in (0.25, 0.5):
        reached, floor = coverage_at(predicted, asked.counts, residency), coverage_at(by_all, asked.counts, residency)
        assert abs(reached - floor) < 0.05
