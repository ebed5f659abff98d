"""What a step waits for loads is told apart from what it computes, and deadlines count from arrival."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from emoe_jax import SLO, Engine, SamplingParams
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.errors import SloUnattainable
from emoe_jax.experts.store import ExpertStore
from emoe_jax.requests.sequence import Sequence
from emoe_jax.residency.admission import ExpertLoading
from emoe_jax.residency.residency import Residency
from emoe_jax.scheduling.slo import SloPolicy
from tests.engines import EngineFactory

SLOW = 0.02
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def more_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds in this list count as waited for loads, besides those that were."""
    waits: list[float] = []
    really = Residency.waited_seconds
    monkeypatch.setattr(Residency, "waited_seconds", property(lambda each: really.__get__(each) + sum(waits)))
    return waits


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_tell_waiting_from_computing(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    engine = engine_of(expert_memory="2 slots", overlap=overlap)
    engine.generate([1, 2, 3], GREEDY, routing="exact")  # compiles
    told: list[tuple[float, float]] = []
    observe = SloPolicy.observe

    def noting(policy: SloPolicy, plan: Any, seconds: float, waited: float = 0.0) -> None:
        told.append((seconds, waited))
        observe(policy, plan, seconds, waited)

    def slowly(read: Callable[[ExpertStore, int, int], Any]) -> Callable[[ExpertStore, int, int], Any]:
        def slow(store: ExpertStore, layer: int, expert: int) -> Any:
            time.sleep(SLOW)
            return read(store, layer, expert)

        return slow

    monkeypatch.setattr(SloPolicy, "observe", noting)
    residency = engine.parts.residency
    before, loads, began = residency.waited_seconds, residency.loads.waited_loads, time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(ExpertStore, "read", slowly(ExpertStore.read))
        patch.setattr(ExpertStore, "at_hand", slowly(ExpertStore.at_hand))
        engine.generate([1, 2, 3], GREEDY, routing="exact")
    took = time.monotonic() - began
    waited = residency.waited_seconds - before
    assert waited >= SLOW * (residency.loads.waited_loads - loads) / 4  # two threads read, a window at a time
    assert sum(w for _, w in told) == pytest.approx(waited)
    assert sum(s for s, _ in told) <= took - waited + 1e-6
    loading = ExpertLoading(None, residency)
    sequence = Sequence("waits", [1, 2, 3], routing="exact")
    assert loading.seconds(sequence) == 0  # nothing is known of its experts
    stats = residency.loads
    monkeypatch.setattr(type(loading.experts), "wanted", lambda *_: 3)
    assert loading.seconds(sequence) == pytest.approx(3 * stats.wait_seconds / stats.waited_loads)


@pytest.mark.parametrize(
    ("overlap", "slow_step", "kind"), [(False, 1, "load"), (False, 4, "layer"), (True, 1, "layer"), (True, 4, "load")]
)
def test_an_exact_step_is_booked_with_its_own_time(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch, overlap: bool, slow_step: int, kind: str
) -> None:
    """Its layers stop for the host, so that the step is computed while the one before it has yet to be collected."""
    engine = engine_of(expert_memory="2 slots", overlap=overlap)
    engine.generate([1, 2, 3], GREEDY, routing="exact")
    told: list[tuple[Any, float, float]] = []
    monkeypatch.setattr(SloPolicy, "observe", lambda _, plan, seconds, waited=0.0: told.append((plan, seconds, waited)))
    dispatch, slow = Dispatcher.dispatch, []

    def slowly(runner: Dispatcher, plan: Any) -> Any:
        dispatched.append(plan)
        if len(dispatched) == slow_step:
            slow.append(plan)
            if kind == "load":
                waits.append(1.0)
            time.sleep(1.0)
        return dispatch(runner, plan)

    dispatched: list[Any] = []
    waits = more_waits(monkeypatch)
    monkeypatch.setattr(Dispatcher, "dispatch", slowly)
    engine.generate([1, 2, 3], GREEDY, routing="exact")
    times = [waited if kind == "load" else seconds for _, seconds, waited in told]
    booked = {id(plan): spent for (plan, _, _), spent in zip(told, times, strict=True)}
    assert booked.pop(id(slow[0])) >= 1.0 - 1e-6
    assert max(booked.values()) < 0.8


def test_a_prompt_that_waits_for_its_plan_computes_no_longer(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(expert_memory="2 slots", overlap=True)
    engine.generate([1, 2, 3], GREEDY)
    told: list[tuple[float, float]] = []
    monkeypatch.setattr(SloPolicy, "observe", lambda _, plan, seconds, waited=0.0: told.append((seconds, waited)))

    def settle(plan: Any, seconds: float) -> None:
        time.sleep(0.3)
        waits.append(0.3)

    waits = more_waits(monkeypatch)
    monkeypatch.setattr(engine.foresight, "settle", settle)
    engine.generate([1, 2, 3], GREEDY)
    assert sum(waited for _, waited in told) == pytest.approx(0.3)
    assert max(seconds for seconds, _ in told) < 0.3


@pytest.mark.parametrize("early", [0.0, 2.5])
def test_deadlines_count_from_arrival(engine_of: EngineFactory, early: float) -> None:
    engine: Engine = engine_of(expert_memory="100%")
    engine.generate([1, 2, 3], GREEDY)
    arrival = time.monotonic() - early
    engine.add_request("slo", [1, 2, 3], GREEDY, slo=SLO(ttft_ms=2000), arrival=arrival)
    before = engine.state()["scheduler"]["slo"]["attained"]
    while engine.has_work():
        engine.step()
    assert engine.state()["scheduler"]["slo"]["attained"] - before == (early < 2)
    queued = engine.pop("slo").completions[0].queue_seconds
    assert queued is not None
    assert queued >= early
    if early:
        with pytest.raises(SloUnattainable):
            engine.add_request("strict", [1], GREEDY, slo=SLO(ttft_ms=2000, strict=True), arrival=arrival)
    else:
        engine.add_request("strict", [1], GREEDY, slo=SLO(ttft_ms=60_000, strict=True), arrival=arrival)
        engine.pop("strict")


def test_an_arrival_in_the_future_is_now(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="100%")
    engine.add_request("future", [1, 2], GREEDY, arrival=time.monotonic() + 1000)
    (sequence,) = engine.parts.scheduler.waiting
    assert sequence.arrival <= time.monotonic()
    engine.pop("future")
