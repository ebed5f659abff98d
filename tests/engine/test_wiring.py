"""What is known of prompts reaches the experts: each test fails when one of the parts is taken out of the engine."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.experts.store import ExpertStore
from emoe_jax.predictor import Predictor, Prompts
from emoe_jax.predictor.inputs import History
from emoe_jax.residency import foresight
from emoe_jax.residency import residency as residency_module
from emoe_jax.residency.residency import Residency
from emoe_jax.tasks import Lengths, Task, TaskProfile
from tests.engines import RESIDENT, EngineFactory, answered, settle
from tests.residency.known import EXPERTS, LAYERS, TOP_K, favouring, write_predictor

ODD, EVEN = favouring(1, 3, 5), favouring(0, 2, 4)
PARAMS = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)

Load = Callable[..., Engine]


@pytest.fixture
def load(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> Load:
    def load(**options: Any) -> Engine:
        given: dict[str, Any] = {"expert_memory": "3 slots", "max_num_seqs": 4, "max_num_batched_tokens": 32}
        given |= {"load_wait_ms": 30_000, "overlap": False, "prefix_caching": False} | RESIDENT | options
        engine = Engine.load(tiny_checkpoint, **given)
        request.addfinalizer(engine.close)
        return engine

    return load


def profiled(folder: Path, **tasks: Task) -> Path:
    TaskProfile(LAYERS, EXPERTS, TOP_K, tasks=tasks).save(folder / "tasks.json")
    return folder / "tasks.json"


def residents(engine: Engine) -> list[list[int]]:
    settle(engine)
    return engine.state()["residency"]["experts"]


def drain(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


def wishes(engine: Engine) -> np.ndarray:
    return np.array(engine.state()["residency"]["wishes"])


def test_residents_are_those_predicted_by_the_prompts_embedding(
    engine_of: EngineFactory, load: Load, tmp_path: Path
) -> None:
    """One task, two kinds of prompts: only their embeddings tell them apart."""
    runner = engine_of(expert_memory="100%").parts.runner
    low, high = [1, 2, 3, 4], [41, 42, 43, 44]
    embeddings = np.stack([np.asarray(runner.mean_embedding(prompt)) for prompt in (low, high)] * 4)
    embeddings += np.random.default_rng(0).normal(0, 0.01, embeddings.shape).astype(np.float32)
    predictor = write_predictor(tmp_path / "predictor", ["chat"] * 8, [ODD, EVEN] * 4, embeddings)
    engine = load(predictor=predictor, policy="emoe-no-refresh", predict_every=1)
    assert engine.parts.predictor == predictor
    for prompt, experts in ((low, [1, 3, 5]), (high, [0, 2, 4]), (low, [1, 3, 5])):
        engine.generate(prompt, PARAMS, task="chat")
        assert residents(engine) == [experts] * LAYERS


def test_a_prediction_goes_by_the_prompts_that_ran_before(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_predictor(tmp_path / "predictor", ["odd", "even"] * 4, [ODD, EVEN] * 4, opinionated=True)
    engine = load(predictor=folder, policy="emoe-no-refresh", predict_every=1)
    answers: list[np.ndarray] = []
    learned: list[Any] = []
    predict, observe = Predictor.predict_next, Predictor.observe

    def noting(self: Predictor, prompts: Any, rows: int) -> Any:
        answers.append(predict(self, prompts, rows))
        return answers[-1]

    def learning(self: Predictor, task: str, counts: Any, embedding: Any = None) -> None:
        learned.append(embedding)
        observe(self, task, counts, embedding)

    monkeypatch.setattr(Predictor, "predict_next", noting)
    monkeypatch.setattr(Predictor, "observe", learning)
    engine.generate([1, 2, 3], PARAMS, task="odd")
    counts = wishes(engine)
    engine.generate([4, 5, 6], PARAMS, task="even")
    answered(engine)
    runner = engine.parts.runner
    nothing = np.zeros((1, LAYERS, EXPERTS), np.int32)
    asked = Prompts(("even",), np.asarray(runner.mean_embedding([4, 5, 6]))[None], nothing, nothing)
    start = History.empty(LAYERS, EXPERTS)
    fresh = Predictor.load(folder)
    expected, without = (fresh.predict_many(asked, [history], False)[0] for history in (start.after(counts), start))
    np.testing.assert_allclose(answers[-1][0], expected, atol=1e-4)
    assert np.abs(without - expected).max() > 0.01
    assert learned[0] is not None
    np.testing.assert_allclose(learned[0], runner.mean_embedding([1, 2, 3]), rtol=1e-5)


def test_residents_follow_the_wishes_of_an_answer(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of any prompt: only what routers wish for tells experts apart."""
    monkeypatch.setattr(residency_module, "FOLLOWING_SHARE", 1e9)  # a look at every step
    engine = load(policy="emoe", predictor=None, task_profile=None)
    assert engine.parts.predictor is None
    loads: list[int] = []
    for _ in engine.stream([1, 2, 3], LONG):
        settle(engine)
        loads.append(engine.state()["residency"]["loads"]["loads"])
    assert loads[-1] > loads[30] > LAYERS * 3  # those of the start


def test_low_coverage_asks_early(load: Load, tmp_path: Path) -> None:
    """Tasks promise more than the model's random routers keep: that is a drift after 128 steps, in the third prompt."""
    predictor = write_predictor(tmp_path / "predictor", ["odd", "even"] * 4, [ODD, EVEN] * 4)
    profile = profiled(tmp_path, odd=Task(routing=ODD), even=Task(routing=EVEN))
    engine = load(predictor=predictor, task_profile=profile, policy="emoe-no-refresh", predict_every=1000)
    for number in range(3):
        assert answered(engine)["early_predictions"] == 0
        engine.generate([1, 2, number], LONG, task="even" if number else "odd")
    assert answered(engine)["early_predictions"] == 1


def test_predictions_that_are_worse_than_frequency_do_not_count(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = write_predictor(tmp_path / "predictor", ["odd", "even"] * 4, [ODD, EVEN] * 4)
    engine = load(predictor=predictor, policy="emoe-no-refresh", predict_every=1)
    engine.generate([1, 2, 3], PARAMS, task="odd")
    least = np.argsort(wishes(engine), axis=1, kind="stable")[:, :3]
    wrong = np.full((LAYERS, EXPERTS), 0.05 / EXPERTS)
    np.put_along_axis(wrong, least, 0.3, axis=1)
    monkeypatch.setattr(Predictor, "predict_next", lambda self, prompts, rows: np.stack([wrong] * len(prompts)))
    engine.generate([1, 2, 3], PARAMS, task="odd")
    assert residents(engine) == np.sort(least).tolist()
    for _ in range(24):
        engine.generate([1, 2, 3], PARAMS, task="odd")
        answered(engine)
    state = engine.state()["planner"]
    assert state["open"] is False
    assert state["coverage_predicted"] < state["coverage_frequency"]
    assert all(set(kept).isdisjoint(wrongly) for kept, wrongly in zip(residents(engine), least.tolist(), strict=True))


def test_a_plan_is_equation_2_of_the_requests_at_hand(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens left, sensitivity and shares of two requests, one of them half done when the other comes."""
    low, high = (1.0, 1.0, 0.25), (0.5, 1.0, 0.0)
    profile = profiled(
        tmp_path,
        odd=Task(routing=ODD, sensitivity=low, output_length=Lengths.of([30])),
        even=Task(routing=EVEN, sensitivity=high, output_length=Lengths.of([6])),
    )
    plans: list[tuple[Any, ...]] = []
    plan = Residency.plan

    def noting(self: Residency, *given: Any) -> None:
        plans.append(given)
        plan(self, *given)

    monkeypatch.setattr(Residency, "plan", noting)
    engine = load(task_profile=profile, policy="static-task")
    engine.add_request("odd", [1, 2, 3], LONG, task="odd")
    for _ in range(10):
        engine.step()
    engine.add_request("even", [1, 2, 3, 4, 5], LONG, task="even")
    engine.step()
    ((rates, joined, kept, sensitivity),) = plans[-1]
    tokens = np.array([30 - 11, 6 - 1])  # when that step is done
    weighted = tokens[:, None] * np.array([low, high])
    expected = np.einsum("rm,rme->me", weighted, np.stack([ODD, EVEN]))
    np.testing.assert_allclose(rates, 2 * TOP_K * expected / expected.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(joined, TOP_K * EVEN, rtol=1e-5)
    np.testing.assert_allclose(sensitivity, weighted.sum(0) / tokens.sum(), rtol=1e-5)
    assert kept == 1
    drain(engine)


def test_requests_of_other_tasks_are_planned_for_at_once(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the device is busy, and another plan is not due for hours."""
    monkeypatch.setattr(foresight, "PLANNING_SHARE", 1e-9)
    profile = profiled(tmp_path, odd=Task(routing=ODD), even=Task(routing=EVEN))
    engine = load(task_profile=profile, policy="static-task", overlap=True)
    engine.add_request("odd", [1, 2, 3], LONG, task="odd")
    for _ in range(3):
        engine.step()
    assert residents(engine) == [[1, 3, 5]] * LAYERS
    for name in ("even", "even too", "even as well"):
        engine.add_request(name, [1, 2, 3], LONG, task="even")
    for _ in range(3):
        engine.step()
        settle(engine)
    engine.step()
    assert engine.loop.in_flight
    assert all({0, 2} < set(layer) for layer in engine.state()["residency"]["experts"])
    drain(engine)


def test_an_idle_engine_waits_for_the_experts_of_a_prompt(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = profiled(tmp_path, odd=Task(routing=ODD), even=Task(routing=EVEN))
    engine = load(task_profile=profile, policy="static-task", host_memory="0")
    engine.generate([1, 2, 3], PARAMS, task="odd")
    found: list[list[list[int]]] = []
    dispatch, read = Dispatcher.dispatch, ExpertStore.read

    def noting(self: Dispatcher, plan: Any) -> Any:
        found.append(engine.state()["residency"]["experts"])
        return dispatch(self, plan)

    monkeypatch.setattr(Dispatcher, "dispatch", noting)
    monkeypatch.setattr(ExpertStore, "read", lambda *given: (time.sleep(0.05), read(*given))[1])
    engine.generate([1, 2, 3], PARAMS, task="even")
    assert found[0] == [[0, 2, 4]] * LAYERS


def test_background_loads_keep_below_the_links_bandwidth(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_module, "FOLLOWING_SHARE", 1e9)
    engine = load(policy="lru", link_bandwidth=1.0)  # hours for an expert
    before = engine.state()["residency"]["loads"]["staged_bytes"]
    engine.generate([1, 2, 3], LONG)
    loads = engine.state()["residency"]["loads"]
    assert loads["in_flight"] > 3
    assert loads["staged_bytes"] - before <= 2 * engine.parts.residency.slab.record_format.nbytes


def test_loads_go_over_the_modelled_link(load: Load) -> None:
    """Those of the start, those that a step waits for, and those in the background: one after the other."""
    gbps = 1e-3
    began = time.monotonic()
    engine = load(policy="pre-gated", routing="exact", link_gbps=gbps)
    engine.generate([1, 2, 3], PARAMS)
    seconds = time.monotonic() - began
    loads = engine.state()["residency"]["loads"]
    started = engine._residency.slab.nbytes
    assert loads["staged_bytes"] > 2 * started
    assert loads["busy_seconds"] >= 0.99 * loads["staged_bytes"] / (1e9 * gbps)
    assert seconds >= 0.99 * loads["staged_bytes"] / (1e9 * gbps)
    assert loads["bandwidth"] <= 1.01e9 * gbps


def test_experts_are_read_from_files_once_where_the_host_has_room(load: Load) -> None:
    engine = load(policy="static", expert_memory="2 slots")
    for number in range(3):
        engine.generate([1, 2, number], LONG, routing="exact")
    state = engine.state()
    store = state["residency"]["store"]
    assert state["memory"]["host"] >= LAYERS * EXPERTS * engine.parts.residency.slab.record_format.nbytes
    assert store["reads"] <= LAYERS * (EXPERTS + 2)  # those that were resident at the start once more
    assert store["hits"] > store["reads"]
