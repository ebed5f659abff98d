import pytest

from emoe_jax.policies.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def spend(pace: Pace, clock: Clock, seconds: float) -> None:
    with pace.timed():
        clock.now += seconds


def test_worked_example() -> None:
    clock = Clock()
    pace = Pace(0.01, clock, clock)
    assert pace.due
    spend(pace, clock, 0.0002)
    clock.now += 0.0199
    assert not pace.due
    clock.now += 0.0002
    assert pace.due


def failing(pace: Pace, clock: Clock) -> None:
    with pace.timed():
        clock.now += 1
        raise RuntimeError


@pytest.mark.parametrize("share", [0.5, 0.02])
def test_no_more_than_the_share_of_the_time_is_spent(share: float) -> None:
    clock = Clock()
    pace, began, times, spent = Pace(share, clock, clock), clock.now, 0, 0.0
    while clock.now - began < 50:
        if pace.due:
            seconds = 0.01 if times % 3 else 0.03
            spend(pace, clock, seconds)
            spent += seconds
            times += 1
        clock.now += 0.001
    assert spent == pytest.approx(share / (1 + share) * (clock.now - began), rel=0.1)


def test_what_failed_counts_too() -> None:
    clock = Clock()
    pace = Pace(0.1, clock, clock)
    with pytest.raises(RuntimeError):
        failing(pace, clock)
    clock.now += 9.9  # a second at a tenth of the time
    assert not pace.due
    clock.now += 0.2
    assert pace.due
