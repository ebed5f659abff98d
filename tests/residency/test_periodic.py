"""How many prompts of a burst an engine predicts, when, and in which order."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.policies.dynamics import DYNAMICS_FILE, Dynamics
from emoe_jax.predictor import Predictor
from emoe_jax.residency.foresight import LOOK_AHEAD
from emoe_jax.scheduling.slo import SloPolicy
from tests.engines import RESIDENT, answered
from tests.residency.known import EXPERTS, LAYERS, write_predictor

PARAMS = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def predictor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor of the tiny model's shape."""
    counts = np.random.default_rng(0).integers(1, 50, (8, LAYERS, EXPERTS))
    return write_predictor(tmp_path_factory.mktemp("predictor"), ("odd", "even") * 4, list(counts / 100))


@pytest.fixture
def engine_of(tiny_checkpoint: Path, predictor_folder: Path, request: pytest.FixtureRequest) -> Callable[..., Engine]:
    def load(**options: Any) -> Engine:
        given: dict[str, Any] = {"expert_memory": "3 slots", "max_num_seqs": 4, "max_num_batched_tokens": 32}
        given |= {"predictor": predictor_folder} | RESIDENT | options
        engine = Engine.load(tiny_checkpoint, **given)
        request.addfinalizer(engine.close)
        return engine

    return load


def drain(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks of the prompts that predictors are asked about."""
    tasks: list[str] = []
    predict = Predictor.predict_next

    def predict_next(self: Predictor, prompts: Any, rows: int) -> Any:
        tasks.extend(task for task, _ in prompts)
        return predict(self, prompts, rows)

    monkeypatch.setattr(Predictor, "predict_next", predict_next)
    return tasks


@pytest.mark.parametrize(
    ("options", "predictions"),
    [
        ({"predict_every": 1}, 160),
        ({"predict_every": 40}, 4),
        ({"predict_every": 40, "scheduling_policy": "fcfs", "overlap": False}, 4),
        ({"predict_every": 1, "expert_memory": "100%"}, 160),
        ({"policy": "emoe-paper"}, 4),
        ({"policy": "emoe-paper", "predict_every": 16}, 10),
        ({"policy": "emoe-no-refresh", "predict_every": 1}, 160),
    ],
)
def test_a_burst_of_prompts_has_one_prediction_in_p(
    engine_of: Callable[..., Engine], options: dict[str, Any], predictions: int
) -> None:
    engine = engine_of(**options)
    engine.generate([[number % 50, 1, 4] for number in range(160)], PARAMS)
    assert engine.state()["planner"]["predictions"] == predictions  # without waiting for the last answers
    state = answered(engine)
    assert (state["predictions"], state["error"], state["missed"]) == (predictions, None, 0)
    assert 0 < state["computing_seconds_per_prompt"] < 60
    assert predictions / 16 <= state["invocations"] <= predictions + state["early_predictions"]


def test_by_default_p_follows_cost_and_gain_and_the_papers_policy_keeps_to_40(
    engine_of: Callable[..., Engine],
) -> None:
    states = [engine_of(policy=policy).state()["planner"] for policy in ("emoe", "emoe-no-refresh", "emoe-paper")]
    assert [(state["predict_every"], state["predict_every_auto"]) for state in states] == [
        (1, True),
        (1, True),
        (40, False),
    ]


def test_under_the_papers_policy_a_forecast_serves_prompts_of_other_tasks(engine_of: Callable[..., Engine]) -> None:
    for policy, serves in (("emoe-paper", True), ("emoe-no-refresh", False)):
        engine = engine_of(policy=policy, predict_every=40)
        engine.generate([1, 2, 3], PARAMS, task="odd")
        answered(engine)
        engine.add_request("other", [1, 2, 3], PARAMS, task="even")
        engine.step()
        planner: Any = engine.parts.planner
        assert (planner.forecast_of(planner.requests["other"]) is not None) is serves


def test_prompts_are_asked_about_before_they_start(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(predict_every=1)
    planner: Any = engine.parts.planner
    requests = planner.requests
    starts: list[bool] = []
    dispatch = Dispatcher.dispatch

    def dispatched(self: Dispatcher, plan: Any) -> Any:
        starting = [chunk.sequence for chunk in plan.prefills if chunk.sequence.started_at == plan.now]
        starts.extend(requests[sequence.request_id].number is not None for sequence in starting)
        return dispatch(self, plan)

    monkeypatch.setattr(Dispatcher, "dispatch", dispatched)
    for number in range(30):
        engine.add_request(str(number), [number, 2, 3], PARAMS)
    engine.step()
    assert engine.state()["scheduler"]["waiting"] >= 20
    assert 4 + LOOK_AHEAD <= engine.state()["planner"]["predictions"] < 30  # those that wait, too
    drain(engine)
    assert starts == [True] * 30


def test_completions_of_one_prompt_and_preempted_ones_are_asked_about_once(engine_of: Callable[..., Engine]) -> None:
    page = 16 * LAYERS * 2 * 2 * 8 * 4
    engine = engine_of(predict_every=1, kv_memory=8 * page, max_model_len=96)
    long = SamplingParams(max_tokens=60, temperature=1, seed=3, ignore_eos=True, n=2)
    engine.generate([[1, 2, 3], [4, 5, 6], [7, 8, 9]], long)
    assert engine.state()["scheduler"]["preemptions"] > 0
    assert answered(engine)["predictions"] == 3


def test_prompts_that_were_aborted_before_they_started_are_not_asked_about(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(predict_every=1)
    for number in range(60):
        engine.add_request(str(number), [number % 50, 2, 3], PARAMS)
    for number in range(10, 30):
        engine.abort(str(number))
    engine.step()
    for number in range(50, 60):  # beyond those in line
        engine.abort(str(number))
    drain(engine)
    assert answered(engine)["predictions"] == 30


def test_p_counts_prompts_as_they_are_admitted(engine_of: Callable[..., Engine], asked: list[str]) -> None:
    engine = engine_of(predict_every=2, max_num_seqs=1)
    engine.add_request("first", [1, 2, 3], PARAMS, task="first")
    engine.step()
    engine.add_request("long", [1, 2, 3] * 8, SamplingParams(max_tokens=30, ignore_eos=True), task="long")
    engine.add_request("short", [1, 2, 3], PARAMS, task="short")  # the policy starts it first
    line = [sequence.request_id for sequence in engine.parts.scheduler.line(time.monotonic(), 2)]
    assert line == ["short", "long"]
    drain(engine)
    answered(engine)
    assert asked == ["first", "long"]


@pytest.mark.parametrize("idle", [True, False])
def test_an_idle_engine_waits_for_the_prediction_of_a_prompt_and_a_busy_one_does_not(
    engine_of: Callable[..., Engine], idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(predict_every=1, load_wait_ms=30_000, overlap=False)
    engine.warm_up()
    if not idle:
        engine.add_request("before", [1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True))
        engine.step()
        answered(engine)
    predict = Predictor.predict_next
    monkeypatch.setattr(Predictor, "predict_next", lambda *given: (time.sleep(0.3), predict(*given))[1])
    told: list[float] = []
    monkeypatch.setattr(SloPolicy, "observe", lambda _, plan, seconds, waited=0.0: told.append(waited))
    engine.add_request("asked", [1, 2, 3], PARAMS)
    waited = engine.foresight.waited_seconds
    engine.step()
    assert sum(told) == pytest.approx(engine.foresight.waited_seconds - waited)  # it is no computing time
    planner: Any = engine.parts.planner
    assert (planner.requests["asked"].predicted is not None) is idle
    assert (engine.foresight.waited_seconds - waited > 0.25) is idle
    drain(engine)


@pytest.mark.parametrize("requests", [1, 4])
def test_the_engine_follows_learned_dynamics_of_every_request_at_hand(
    engine_of: Callable[..., Engine], predictor_folder: Path, tmp_path: Path, requests: int
) -> None:
    folder = tmp_path / "predictor"
    shutil.copytree(predictor_folder, folder)
    untrained = Dynamics.untrained(LAYERS, EXPERTS)
    size, latent = LAYERS * EXPERTS, len(untrained.latent_half_lives)
    directions = np.random.default_rng(0).normal(size=(size, 1)).astype(np.float32)
    readout = np.zeros((latent, LAYERS, EXPERTS), np.float32)
    readout[..., 7], readout[..., 6] = 1000, -1000  # whichever way the first direction turns, one of both is wanted
    learned = untrained._replace(directions=directions, readout=readout.reshape(latent, size))
    learned.save(folder / DYNAMICS_FILE)
    engine = engine_of(predictor=folder, policy="emoe", predict_every=1)
    long = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    engine.generate([[3, 1, 4, number] for number in range(requests)], long)
    policy: Any = engine.parts.residency.policy
    scores, state = policy.scores(), policy.state
    turned = float(state.latent.sum())
    assert abs(turned) > 1e-3
    np.testing.assert_array_equal(scores.argmax(1), 7 if turned > 0 else 6)
    assert scores.max() > 10
