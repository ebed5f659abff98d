"""Loads ahead within a step, without a model: what a guess spares, and what a wrong one costs."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from emoe_jax.residency.ahead import AheadStats, LoadsAhead
from emoe_jax.residency.residency import Residency
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader
from tests.residency.test_residency import CONFIG, EXPERTS, LAYERS

Made = tuple[Residency, LoadsAhead, FakeReader]


@pytest.fixture
def made() -> Iterator[Made]:
    reader = FakeReader()
    residency = Residency(CONFIG, RECORD_FORMAT, [4] * LAYERS, reader, "pre-gated")
    residency.fill()
    reader.reads.clear()
    assert residency.waves.ahead is not None
    yield residency, residency.waves.ahead, reader
    reader.gate.set()
    residency.close()


def counts(*experts: int) -> np.ndarray:
    wished = np.zeros(EXPERTS, np.int64)
    wished[list(experts)] = 1
    return wished


def run(residency: Residency, *experts: int, layer: int = 1) -> None:
    for _ in residency.waves.waves(layer, counts(*experts)):
        pass


def staged(residency: Residency) -> None:
    assert residency._loader.wait_idle(10)


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_expert_that_was_staged_ahead_is_moved_once_and_not_waited_for(made: Made) -> None:
    residency, ahead, reader = made
    ahead.expect(1, counts(0, 5, 6))
    staged(residency)
    assert residency.table.resident(1).tolist() == [0, 1, 2, 3]  # no slot is given away before the router has chosen
    moved = list(reader.reads)
    assert sorted(moved) == [(1, 5), (1, 6)]
    run(residency, 0, 5, 6)
    assert reader.reads == moved
    assert set(residency.table.resident(1).tolist()) >= {0, 5, 6}
    assert ahead.stats == AheadStats(misses=2, asked=2, spared=2)


def test_a_wrong_guess_evicts_nothing(made: Made) -> None:
    residency, ahead, _ = made
    ahead.expect(1, counts(5, 6))
    staged(residency)
    run(residency, 0, 1)
    residency.commit()
    assert residency.table.resident(1).tolist() == [0, 1, 2, 3]
    assert ahead.stats == AheadStats(asked=2, useless=2)
    run(residency, 0, 5)  # the guess is forgotten: this one is an ordinary miss
    assert ahead.stats == AheadStats(misses=1, asked=2, useless=2)


def test_a_guess_of_which_nothing_was_moved_yet_is_withdrawn(made: Made) -> None:
    residency, ahead, reader = made
    reader.gate.clear()
    ahead.expect(1, counts(4, 5, 6, 7))
    until(lambda: len(reader.reads) == 1)  # the others wait behind it
    ahead.arrive(1, np.array([0, 1]))
    assert ahead.stats == AheadStats(asked=4, useless=1, withdrawn=3)
    reader.gate.set()
    staged(residency)
    assert len(reader.reads) == 1
    residency.commit()
    assert residency.table.resident(1).tolist() == [0, 1, 2, 3]


def test_a_step_that_comes_too_early_waits_for_the_load_that_is_under_way(made: Made) -> None:
    residency, ahead, reader = made
    reader.gate.clear()
    ahead.expect(1, counts(5))
    until(lambda: len(reader.reads) == 1)
    threading.Timer(0.05, reader.gate.set).start()
    run(residency, 5)
    assert reader.reads == [(1, 5)]
    assert residency.table.is_resident(1, 5)
    assert ahead.stats == AheadStats(misses=1, asked=1, late=1)


def test_more_experts_than_slots_are_asked_for_and_served_in_waves(made: Made) -> None:
    residency, ahead, reader = made
    ahead.expect(1, counts(*range(EXPERTS)))
    staged(residency)
    waves = [np.flatnonzero(slots < 4).tolist() for slots in residency.waves.waves(1, counts(*range(EXPERTS)))]
    assert waves == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(reader.reads) == [(1, 4), (1, 5), (1, 6), (1, 7)]
    assert ahead.stats == AheadStats(misses=4, asked=4, spared=4)


def test_a_guess_that_cannot_be_read_harms_only_who_wishes_for_it(made: Made) -> None:
    residency, ahead, reader = made
    reader.fail(1, 5, times=100)
    ahead.expect(1, counts(5, 6))
    staged(residency)
    until(lambda: residency.loads.failures == 1)
    run(residency, 0, 6)
    assert residency.table.is_resident(1, 6)
    ahead.expect(1, counts(5))
    with pytest.raises(OSError, match="cannot read expert 5 of layer 1"):
        run(residency, 5)
    reader.fail(1, 5, times=0)
    run(residency, 5)
    assert residency.table.is_resident(1, 5)


def test_what_a_failed_step_had_asked_for_is_asked_for_again(made: Made) -> None:
    residency, ahead, _ = made
    ahead.expect(1, counts(5))
    staged(residency)
    residency.commit()  # the step ended before layer 1: there is no empty slot for it
    assert residency.table.resident(1).tolist() == [0, 1, 2, 3]
    ahead.expect(1, counts(5))
    staged(residency)
    run(residency, 5)
    assert ahead.stats.spared == 1


def test_other_policies_do_not_look_ahead() -> None:
    with Residency(CONFIG, RECORD_FORMAT, [4] * LAYERS, FakeReader(), "lru") as residency:
        assert residency.waves.ahead is None
        assert residency.state()["ahead"] is None
