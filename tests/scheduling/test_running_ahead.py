"""Steps scheduled while the one before still runs: the same tokens, and nothing written over what is still read."""

import zlib
from collections import deque

import pytest
from hypothesis import given, settings

from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.plan import SampledToken, StepPlan, StepResult
from emoe_jax.scheduling.scheduler import Scheduler
from tests.scheduling.test_scheduler import EOS, Workload, expected_token, make, play, seq, workloads


def token(sequence: Sequence, position: int) -> int:
    """The fake model: now and then it ends the text."""
    return (
        EOS if zlib.crc32(f"{sequence.request_id} {position}".encode()) % 9 == 0 else expected_token(sequence, position)
    )


def expected_tokens(scheduler: Scheduler, sequence: Sequence) -> list[int]:
    prompt, tokens = len(sequence.prompt_token_ids), []
    while len(tokens) < min(sequence.params.max_tokens, scheduler.max_model_len - prompt):
        tokens.append(token(sequence, prompt + len(tokens)))
        if tokens[-1] == EOS:
            break
    return tokens


class AheadRunner:
    """Computes plans when they are dispatched, in order, and hands the results out a step later."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.cells: dict[tuple[int, int], tuple[Sequence, int]] = {}  # (page, offset) -> what was written there
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.wasted = 0

    def dispatch(self) -> None:
        plan, size = self.scheduler.schedule(0.0), self.scheduler.pool.page_size
        if not plan:
            return
        work = [(s, s.num_computed, 1, True) for s in plan.decodes]
        work += [(c.sequence, c.start, c.length, c.is_last) for c in plan.prefills]
        sampled = {}
        for s, start, length, samples in work:
            assert start == s.num_computed
            assert samples == (start + length == s.num_tokens)
            for position in range(start, start + length):
                self.cells[s.pages[position // size], position % size] = s, position
            if samples:
                for position in range(s.num_tokens):
                    assert self.cells[s.pages[position // size], position % size] == (s, position)
                sampled[s] = SampledToken(token(s, s.num_tokens))
        self.scheduler.dispatched(plan)
        self.in_flight.append((plan, StepResult(sampled)))

    def step(self) -> None:
        if not self.in_flight:
            self.dispatch()
        if self.in_flight:
            self.dispatch()
            plan, result = self.in_flight.popleft()
            self.wasted += sum(sequence.finished for sequence in plan.sequences)
            self.scheduler.update(plan, result)


@given(workloads())
@settings(max_examples=150, deadline=None)
def test_any_workload_gives_the_tokens_of_the_plain_loop(workload: Workload):
    scheduler, arrivals, _ = workload
    play(workload, AheadRunner(scheduler).step)
    assert scheduler.pool.num_used == 0
    for _, sequence in arrivals:
        assert sequence.finished
        tokens = expected_tokens(scheduler, sequence)
        if sequence.finish_reason == "abort":
            tokens = tokens[: len(sequence.generated)]
        assert sequence.generated == tokens


def test_an_end_by_length_is_foreseen_and_no_step_wasted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.scheduling.test_running_ahead.token", expected_token)
    scheduler = make(max_model_len=16)
    for sequence in (seq("a", max_tokens=4), seq("b", prompt=12, max_tokens=40)):
        scheduler.add(sequence)
    runner = AheadRunner(scheduler)
    while scheduler.has_work:
        runner.step()
    assert runner.wasted == 0


def test_steps_are_updated_in_order():
    scheduler = make()
    scheduler.add(seq("a"))
    runner = AheadRunner(scheduler)
    runner.dispatch()
    runner.dispatch()
    (_, _), (plan, result) = runner.in_flight
    with pytest.raises(ValueError, match="order"):
        scheduler.update(plan, result)
