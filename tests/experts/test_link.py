"""The modelled link: transfers queue, those that a step waits for go first, and all of it takes its time."""

import threading
import time
from collections.abc import Callable

import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.experts.link import ModelledLink
from tests.experts.fake_reader import RECORD_FORMAT
from tests.experts.rig import Rig

GB = 10**9


class FakeTime:
    """A clock that only sleeping and `work` move."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    work = sleep


@pytest.fixture
def fake() -> FakeTime:
    return FakeTime()


def link_of(fake: FakeTime) -> ModelledLink:
    return ModelledLink(GB, fake.clock, fake.sleep)


def send(link: ModelledLink, nbytes: int, during: Callable[[], None] = lambda: None, urgent: bool = False) -> None:
    with link.transfer(nbytes, lambda: urgent):
        during()


@pytest.mark.parametrize("urgent", [False, True])
@pytest.mark.parametrize("nbytes", [1, 3_000_000, 5 * GB])
def test_a_transfer_takes_its_bytes_over_the_bandwidth(fake: FakeTime, nbytes: int, urgent: bool) -> None:
    send(link_of(fake), nbytes, urgent=urgent)
    assert fake.now == pytest.approx(100 + nbytes / GB, abs=1e-9)


def test_the_real_transfer_counts_towards_that_and_may_take_longer(fake: FakeTime) -> None:
    link = link_of(fake)
    send(link, 3 * GB, lambda: fake.work(2))
    assert fake.now == pytest.approx(103)
    send(link, 3 * GB, lambda: fake.work(5))
    assert fake.now == pytest.approx(108)
    send(link, 3 * GB)
    assert fake.now == pytest.approx(111)


def test_time_that_nothing_was_asked_for_is_not_made_up_for(fake: FakeTime) -> None:
    link = link_of(fake)
    send(link, GB)
    fake.work(50)
    send(link, GB)
    assert fake.now == pytest.approx(152)


def test_a_transfer_that_fails_leaves_the_link_to_others(fake: FakeTime) -> None:
    link = link_of(fake)
    with pytest.raises(OSError, match="gone"), link.transfer(GB, lambda: False):
        raise OSError("gone")
    send(link, GB)
    assert 101 <= fake.now <= 102


class Crowd:
    """Threads at a link whose first transfer ends when `go` is set; each tells its name when its transfer begins.

    Sleeping is counted, and takes no time.
    """

    def __init__(self) -> None:
        self.began: list[str] = []
        self.go = threading.Event()
        self.slept = 0.0
        self.urgent: set[str] = set()
        self.link = ModelledLink(GB, lambda: 0.0, self._sleep)
        self._threads: list[threading.Thread] = []

    def _sleep(self, seconds: float) -> None:
        assert self.go.wait(10)
        self.slept = max(self.slept, seconds)

    def send(self, name: str) -> None:
        waiting = len(self.link._waiting)

        def run() -> None:
            with self.link.transfer(GB, lambda: name in self.urgent):
                self.began.append(name)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        until(lambda: len(self.link._waiting) > waiting or (not waiting and self.began != []))

    def join(self) -> None:
        self.go.set()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_transfers_queue_in_order_one_behind_another() -> None:
    crowd = Crowd()
    for name in "abcd":
        crowd.send(name)
    assert crowd.began == ["a"]
    crowd.join()
    assert crowd.began == ["a", "b", "c", "d"]
    assert crowd.slept == pytest.approx(4)  # the clock stands still: the last one ends 4 s from the start


def test_those_that_a_step_waits_for_go_first() -> None:
    crowd = Crowd()
    for name in "abcd":
        crowd.send(name)
    crowd.urgent.add("d")  # it is in the queue already when a step begins to wait for it
    crowd.urgent.add("e")
    crowd.send("e")
    crowd.join()
    assert crowd.began == ["a", "d", "e", "b", "c"]


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan")])
def test_a_link_that_moves_nothing_is_refused(bandwidth: float) -> None:
    with pytest.raises(ConfigError, match="modelled link of"):
        ModelledLink(bandwidth)


def test_every_load_takes_its_time() -> None:
    """Waited for and in the background alike, through the loader, on the real clock."""
    each = 0.02
    rig = Rig([4, 4], link=ModelledLink(RECORD_FORMAT.nbytes / each))
    with rig.loader:
        began = time.monotonic()
        rig.loader.load_now(0, [0, 1, 2])
        assert time.monotonic() - began >= 3 * each
        began = time.monotonic()
        rig.load((1, 4), (1, 5))
        assert time.monotonic() - began >= 2 * each
        began = time.monotonic()
        background = [rig.loader.request(1, expert) for expert in (6, 7)]
        rig.loader.load_now(0, [3])
        assert time.monotonic() - began >= each
        assert any(ticket.is_active for ticket in background)
        assert rig.loader.wait_idle(10)
        assert time.monotonic() - began >= 3 * each
        rig.loader.commit()
        rig.check()
