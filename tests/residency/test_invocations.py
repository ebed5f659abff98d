"""Which prompts the predictor is asked about, under bursts, and how many prompts share a prediction."""

import math
from typing import Any

import numpy as np
import pytest

from emoe_jax.residency import invocations
from emoe_jax.residency.cadence import MOST_PROMPTS, Cadence
from emoe_jax.residency.demand import RequestProgress
from emoe_jax.residency.planner import ResidencyPlanner
from emoe_jax.tasks import Task, TaskProfile
from tests.residency.fake import CAPACITIES, E, FakePredictor, K, M, favouring

LOW, HIGH = favouring(0, 1, 2, 3), favouring(4, 5, 6, 7)
NUMBERED = {str(number): Task(routing=LOW) for number in range(300)}
PROFILE = TaskProfile(M, E, K, tasks=NUMBERED)
"""Each request has a task of its own, so that the predictor is told which one it is asked about."""


def planner_of(predictor: Any, **options: Any) -> ResidencyPlanner:
    return ResidencyPlanner(PROFILE, CAPACITIES, predictor, **options)


def burst(planner: ResidencyPlanner, count: int, first: int = 0) -> list[str]:
    names = [str(number) for number in range(first, first + count)]
    for name in names:
        planner.begin(name, name, 10, 16, None)
    return names


def settle(planner: ResidencyPlanner) -> dict[str, Any]:
    if planner.invocations is not None:
        planner.invocations.forecaster.join()
    return planner.state()


def wishes(shares: np.ndarray) -> np.ndarray:
    return np.round(100 * shares).astype(np.int64)


@pytest.mark.parametrize("every", [1, 7, 40, 1000])
def test_of_a_burst_every_pth_prompt_is_predicted(every: int):
    predictor = FakePredictor(HIGH)
    planner = planner_of(predictor, predict_every=every)
    names = burst(planner, 160)
    for start in range(0, 160, 16):  # sixteen start with each step, the next sixteen are in line
        planner.admit(names[start : start + 32])
    state = settle(planner)
    assert state["predictions"] == math.ceil(160 / every)
    assert predictor.asked == names[::every]
    assert state["invocations"] == len(predictor.batches)
    planner.close()


def test_prompts_that_wait_are_asked_about_together():
    predictor = FakePredictor(HIGH)
    predictor.gate.clear()
    planner = planner_of(predictor, predict_every=1)
    names = burst(planner, 41)
    planner.admit(names[:1])
    planner.admit(names)
    assert planner.state()["predictions"] == 41  # none of them is forgotten while the predictor is busy
    predictor.gate.set()
    state = settle(planner)
    assert sum(predictor.batches) == 41
    assert len(predictor.batches) == state["invocations"] <= 4
    assert max(predictor.batches) == 16
    planner.close()


def test_prompts_are_counted_as_they_are_admitted_not_as_they_came():
    predictor = FakePredictor(HIGH)
    planner = planner_of(predictor, predict_every=3)
    names = burst(planner, 9)
    planner.admit(reversed(names))
    planner.admit(names)  # counted once
    settle(planner)
    assert predictor.asked == ["8", "5", "2"]
    planner.close()


def test_prompts_that_wait_use_the_prediction_that_came_meanwhile():
    planner = planner_of(FakePredictor(HIGH), predict_every=40)
    for name in "ab":
        planner.begin(name, "7", 10, 16, None)
    planner.admit("ab")
    settle(planner)
    plan: Any = planner.plan_for({"b": RequestProgress()})
    assert plan.rates[0].argsort()[-4:].min() >= 4
    planner.close()


def test_an_aborted_prompt_passes_its_turn_on():
    predictor = FakePredictor(HIGH)
    predictor.gate.clear()
    planner = planner_of(predictor, predict_every=4)
    burst(planner, 3)
    planner.admit(["0"])  # the thread holds this question
    burst(planner, 20, first=3)
    planner.admit(["1", "2", "3", "4"])  # "4" is asked about, in the queue
    planner.end("2", None)  # in line, nothing computed
    planner.end("4", None)
    planner.admit(["5", "6", "7", "8", "9"])
    predictor.gate.set()
    state = settle(planner)
    assert predictor.asked == ["0", "5", "9"]
    assert state["predictions"] == 3
    planner.close()


def test_prompts_that_never_started_do_not_count():
    predictor = FakePredictor(HIGH)
    planner = planner_of(predictor, predict_every=4)
    names = burst(planner, 8)
    planner.admit(names[:3])
    for name in names[1:3]:
        planner.end(name, None)
    planner.admit(names[3:])
    settle(planner)
    assert predictor.asked == ["0", "6"]
    planner.close()


def test_a_prompt_that_ends_before_its_answer_is_predicted_and_learned_from_afterwards():
    predictor = FakePredictor(HIGH)
    predictor.gate.clear()
    planner = planner_of(predictor, predict_every=1)
    names = burst(planner, 20)
    planner.admit(names)
    for name in names:
        planner.end(name, wishes(LOW))
    predictor.gate.set()
    assert settle(planner)["predictions"] == 20
    assert predictor.asked == names
    assert predictor.observed == []  # none before it was predicted
    burst(planner, 1, first=20)
    planner.admit(["20"])
    settle(planner)
    assert predictor.observed == names
    planner.close()


def test_more_questions_than_the_predictor_can_answer_are_counted_as_missed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(invocations, "MOST_PENDING", 20)
    predictor = FakePredictor(HIGH)
    predictor.gate.clear()
    planner = planner_of(predictor, predict_every=1)
    planner.admit(burst(planner, 50))
    predictor.gate.set()
    state = settle(planner)
    assert (state["predictions"], state["missed"]) == (20, 30)
    planner.close()


def test_what_a_failed_predictor_did_not_answer_is_learned_from_all_the_same():
    predictor = FakePredictor(ValueError("broken"))
    predictor.gate.clear()
    planner = planner_of(predictor, predict_every=1)
    names = burst(planner, 3)
    planner.admit(names)
    for _ in range(40):
        planner.end(names[0], wishes(HIGH))
        burst(planner, 1)
    predictor.gate.set()
    state = settle(planner)
    assert (state["error"], state["predictions"]) == ("ValueError: broken", 0)
    plan: Any = planner.plan_for({"0": RequestProgress()})
    assert plan.rates[0].argsort()[-4:].min() >= 4
    planner.close()


def test_one_forecast_serves_prompts_of_all_tasks_whatever_it_is_worth():
    predictor = FakePredictor(HIGH)
    planner = planner_of(predictor, predict_every=40, one_forecast=True)
    for number, name in enumerate(burst(planner, 41)):
        planner.admit([name])
        settle(planner)
        plan: Any = planner.plan_for({name: RequestProgress()})
        assert plan.rates[0].argsort()[-4:].min() >= 4
        for _ in range(200):
            planner.observe(100, 10)
        planner.end(name, wishes(LOW))
        assert len(predictor.asked) == 1 + number // 40  # no drift asks early
    assert planner.state()["open"] is False
    planner.close()


def serve(
    planner: ResidencyPlanner,
    predictor: FakePredictor,
    count: int,
    predicts: np.ndarray,
    routed: np.ndarray,
    computing: float,
) -> int:
    """Prompts one after the other, each of which is computed for so long; the prompts per prediction after them."""
    for turn in range(count):
        routing = np.roll(routed, turn % 3, axis=1)
        predictor.answer = np.roll(predicts, turn % 3, axis=1)
        planner.begin("x", "7", 10, 16, None)
        planner.admit("x")
        settle(planner)
        planner.computed(computing)
        planner.end("x", wishes(routing))
    return planner.state()["predict_every"]


def test_auto_asks_more_rarely_what_costs_more_than_it_gains_and_more_often_what_pays():
    predictor = FakePredictor(LOW, seconds=0.01)
    planner = planner_of(predictor, predict_every="auto", clock=predictor.clock)
    state = planner.state()
    assert (state["predict_every"], state["predict_every_auto"]) == (1, True)
    assert serve(planner, predictor, 100, LOW, LOW, computing=1.0) == 1  # 1 % of the time for a third of the wishes
    dear = serve(planner, predictor, 600, LOW, LOW, computing=0.005)  # twice as much as the prompts themselves
    assert 4 <= dear < MOST_PROMPTS
    asked = len(predictor.asked)
    serve(planner, predictor, 10 * dear, LOW, LOW, computing=0.005)
    assert 8 <= len(predictor.asked) - asked <= 12
    assert serve(planner, predictor, 600, LOW, LOW, computing=1.0) == 1
    state = planner.state()
    assert state["seconds_per_prediction"] == pytest.approx(0.01)
    assert state["computing_seconds_per_prompt"] == pytest.approx(1.0, rel=0.05)
    assert state["gain"] > 0.1
    planner.close()


def test_auto_asks_as_rarely_as_it_may_where_nothing_is_gained():
    predictor = FakePredictor(HIGH, seconds=0.001)
    planner = planner_of(predictor, predict_every="auto", clock=predictor.clock)
    assert serve(planner, predictor, 1500, HIGH, LOW, computing=1.0) == MOST_PROMPTS
    asked = len(predictor.asked)
    assert serve(planner, predictor, 3 * MOST_PROMPTS, HIGH, LOW, computing=1.0) == MOST_PROMPTS
    assert len(predictor.asked) - asked in (2, 3, 4)
    planner.close()


def test_near_a_border_the_number_of_prompts_stays():
    cadence = Cadence()
    cadence.every = 8
    for cost in (0.9, 1.1, 0.9, 1.1, 0.5, 1.2) * 50:
        cadence.predicted(cost * 8 * 0.1, 1)  # a gain of 0.1 is worth `cost` times eight prompts per prediction
        cadence.computed(1.0)
        cadence.ended()
        cadence.judged(0.1)
        assert cadence.every == 8


def test_a_prompt_keeps_its_own_prediction_when_another_of_its_task_is_predicted():
    predictor = FakePredictor(HIGH)
    planner = planner_of(predictor, predict_every=1)
    plans: dict[str, Any] = {}
    for name, answer in (("a", HIGH), ("b", LOW)):
        predictor.answer = answer
        planner.begin(name, "7", 10, 16, None)
        planner.admit([name])
        settle(planner)
    for name in "ab":
        plans[name] = planner.plan_for({name: RequestProgress()})
    np.testing.assert_allclose(plans["a"].rates, K * HIGH, rtol=1e-5)
    np.testing.assert_allclose(plans["b"].rates, K * LOW, rtol=1e-5)
    planner.close()
