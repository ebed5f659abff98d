from collections.abc import Callable

import pytest

from benchmarks.overhead.scheduling import schedule_all
from tests.effort import lines_run

LINES = {"slo": 1_600, "fcfs": 1_150}
"""Of Python that a request may cost: about a tenth more than it does."""


@pytest.mark.parametrize("policy", list(LINES))
def test_a_request_costs_no_more_in_a_long_queue(policy: str) -> None:
    """The host's share must stay small beside the device's; `benchmarks.overhead` says what it is in seconds."""
    assert max(lines_per_request(policy, 300), lines_per_request(policy, 3_000)) < LINES[policy]


def lines_per_request(policy: str, requests: int) -> float:
    lines = 0

    def counted(work: Callable[[], object]) -> None:
        nonlocal lines
        lines += lines_run(work)

    scheduler = schedule_all(policy, requests, counted)
    assert scheduler.attainment.total.ended == requests
    return lines / requests
