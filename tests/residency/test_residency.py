import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.policies.rule import ExpectedWishes
from emoe_jax.residency import residency as residency_module
from emoe_jax.residency.residency import Residency
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader
from train.demo.shape import model_config

LAYERS, EXPERTS = 2, 8
CONFIG = model_config(num_hidden_layers=LAYERS, num_local_experts=EXPERTS)


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def made() -> Iterator[Callable[..., tuple[Residency, FakeReader]]]:
    made = []

    def make(policy: str = "emoe", capacity: int = 4, **options: Any) -> tuple[Residency, FakeReader]:
        reader = FakeReader()
        residency = Residency(CONFIG, RECORD_FORMAT, [capacity] * LAYERS, reader, policy, **options)
        made.append((residency, reader))
        residency.fill()
        return made[-1]

    yield make
    for residency, reader in made:
        reader.gate.set()
        residency.close()


def wishes(**experts: int) -> np.ndarray:
    """Counts in layer 0, `e5=2` being two wishes for expert 5."""
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    for name, count in experts.items():
        counts[0, int(name[1:])] = count
    return counts


def rates(*experts: int) -> np.ndarray:
    """Both layers want these experts."""
    wanted = np.zeros((LAYERS, EXPERTS), np.float32)
    wanted[:, experts] = 1
    return wanted


def plan(residency: Residency, wanted: np.ndarray, sensitivity: float = 1.0) -> None:
    residency.plan(ExpectedWishes(wanted, wanted, 0.0, np.full(LAYERS, sensitivity, np.float32)))


def settle(residency: Residency) -> None:
    residency.settle(10)
    assert residency.state()["loading"] == []


def test_starts_with_the_experts_of_the_highest_rates(made):
    residency, _ = made(rates=rates(1, 3, 5, 7))
    assert residency.table.resident(0).tolist() == [1, 3, 5, 7]


def test_a_plan_brings_in_a_whole_set_at_once(made):
    residency, _ = made(rates=rates(0, 1, 2, 3))
    plan(residency, rates(4, 5, 6, 7))
    settle(residency)
    assert residency.table.resident(0).tolist() == residency.table.resident(1).tolist() == [4, 5, 6, 7]


def test_settling_brings_in_all_that_was_planned_and_ends_in_time(made):
    residency, reader = made(rates=rates(0, 1, 2, 3))
    plan(residency, rates(4, 5, 6, 7))
    residency.settle(10)
    assert residency.table.resident(0).tolist() == residency.table.resident(1).tolist() == [4, 5, 6, 7]
    reader.gate.clear()
    plan(residency, rates(0, 1, 2, 3))
    began = time.monotonic()
    residency.settle(0.05)
    assert 0.05 <= time.monotonic() - began < 5


def test_layers_that_are_not_sensitive_load_nothing(made):
    residency, reader = made(rates=rates(0, 1, 2, 3))
    before = len(reader.reads)
    plan(residency, rates(4, 5, 6, 7), sensitivity=0.0)
    settle(residency)
    assert len(reader.reads) == before


def test_the_policy_is_looked_at_every_few_steps_and_has_missed_none(made, monkeypatch):
    monkeypatch.setattr(residency_module, "FOLLOWING_SHARE", 1e-9)
    clock = Clock()
    residency, _ = made("lru", rates=rates(0, 1, 2, 3), clock=clock)
    assert residency.observe(wishes(e0=1)) == (1, 1, 1)  # the first look; another is not due for long
    assert residency.observe(wishes(e5=1)) is None
    assert residency.observe(wishes(e0=1, e1=1, e2=1)) is None
    assert residency.state()["loading"] == []
    clock.now += 1e9
    assert residency.observe(wishes(e0=1, e1=1, e2=1)) == (3, 7, 6)
    settle(residency)
    assert residency.table.resident(0).tolist() == [0, 1, 2, 5]
    assert residency.coverage == 7 / 8


def test_wishes_are_held_against_what_was_resident_when_they_arose(made, monkeypatch):
    monkeypatch.setattr(residency_module, "FOLLOWING_SHARE", 1e-9)
    residency, _ = made(rates=rates(0, 1, 2, 3))
    for _ in range(3):
        residency.observe(wishes(e4=1, e5=1))
    plan(residency, rates(4, 5, 6, 7))
    settle(residency)
    assert residency.coverage == 0
    residency.observe(wishes(e4=3, e5=3))
    assert residency.coverage == 0.5


def test_useful_loads_are_those_that_were_wished_for_before_they_left(made, monkeypatch):
    monkeypatch.setattr(residency_module, "FOLLOWING_SHARE", 1e9)  # a look at every step
    residency, _ = made("lru")
    residency.observe(wishes(e0=1, e1=1, e2=1))
    residency.observe(wishes(e5=1))  # 3 leaves
    settle(residency)
    residency.observe(wishes(e5=1))  # 5 was useful
    residency.observe(wishes(e6=1))
    settle(residency)
    for _ in range(2):
        residency.observe(wishes(e7=1, e5=1, e1=1, e2=1))  # 7 takes the place of an expert; 6 is not wished for again
        settle(residency)
    residency.observe(wishes(e3=3))
    settle(residency)
    loads = residency.state()["loads"]
    assert loads["useful"] >= 2
    assert loads["useless"] >= 1
    assert loads["useful"] + loads["useless"] <= loads["loads"]


def test_a_newer_plan_gives_up_loads_that_have_not_started(made):
    residency, reader = made(rates=rates(0, 1, 2, 3))
    reader.gate.clear()
    plan(residency, rates(4, 5, 6, 7))
    plan(residency, rates(0, 1, 2, 3))
    reader.gate.set()
    settle(residency)
    assert residency.table.resident(0).tolist() == [0, 1, 2, 3]
    state = residency.state()["loads"]
    assert state["cancelled"] == 8
    assert state["in_flight"] == 0


def test_state_tells_what_is_loading_and_what_was_wished_for(made):
    residency, reader = made(rates=rates(0, 1, 2, 3))
    reader.gate.clear()
    plan(residency, rates(4, 1, 2, 3))
    assert sorted(residency.state()["loading"]) == [[0, 4], [1, 4]]
    reader.gate.set()
    settle(residency)
    residency.observe(wishes(e4=2, e5=1))
    residency.observe(wishes(e4=1))
    state = residency.state()
    assert state["loading"] == []
    assert state["wishes"] == [[0, 0, 0, 0, 3, 1, 0, 0], [0] * 8]
    assert state["coverage"] == 3 / 4


def test_an_expert_that_cannot_be_read_is_left_alone_and_named(made):
    clock = Clock()
    residency, reader = made(rates=rates(0, 1, 2, 3), clock=clock)
    reader.fail(0, 4, times=100)
    deadline = time.monotonic() + 20
    while residency.state()["loads"]["last_error"] is None:
        plan(residency, rates(4, 1, 2, 3))
        settle(residency)
        assert time.monotonic() < deadline
    assert "expert 4 of MoE layer 0" in residency.state()["loads"]["last_error"]
    tried = reader.reads.count((0, 4))
    for _ in range(5):
        plan(residency, rates(4, 1, 2, 3))
        settle(residency)
    assert reader.reads.count((0, 4)) == tried
    assert residency.table.resident(1).tolist() == [1, 2, 3, 4]  # the other layer was served
    reader.fail(0, 4, times=0)
    clock.now += residency_module.SECONDS_BEFORE_RETRY
    plan(residency, rates(4, 1, 2, 3))
    settle(residency)
    assert residency.table.resident(0).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan")])
def test_a_link_without_bandwidth_is_refused(made, bandwidth):
    with pytest.raises(ConfigError, match="link bandwidth"):
        made(link_bandwidth=bandwidth)


def test_a_step_in_flight_is_held_against_the_residents_that_it_had(made, monkeypatch):
    monkeypatch.setattr(residency_module, "FOLLOWING_SHARE", 1e-9)
    residency, _ = made(rates=rates(0, 1, 2, 3))
    in_flight = residency.table.resident_mask
    plan(residency, rates(4, 5, 6, 7))
    settle(residency)
    step = wishes(e0=2, e4=5, e5=1)
    residency.observe(step, step * in_flight)
    assert residency.coverage == 2 / 8
    assert residency.state()["loads"]["useful"] == 0  # 4 and 5 came too late for that step
    step = wishes(e4=1)
    residency.observe(step, step * residency.table.resident_mask)
    assert residency.state()["loads"]["useful"] == 1


@pytest.mark.parametrize("wished", [True, False])
def test_a_load_is_useless_only_once_the_step_in_flight_did_without_it(made, monkeypatch, wished):
    monkeypatch.setattr(residency_module, "FOLLOWING_SHARE", 1e-9)
    residency, _ = made(rates=rates(0, 1, 2, 3), policy="emoe")
    plan(residency, rates(4, 5, 6, 7))
    settle(residency)
    in_flight = residency.table.resident_mask  # dispatched while 4 to 7 are there
    plan(residency, rates(0, 1, 2, 3))
    settle(residency)
    step = wishes(e4=3 * wished, e0=1)
    residency.observe(step, step * in_flight)
    loads = residency.state()["loads"]
    assert loads["useful"] == wished
    assert loads["useless"] == 2 * 4 - wished


def test_masks_taken_from_the_table_do_not_change(made):
    residency, _ = made(rates=rates(0, 1, 2, 3))
    before = residency.table.resident_mask
    assert residency.table.resident_mask is before
    plan(residency, rates(4, 5, 6, 7))
    settle(residency)
    assert before[0].tolist() == [True] * 4 + [False] * 4
    assert residency.table.resident_mask[0].tolist() == [False] * 4 + [True] * 4
    with pytest.raises(ValueError, match="read-only"):
        before[0, 0] = False


def test_absent_experts_come_to_host_memory_the_best_first(made: Callable[..., tuple[Residency, FakeReader]]) -> None:
    """Room for three of the eight that are absent: those of the highest rates."""
    known = np.arange(LAYERS * EXPERTS, dtype=np.float32).reshape(LAYERS, EXPERTS)
    residency, reader = made("static", rates=known, host_bytes=3 * RECORD_FORMAT.nbytes)
    deadline = time.monotonic() + 20
    while len(reader.reads) < 2 * 4 + 3:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert reader.reads[8:] == [(1, 3), (1, 2), (1, 1)]
    residency.close()
    assert residency.state()["store"]["fills"] == 3
    assert len(reader.reads) == 11
