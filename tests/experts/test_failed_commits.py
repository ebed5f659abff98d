"""Commits that fail, before or after they took the slab's arrays: no ticket is stuck, and nothing wrong is read."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from emoe_jax.experts import slab as slab_module
from emoe_jax.experts.tickets import LoadState
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.residency.residency import SECONDS_BEFORE_RETRY, Residency
from tests.experts.fake_reader import RECORD_FORMAT, FakeReader
from tests.experts.rig import Rig
from tests.residency.test_residency import CONFIG, LAYERS, Clock, plan, rates

COMMIT = slab_module.commit_experts


def failing(donated: bool, times: int = 1, after: int = 0) -> Callable[..., ExpertWeights]:
    """A commit that fails `times` times, once `after` others went well."""
    calls = 0

    def commit(weights: ExpertWeights, *rest: Any) -> ExpertWeights:
        nonlocal calls
        calls += 1
        if not after < calls <= after + times:
            return COMMIT(weights, *rest)
        if donated:
            for array in jax.tree.leaves(weights):
                array.delete()
        raise RuntimeError("the device is gone")

    return commit


@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize("after", [0, 1])
def test_a_failed_commit_ends_its_tickets_and_the_rest_goes_on(rig: Callable[..., Rig], monkeypatch, donated, after):
    """Two layers and a batch of five, which is cut in two: what fails is the first or the second call."""
    r = rig([6, 6])
    r.load(*[(0, expert) for expert in range(6)])
    tickets = [r.loader.request(0, expert, 10.0) for expert in (6, 7)] + [r.loader.request(1, 3, 1.0)]
    for ticket, evict in zip(tickets, (0, 1), strict=False):
        ticket.evict = evict
    assert r.loader.wait_idle(10)
    monkeypatch.setattr(slab_module, "commit_experts", failing(donated, after=after))
    with pytest.raises(RuntimeError, match="the device is gone"):
        r.loader.commit()
    r.check()
    assert all(ticket.state in (LoadState.COMMITTED, LoadState.FAILED) for ticket in tickets)
    assert not r.loader.in_flight().any()
    assert r.loader.must_restore or after
    r.loader.restore()
    assert not r.loader.must_restore
    r.check()
    assert len(r.table.resident(0)) == 6
    r.load(*[(1, expert) for expert in (4, 5)])
    r.loader.load_now(1, [3])
    r.check()


@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failed_load_now_leaves_nothing_behind(rig: Callable[..., Rig], monkeypatch, donated, after):
    """A window of two: some tickets are still staged, or queued, when the commit fails."""
    r = rig([8], window=2)
    r.load((0, 7))
    monkeypatch.setattr(slab_module, "commit_experts", failing(donated, after=after))
    with pytest.raises(RuntimeError, match="the device is gone"):
        r.loader.load_now(0, range(6))
    r.check()
    assert r.loader.wait_idle(10)
    assert not r.loader.in_flight().any()
    r.loader.restore()
    assert r.table.is_resident(0, 7)
    r.loader.load_now(0, range(6))
    r.check()
    ticket = r.loader.request(0, 6)
    assert r.loader.wait_idle(10)
    assert r.loader.commit() == [ticket]
    r.check()


def test_an_error_while_slots_are_chosen_ends_every_ticket_taken(rig: Callable[..., Rig], monkeypatch):
    r = rig([4])
    tickets = [r.loader.request(0, expert) for expert in range(3)]
    assert r.loader.wait_idle(10)

    def broken(*_: object) -> None:
        raise RuntimeError("no slot")

    with monkeypatch.context() as patch:
        patch.setattr(r.table, "assign", broken)
        with pytest.raises(RuntimeError, match="no slot"):
            r.loader.commit()
    assert {ticket.state for ticket in tickets} == {LoadState.FAILED}
    assert not r.loader.in_flight().any()
    r.load(*[(0, expert) for expert in range(3)])
    r.check()


def test_progress_that_raises_leaves_nothing_behind(rig: Callable[..., Rig]):
    r = rig([8], window=2)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        r.loader.fill([range(8)], stop)
    assert r.loader.wait_idle(10)
    assert not r.loader.in_flight().any()
    r.loader.fill([range(8)])
    r.check()


@pytest.mark.parametrize("donated", [False, True])
def test_residency_goes_on_with_the_experts_it_had(monkeypatch, donated):
    """All slots of a layer were about to change: the layer may not be left without experts."""
    clock = Clock()
    first = {"rates": rates(0, 1, 2, 3), "clock": clock}
    with Residency(CONFIG, RECORD_FORMAT, [4] * LAYERS, FakeReader(), "emoe", **first) as residency:
        residency.fill()
        plan(residency, rates(4, 5, 6, 7))
        monkeypatch.setattr(slab_module, "commit_experts", failing(donated))
        residency.settle(10)  # says so in log and state, and raises nothing
        layers = [residency.table.resident(layer).tolist() for layer in range(LAYERS)]
        assert [0, 1, 2, 3] in layers
        assert all(len(layer) == 4 for layer in layers)
        state = residency.state()
        assert "the device is gone" in state["loads"]["last_error"]
        assert state["loads"]["failures"] > 0
        clock.now += SECONDS_BEFORE_RETRY
        plan(residency, rates(4, 5, 6, 7))
        residency.settle(10)
        assert residency.table.resident(0).tolist() == residency.table.resident(1).tolist() == [4, 5, 6, 7]


def test_arrays_that_were_never_computed_are_found_after_a_step_failed():
    with Residency(CONFIG, RECORD_FORMAT, [4] * LAYERS, FakeReader(), "emoe", rates=rates(0, 1, 2, 3)) as residency:
        residency.fill()
        for array in jax.tree.leaves(residency.slab.weights[1]):
            array.delete()
        residency.mend()
        residency.commit()
        assert residency.table.resident(1).tolist() == [0, 1, 2, 3]
        assert np.isfinite(np.asarray(residency.slab.weights[1].w_in)).all()
