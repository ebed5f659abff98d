from collections.abc import Callable

import pytest

from benchmarks.overhead.scheduling import schedule_all
from emoe_jax.scheduling.registry import SCHEDULING_POLICIES
from tests.effort import calls_made


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_a_request_costs_no_more_in_a_long_queue(policy: str) -> None:
    """The host's share must stay small beside the device's; `benchmarks.overhead` says what it is in seconds."""
    assert calls_per_request(policy, 1_200) < 1.1 * calls_per_request(policy, 300)


def calls_per_request(policy: str, requests: int) -> float:
    calls = 0

    def counted(work: Callable[[], object]) -> None:
        nonlocal calls
        calls += calls_made(work)

    scheduler = schedule_all(policy, requests, counted)
    assert scheduler.attainment.total.ended == requests
    return calls / requests
