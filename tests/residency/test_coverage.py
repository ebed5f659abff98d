"""Coverage is judged against the experts that were resident when a step was dispatched."""

from typing import Any

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.device.dispatcher import Dispatched, Dispatcher
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.residency import residency as residency_module
from emoe_jax.scheduling.plan import StepPlan
from tests.engines import EngineFactory, settle

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (5, 19, 2, 33)]


class Ledger:
    """Wishes of every step, and those for experts that were resident before it was dispatched."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.wishes = self.resident = 0
        self._masks: dict[StepPlan, np.ndarray] = {}
        dispatch, collect = Dispatcher.dispatch, Dispatcher.collect

        def noting_dispatch(runner: Dispatcher, plan: StepPlan) -> Dispatched:
            state = engine.state()["residency"]
            experts = np.arange(state["num_experts"])
            self._masks[plan] = np.stack([np.isin(experts, layer) for layer in state["experts"]])
            return dispatch(runner, plan)

        def noting_collect(runner: Dispatcher, dispatched: Dispatched) -> Any:
            result = collect(runner, dispatched)
            self.wishes += int(result.wishes.counts.sum())
            self.resident += int(result.wishes.counts[self._masks.pop(dispatched.plan)].sum())
            return result

        monkeypatch.setattr(Dispatcher, "dispatch", noting_dispatch)
        monkeypatch.setattr(Dispatcher, "collect", noting_collect)


def wishes_of(engine: Engine) -> tuple[int, int]:
    """All wishes so far, and those for resident experts."""
    state = engine.state()["residency"]
    wishes = int(np.sum(state["wishes"]))
    return wishes, round(wishes * (state["coverage"] or 0.0))


@pytest.mark.parametrize("routing", ["resident", "exact"])
@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("overlap", [False, True])
def test_wishes_are_held_against_the_residents_at_dispatch(
    engine_of: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
    routing: RoutingContract,
    slots: int,
    overlap: bool,
) -> None:
    """One sequence at a time, so that a step is one batch. LRU exchanges experts all the time."""
    monkeypatch.setattr(residency_module, "FOLLOWING_SHARE", 1e9)  # a look at every step
    engine = engine_of(expert_memory=f"{slots} slots", policy="lru", overlap=overlap, max_num_seqs=1)
    before, before_resident = wishes_of(engine)
    loads = engine.state()["residency"]["loads"]["loads"]
    ledger = Ledger(engine, monkeypatch)
    params = SamplingParams(max_tokens=30, temperature=1, seed=7, ignore_eos=True)
    for prompt in PROMPTS:
        for _ in engine.stream(prompt, params, routing=routing):
            settle(engine)  # what was asked for is there before the next step
    assert engine.state()["residency"]["loads"]["loads"] > loads
    wishes, resident = wishes_of(engine)
    assert (wishes - before, resident - before_resident) == (ledger.wishes, ledger.resident)
    assert ledger.resident < 0.95 * ledger.wishes  # also under `exact`, whose waves load all that is missing


def test_planner_and_policy_are_told_the_same(engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency_module, "FOLLOWING_SHARE", 1e9)
    engine = engine_of(expert_memory="3 slots", policy="emoe", overlap=True, max_num_seqs=1)
    ledger, told = Ledger(engine, monkeypatch), []
    planner = engine.parts.planner
    assert planner is not None
    monkeypatch.setattr(planner, "observe", lambda *observed: told.append(observed))
    engine.generate(PROMPTS[1], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True), routing="exact")
    assert (sum(w for w, _, _ in told), sum(r for _, r, _ in told)) == (ledger.wishes, ledger.resident)
