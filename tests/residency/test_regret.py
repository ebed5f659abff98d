"""Regret seen through a whole engine: which steps, tasks and loads its counters are of."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.policies import regret as regret_module
from tests.engines import RESIDENT, settle
from tests.residency.test_coverage import Ledger
from tests.residency.test_foresight import PROFILE

WINDOW = 4
PARAMS = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


@pytest.fixture
def engine(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Its regret judges every window at once, as if that took no time."""
    monkeypatch.setattr(regret_module, "MOST_STEPS", WINDOW)
    monkeypatch.setattr(regret_module, "LEAST_STEPS", WINDOW)
    monkeypatch.setattr(regret_module, "REGRET_SHARE", 1e9)
    PROFILE.save(tmp_path / "tasks.json")
    with Engine.load(
        tiny_checkpoint,
        expert_memory="3 slots",
        task_profile=tmp_path / "tasks.json",
        max_num_seqs=2,
        policy="lru",
        **RESIDENT,
    ) as engine:
        yield engine


def test_the_engine_is_judged_by_what_was_resident_when_wishes_arose(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(engine, monkeypatch)
    loads = engine.state()["residency"]["loads"]["loads"]
    for _ in range(4):
        engine.generate([3, 1, 4, 1, 5], SamplingParams(max_tokens=WINDOW, temperature=0, ignore_eos=True), task="odd")
        settle(engine)
    state = engine.state()
    regret, residents = state["regret"], state["regret"]["policies"]["engine"]
    assert (regret["steps"], regret["steps_left_out"], state["steps"]) == (4 * WINDOW, 0, 4 * WINDOW)
    assert (regret["wishes"], residents["wishes"]) == (ledger.wishes, ledger.resident)
    assert residents["coverage"] == pytest.approx(state["residency"]["coverage"])
    assert 0 < residents["lookups"] < regret["lookups"]
    assert loads < residents["loads"] <= state["residency"]["loads"]["loads"]
    assert regret["seconds"] > 0
    rivals = {name: of["lookups"] for name, of in regret["policies"].items() if name != "engine"}
    assert rivals.keys() == {"lru", "lfu", "static-task", "belady"}
    assert max(rivals, key=rivals.__getitem__) == "belady"


def test_static_task_keeps_the_experts_of_the_tasks_that_run(engine: Engine) -> None:
    for task, experts in (("odd", [1, 3, 5]), ("even", [0, 2, 4])):
        engine.generate([3, 1, 4, 1, 5], PARAMS, task=task)
        at = list(engine.state()["regret"]["policies"]).index("static-task") - 1
        assert [np.flatnonzero(layer).tolist() for layer in engine.parts.regret.resident[at]] == [experts] * 3


def test_rivals_get_the_slots_that_a_trade_leaves(engine: Engine) -> None:
    engine.generate([3, 1, 4], PARAMS)
    engine.parts.residency.resize(0, 2)
    engine.foresight.slots_changed()
    assert (engine.parts.regret.resident.sum(-1) == [2, 3, 3]).all()


def test_where_all_are_resident_there_is_nothing_to_regret(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regret_module, "MOST_STEPS", 1)
    monkeypatch.setattr(regret_module, "LEAST_STEPS", 1)
    with Engine.load(tiny_checkpoint, expert_memory="100%") as engine:
        engine.generate([3, 1, 4], PARAMS)
        regret = engine.state()["regret"]
    assert (regret["steps"], regret["steps_left_out"], regret["seconds"]) == (0, 0, 0)
