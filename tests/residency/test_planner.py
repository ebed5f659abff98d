import contextlib
from typing import Any

import numpy as np

from emoe_jax.residency.demand import RequestProgress
from emoe_jax.residency.forecaster import LEARNING_SHARE, Forecaster
from emoe_jax.residency.judges import Drift, Gate
from emoe_jax.residency.planner import ResidencyPlanner
from emoe_jax.tasks import Task, TaskProfile
from tests.residency.fake import CAPACITIES, E, FakePredictor, K, M, favouring


def counts_of(shares: np.ndarray, tokens: int = 100) -> np.ndarray:
    return np.round(shares * tokens).astype(np.int64)


QA, SUM = favouring(0, 1, 2, 3), favouring(4, 5, 6, 7)
PROFILE = TaskProfile(M, E, K, tasks={"qa": Task(routing=QA), "sum": Task(routing=SUM)})


def test_learning_takes_a_small_share_of_the_time(monkeypatch):
    predictor, refits = FakePredictor(QA), []
    predictor.num_unlearned = 1000

    def refit(predictor: FakePredictor) -> None:
        predictor.now += 0.02
        refits.append(1)

    monkeypatch.setattr(FakePredictor, "refit", refit, raising=False)

    def ask(forecaster: Forecaster, times: int) -> None:
        for _ in range(times):
            forecaster.warm_up()

    learner: Any = predictor
    with contextlib.closing(Forecaster(learner, clock=predictor.clock)) as forecaster:
        ask(forecaster, 3)
        assert refits == []
        predictor.now += 1 / LEARNING_SHARE
        ask(forecaster, 3)
        assert refits == [1]
        predictor.now += 0.9 * 0.02 / LEARNING_SHARE
        ask(forecaster, 3)
        assert refits == [1]
        predictor.now += 0.2 * 0.02 / LEARNING_SHARE
        ask(forecaster, 3)
        assert refits == [1, 1]


def planner_of(predictor: Any = None, **options: Any) -> ResidencyPlanner:
    return ResidencyPlanner(PROFILE, CAPACITIES, predictor, **options)


def begin(planner: ResidencyPlanner, name: str, task: str | None = "qa") -> None:
    """A request comes and is admitted at once."""
    planner.begin(name, task, 10, 16, None)
    planner.admit([name])


def settled_plan(planner: ResidencyPlanner, *names: str) -> Any:
    """The plan once all that was asked is answered."""
    if planner.invocations is not None:
        planner.invocations.forecaster.join()
    return plan_for(planner, *names)


def plan_for(planner: ResidencyPlanner, *names: str) -> Any:
    """The plan for requests that have not begun."""
    return planner.plan_for(dict.fromkeys(names, RequestProgress()))


def wanted(plan: Any) -> list[int]:
    best = np.argsort(-plan.rates[0], kind="stable")[: CAPACITIES[0]]
    return sorted(best.tolist())


def test_first_prompts_are_planned_from_the_profile():
    planner = planner_of()
    begin(planner, "a")
    assert wanted(plan_for(planner, "a")) == [0, 1, 2, 3]


def test_what_a_request_has_done_weighs_no_more():
    planner = planner_of()
    begin(planner, "a")  # 10 tokens of prompt, 16 to come
    begin(planner, "b", "sum")
    plan: Any = planner.plan_for({"a": RequestProgress(10, 15), "b": RequestProgress()})
    np.testing.assert_allclose(plan.rates, 2 * K * (1 * QA + 26 * SUM) / 27, rtol=1e-5)


def test_a_plan_is_urgent_once_a_quarter_of_the_requests_is_of_other_tasks():
    planner = planner_of()
    assert not planner.is_urgent([])
    for name in "abcd":
        begin(planner, name)
    assert planner.is_urgent("abcd")
    plan_for(planner, *"abcd")
    for name in "efg":
        begin(planner, name)
    begin(planner, "z", "sum")
    assert not planner.is_urgent("efg")  # other requests of the same task
    assert not planner.is_urgent("abefz")
    assert planner.is_urgent("abfz")
    plan_for(planner, *"abfz")
    assert not planner.is_urgent("abfz")
    assert not planner.is_urgent(["unknown"])


def test_the_plan_follows_who_runs():
    planner = planner_of()
    begin(planner, "a")
    begin(planner, "b", "sum")
    first: Any = plan_for(planner, "a")
    assert (first.continuing, plan_for(planner, "a")) == (0.0, None)
    both: Any = plan_for(planner, "a", "b")
    assert both.continuing == 1.0
    np.testing.assert_allclose(both.joined, K * SUM, rtol=1e-5)
    planner.end("a", None)
    last: Any = plan_for(planner, "b")
    assert last.continuing == 0.5
    assert not last.joined.any()
    assert wanted(last) == [4, 5, 6, 7]


def test_of_p_prompts_the_first_is_asked_about_and_its_task_keeps_the_answer():
    predictor = FakePredictor(SUM)
    planner = planner_of(predictor, predict_every=3)
    begin(planner, "a")
    assert wanted(settled_plan(planner, "a")) == [4, 5, 6, 7]
    planner.end("a", counts_of(QA))
    for name in "bc":
        begin(planner, name)
        assert wanted(plan_for(planner, name)) == [4, 5, 6, 7]
        planner.end(name, counts_of(QA))
    begin(planner, "other", "sum")
    begin(planner, "d")
    settled_plan(planner, "d")
    assert (predictor.observed, predictor.asked) == (["qa"] * 3, ["qa", "sum"])
    assert planner.state()["predictions"] == 2
    planner.close()


def test_without_a_predictor_a_task_follows_its_decayed_frequency():
    planner = planner_of()
    for index in range(60):
        begin(planner, str(index))
        planner.end(str(index), counts_of(SUM))
    begin(planner, "last")
    assert wanted(plan_for(planner, "last")) == [4, 5, 6, 7]


def test_a_planner_that_does_not_learn_keeps_the_profile():
    planner = planner_of(learns=False)
    for index in range(60):
        begin(planner, str(index))
        planner.end(str(index), counts_of(SUM))
    begin(planner, "last")
    assert wanted(plan_for(planner, "last")) == [0, 1, 2, 3]


def test_a_predictor_that_is_worse_than_frequency_is_switched_off_and_on_again():
    predictor = FakePredictor(SUM)
    planner = planner_of(predictor, predict_every=1)
    name = 0

    def prompt(routed: np.ndarray) -> list[int]:
        nonlocal name
        name += 1
        begin(planner, str(name))
        plan = settled_plan(planner, str(name))
        planner.end(str(name), counts_of(routed))
        return wanted(plan)

    assert prompt(QA) == [4, 5, 6, 7]
    for _ in range(40):
        prompt(QA)
    assert prompt(QA) == [0, 1, 2, 3]
    assert planner.state()["open"] is False
    asked = len(predictor.asked)
    for _ in range(40):
        prompt(QA)
    assert len(predictor.asked) - asked == 40  # 1 means every prompt
    for index in range(160):  # routing that only the predictor foresees: it turns about before frequency has followed
        predictor.answer = favouring(1, 3, 5, 7) if index // 16 % 2 else favouring(0, 2, 4, 6)
        prompt(predictor.answer)
    assert planner.state()["open"] is True
    planner.close()


def test_drift_asks_early():
    predictor = FakePredictor(SUM)
    planner = planner_of(predictor, predict_every=1000)
    begin(planner, "first", "sum")
    for name in "ab":
        begin(planner, name)
    settled_plan(planner, "a", "b")
    for _ in range(127):
        planner.observe(100, 10)
    assert predictor.asked == ["sum"]
    planner.observe(100, 10)
    assert wanted(settled_plan(planner, "a", "b")) == [4, 5, 6, 7]
    state = planner.state()
    assert (state["early_predictions"], state["predictions"]) == (2, 1)
    planner.close()


def test_drift_asks_nothing_about_tasks_that_are_insensitive_everywhere():
    profile = PROFILE.with_task("qa", sensitivity=(0.0, 0.0))
    predictor = FakePredictor(SUM)
    planner = ResidencyPlanner(profile, CAPACITIES, predictor, predict_every=1)  # pyright: ignore[reportArgumentType]
    begin(planner, "a", "qa")
    settled_plan(planner, "a")
    for _ in range(300):
        planner.observe(100, 0)
    settled_plan(planner, "a")
    assert predictor.asked == []
    assert planner.state()["early_predictions"] == 0
    planner.close()


def test_tasks_that_are_insensitive_everywhere_trigger_no_prediction():
    profile = PROFILE.with_task("qa", sensitivity=(0.0, 0.0))
    predictor = FakePredictor(SUM)
    planner = ResidencyPlanner(profile, CAPACITIES, predictor, predict_every=1)  # pyright: ignore[reportArgumentType]
    begin(planner, "a")
    plan = plan_for(planner, "a")
    assert plan is not None
    assert not plan.sensitivity.any()
    assert planner.state()["prompts_since"] == 0
    assert planner.state()["insensitive"] == 1
    assert predictor.asked == []
    planner.close()


def test_a_predictor_that_fails_is_named_and_no_longer_asked():
    predictor = FakePredictor(ValueError("no\nsense"))
    planner = planner_of(predictor, predict_every=1)
    begin(planner, "a")
    assert wanted(settled_plan(planner, "a")) == [0, 1, 2, 3]
    assert planner.state()["error"] == "ValueError: no sense"
    begin(planner, "b")
    plan_for(planner, "b")
    assert len(predictor.asked) == 1
    planner.close()


def test_the_gate_needs_a_margin_both_ways():
    gate = Gate(window=4, fewest=2, margin=0.1)
    for _ in range(4):
        gate.observe(0.5, 0.55)
    assert gate.is_open
    for _ in range(4):
        gate.observe(0.5, 0.7)
    assert not gate.is_open
    for _ in range(4):
        gate.observe(0.7, 0.65)
    assert not gate.is_open
    for _ in range(4):
        gate.observe(0.9, 0.65)
    assert gate.is_open


def test_drift_waits_for_patience_and_starts_afresh():
    drift = Drift(half_life=2, tolerance=0.1, patience=3)
    drift.promise(0.9)
    for _ in range(2):
        drift.observe(10, 5)
    assert not drift.drifted
    drift.observe(10, 5)
    assert drift.drifted
    drift.restart()
    assert not drift.drifted


def test_what_residents_serve_follows_them_and_what_was_learned():
    planner = planner_of()
    qa, none = counts_of(QA) > counts_of(QA).mean(), np.zeros((M, E), bool)
    served = planner.serves(qa)
    assert served["qa"] > 0.9 > 0.5 > served["sum"]
    assert served["sum"] < served["other"] < served["qa"]  # the mean of both
    assert planner.serves(none) == dict.fromkeys(served, 0.0)
    begin(planner, "a", "poem")
    planner.end("a", counts_of(SUM))
    assert planner.serves(qa)["poem"] < planner.serves(qa)["other"]
