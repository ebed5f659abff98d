"""The queue that loads wait in, as its threads see it."""

import threading

import jax.numpy as jnp
import pytest

from emoe_jax.experts.tickets import TicketQueue

TICKETS = 8


def test_whoever_waits_for_all_loads_is_woken_when_the_last_is_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = TicketQueue(record_bytes=1, window=TICKETS, bandwidth=None)
    for expert in range(TICKETS):
        queue.request(0, expert, 0.0)
    looked, looks, is_idle = threading.Event(), [], TicketQueue._is_idle

    def counted(self: TicketQueue) -> bool:
        if threading.current_thread() is waiter:
            looks.append(None)
            looked.set()
        return is_idle(self)

    monkeypatch.setattr(TicketQueue, "_is_idle", counted)
    waiter = threading.Thread(target=queue.wait_idle, args=(20.0,))
    waiter.start()
    assert looked.wait(20)
    for _ in range(TICKETS):
        ticket = queue.next()
        assert ticket is not None
        assert waiter.is_alive()
        queue.set_ready(ticket, (jnp.zeros(()),))
    waiter.join(20)
    assert not waiter.is_alive()
    assert len(looks) == 2  # before it waited, and after the last
