"""Sequences that begin alike share pages: what is planned, what is counted, and that pages hold what they should."""

from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.requests.contract import RoutingContract
from emoe_jax.requests.request import SamplingParams
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.cost import CostModel, StepCost
from emoe_jax.scheduling.estimates import Estimates
from emoe_jax.scheduling.lengths import OutputLengths
from emoe_jax.scheduling.plan import StepPlan, StepResult
from emoe_jax.scheduling.scheduler import Scheduler
from emoe_jax.scheduling.slo import SloPolicy
from tests.scheduling.test_scheduler import FakeRunner, make

WORDS = 3
"""Different tokens of the fake model: few, so that answers too begin alike."""


def seq(name: str, prompt: list[int], max_tokens: int = 4, routing: RoutingContract = "resident", **params) -> Sequence:
    return Sequence(name, prompt, SamplingParams(max_tokens=max_tokens, **params), routing=routing)


def next_token(sequence: Sequence, position: int) -> int:
    """The fake model: a token determined by those before it, never the end of sequence."""
    return 100 + sum(map(hash, enumerate(sequence.tokens(0, position)))) % WORDS


class SharingRunner(FakeRunner):
    """Keys and values are those of a token after all tokens before it, under a contract, whoever computed them."""

    def __init__(self, scheduler: Scheduler):
        super().__init__(scheduler, next_token)

    def written(self, s: Sequence, position: int) -> Hashable:
        return s.routing, *s.tokens(0, position + 1)

    def answer(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Serve a sequence alone: the start and length of each of its prompt's chunks."""
        self.scheduler.add(sequence)
        chunks: list[tuple[int, int]] = []
        while not sequence.finished:
            plan = self.scheduler.schedule(0.0)
            chunks += [(chunk.start, chunk.length) for chunk in plan.prefills]
            self.scheduler.update(plan, self.run(plan))
        return chunks


def tokens_of(scheduler: Scheduler) -> tuple[int, int]:
    state = scheduler.state()
    return state["prefix_query_tokens"], state["prefix_hit_tokens"]


def test_only_what_is_not_known_is_computed():
    scheduler = make(prefix_caching=True)
    runner = SharingRunner(scheduler)
    prompt = list(range(10))
    assert runner.answer(seq("a", prompt)) == [(0, 8), (8, 2)]
    assert scheduler.pool.num_used == 0
    again = seq("b", prompt)
    assert runner.answer(again) == [(8, 2)]  # two full pages of four tokens
    assert again.num_cached == 8
    assert runner.answer(seq("c", prompt[:8])) == [
        (4, 4)
    ]  # the last token's logits are needed, so its page is computed
    assert runner.answer(seq("d", [*prompt[:5], 99])) == [(4, 2)]
    assert runner.answer(seq("e", [99, *prompt[1:]])) == [(0, 8), (8, 2)]
    assert tokens_of(scheduler) == (10 + 10 + 8 + 6 + 10, 8 + 4 + 4)


def test_an_answer_is_part_of_the_next_turn_s_prefix():
    scheduler = make(prefix_caching=True)
    runner = SharingRunner(scheduler)
    first = seq("a", [1, 2, 3], max_tokens=6)
    runner.answer(first)
    turn = [*first.prompt_token_ids, *first.generated, 4, 5]
    assert runner.answer(seq("b", turn)) == [(8, 3)]  # of 9 tokens the last was sampled and never computed


def test_prompts_that_must_be_computed_are():
    scheduler = make(prefix_caching=True)
    runner = SharingRunner(scheduler)
    prompt = list(range(7))
    runner.answer(seq("a", prompt))
    before = tokens_of(scheduler)
    assert runner.answer(seq("scored", prompt, prompt_logprobs=0)) == [(0, 7)]
    recorded = seq("recorded", prompt)
    recorded.sample = 0
    assert runner.answer(recorded) == [(0, 7)]
    assert tokens_of(scheduler) == before
    assert runner.answer(seq("exact", prompt, routing="exact")) == [(0, 7)]
    assert runner.answer(seq("exact again", prompt, routing="exact")) == [(4, 3)]


def test_without_prefix_caching_nothing_is_shared():
    scheduler = make()
    runner = SharingRunner(scheduler)
    assert runner.answer(seq("a", list(range(7)))) == runner.answer(seq("b", list(range(7)))) == [(0, 7)]
    assert tokens_of(scheduler) == (0, 0)


def test_running_sequences_share_the_pages_of_their_prompt():
    scheduler = make(prefix_caching=True, pages=16)
    runner = SharingRunner(scheduler)
    prompt = list(range(30))
    scheduler.add(seq("a", prompt, max_tokens=20))
    for _ in range(5):
        runner.step()
    other = seq("b", prompt, max_tokens=20)
    scheduler.add(other)
    runner.step()  # it does not fit beside the first but for the pages that they share
    assert other.num_cached == 28
    assert scheduler.pool.num_used == 9
    scheduler.abort("a")
    assert scheduler.pool.num_used == len(other.pages)
    runner.finish_all()


def test_a_preempted_sequence_takes_over_its_own_pages():
    scheduler = make(prefix_caching=True, pages=9, max_model_len=32, max_num_seqs=2)
    runner = SharingRunner(scheduler)
    first, last = seq("a", [1, 2, 3], 28), seq("b", [3, 2, 1], 28)
    for sequence in (first, last):
        scheduler.add(sequence)
    while not last.num_preemptions:
        runner.step()
    scheduler.abort("a")
    computed = last.num_tokens - 1
    plan = scheduler.schedule(0.0)
    assert plan.prefills[0].start == computed // 4 * 4
    assert last.num_cached == 0  # nothing of its prompt was there when it came
    scheduler.update(plan, runner.run(plan))
    runner.finish_all()
    assert len(last.generated) == 28


def test_a_known_prompt_is_expected_to_take_less():
    scheduler = make(prefix_caching=True)
    estimates = Estimates(OutputLengths(), CostModel(StepCost(prefill_token=1.0, chunk=0.0)), 8, 64, 8)
    SharingRunner(scheduler).answer(seq("a", list(range(10))))
    known, new = seq("b", list(range(10))), seq("c", list(range(10, 20)))
    for sequence in (known, new):
        scheduler.add(sequence)
    assert (estimates.prefill(known), estimates.prefill(new)) == (2.0, 10.0)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Scheduler, list[tuple[int, Sequence]], dict[int, str]]:
    """A scheduler with tight limits, requests that often begin alike, and aborts by step."""
    page_size = draw(st.integers(1, 4))
    max_model_len = draw(st.integers(4, 32))
    full = -(-max_model_len // page_size)
    max_num_seqs = draw(st.integers(1, 5))
    scheduler = make(
        pages=draw(st.integers(full, 3 * full)),
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 24)),
        max_model_len=max_model_len,
        prefill_chunk=draw(st.integers(1, 16)),
        prefix_caching=True,
    )
    common = draw(st.lists(st.integers(0, 1), min_size=max_model_len, max_size=max_model_len))
    arrivals = []
    for number in range(draw(st.integers(1, 10))):
        length = draw(st.integers(1, max_model_len - 1))
        shared = draw(st.integers(0, length))
        prompt = common[:shared] + [7] * (length - shared)
        routing = draw(st.sampled_from(("resident", "exact")))
        arrivals.append((draw(st.integers(0, 30)), seq(str(number), prompt, draw(st.integers(1, 30)), routing)))
    aborts = draw(st.dictionaries(st.integers(0, 60), st.integers(0, 9).map(str), max_size=4))
    return scheduler, arrivals, aborts


@given(workloads())
@settings(max_examples=150, deadline=None)
def test_any_workload_completes(workload: tuple[Scheduler, list[tuple[int, Sequence]], dict[int, str]]):
    """Every page read holds what its reader would have computed, and none that is shared is written (so the runner);
    no deadlock, all tokens as without reuse, all pages given up.
    """
    scheduler, arrivals, aborts = workload
    runner = SharingRunner(scheduler)
    for step in range(10_000):
        for _, sequence in (pair for pair in arrivals if pair[0] == step):
            scheduler.add(sequence)
        if step in aborts:
            scheduler.abort(aborts[step])
        runner.step()
        if step > 60 and not scheduler.has_work:
            break
    assert scheduler.pool.num_used == 0
    for _, sequence in arrivals:
        assert sequence.finished
        prompt = len(sequence.prompt_token_ids)
        for index, token in enumerate(sequence.generated):
            assert token == next_token(sequence, prompt + index)
        if sequence.finish_reason != "abort":
            room = scheduler.max_model_len - prompt
            assert len(sequence.generated) == min(sequence.params.max_tokens, room)
    query, hit = tokens_of(scheduler)
    assert 0 <= hit < max(1, query)


def with_policy(policy: str, **options) -> tuple[Scheduler, SharingRunner]:
    scheduler = make(prefix_caching=True, **options)
    if policy == "slo":
        estimates = Estimates(OutputLengths(), CostModel(), scheduler.max_num_seqs, 64, scheduler.prefill_chunk)
        scheduler.use_policy(SloPolicy(estimates))
    return scheduler, SharingRunner(scheduler)


def computed(scheduler: Scheduler, runner: SharingRunner, ahead: bool = False) -> dict[Sequence, int]:
    """Prompt tokens computed for each sequence until all are done; `ahead`: a step is planned before one is booked."""
    tokens: dict[Sequence, int] = {}
    in_flight: list[tuple[StepPlan, StepResult]] = []
    while scheduler.has_work or in_flight:
        plan = scheduler.schedule(0.0)
        for chunk in plan.prefills:
            tokens[chunk.sequence] = tokens.get(chunk.sequence, 0) + chunk.length
        if plan:
            result = runner.run(plan)
            scheduler.dispatched(plan)
            in_flight.append((plan, result))
        if in_flight and (len(in_flight) > ahead or not plan):
            scheduler.update(*in_flight.pop(0))
    return tokens


@pytest.mark.parametrize("policy", ["fcfs", "slo"])
@pytest.mark.parametrize("length", [3, 4, 5, 8, 17, 30])
@pytest.mark.parametrize("chunk", [4, 8, 32])
def test_siblings_compute_the_full_pages_of_their_prompt_once(policy: str, length: int, chunk: int):
    scheduler, runner = with_policy(policy, prefill_chunk=chunk, pages=128)
    siblings = [Sequence("a", list(range(length)), SamplingParams(max_tokens=3, n=8), index=i) for i in range(8)]
    for sibling in siblings:
        scheduler.add(sibling)
    tokens = computed(scheduler, runner)
    shared = (length - 1) // 4 * 4  # the last token is computed by each
    assert sum(tokens.values()) == length + 7 * (length - shared)
    assert [sibling.num_cached for sibling in siblings].count(shared) >= 7
    assert all(len(sibling.generated) == 3 for sibling in siblings)


@pytest.mark.parametrize("policy", ["fcfs", "slo"])
def test_requests_that_come_together_compute_what_they_begin_with_once(policy: str):
    """Two groups of alike prompts with tails of their own, and one prompt that is like none."""
    scheduler, runner = with_policy(policy, pages=128)
    groups = [[seq(f"{g}{i}", [g] * 20 + [g, i] * i) for i in range(3)] for g in range(2)]
    single = seq("single", list(range(50, 62)))
    for sequence in [*groups[0], single, *groups[1]]:
        scheduler.add(sequence)
    tokens = computed(scheduler, runner)
    for group in groups:
        first = max(tokens[sequence] for sequence in group)
        assert first >= 20
        assert sum(tokens[sequence] for sequence in group) - first <= 2 * 4 + 6
    assert tokens[single] == 12


def test_contracts_and_scored_prompts_do_not_wait_for_each_other():
    scheduler, runner = with_policy("fcfs", pages=128)
    prompt = list(range(12))
    sequences = [seq("a", prompt), seq("exact", prompt, routing="exact"), seq("scored", prompt, prompt_logprobs=0)]
    for sequence in sequences:
        scheduler.add(sequence)
    plan = scheduler.schedule(0.0)
    assert {chunk.sequence for chunk in plan.prefills} == set(sequences)
    scheduler.update(plan, runner.run(plan))
    runner.finish_all()


def test_without_prefix_caching_siblings_start_at_once():
    scheduler = make(pages=128)
    for index in range(3):
        scheduler.add(Sequence("a", list(range(12)), SamplingParams(max_tokens=3, n=3), index=index))
    assert len(scheduler.schedule(0.0).prefills) == 3


@pytest.mark.parametrize("policy", ["fcfs", "slo"])
@pytest.mark.parametrize("steps", [1, 2])
def test_siblings_go_on_when_the_one_they_wait_for_is_gone(policy: str, steps: int):
    scheduler, runner = with_policy(policy, pages=128)
    prompt = list(range(30))
    leader = seq("leader", prompt)
    scheduler.add(leader)
    for _ in range(steps):
        scheduler.add(seq(f"other {_}", prompt))
        runner.step()
    assert scheduler.num_running == 1
    scheduler.abort("leader")
    tokens = computed(scheduler, runner)
    assert sum(tokens.values()) == 30 - 8 * steps + (steps - 1) * 2


@pytest.mark.parametrize("policy", ["fcfs", "slo"])
def test_others_go_on_while_siblings_wait_and_take_no_place_of_theirs(policy: str):
    scheduler, runner = with_policy(policy, pages=128, max_num_seqs=3)
    siblings = [Sequence("a", [7] * 30, SamplingParams(max_tokens=9, n=2), index=index) for index in range(2)]
    late = [seq(f"late {index}", [index + 1] * 3, max_tokens=40) for index in range(4)]
    scheduler.add(siblings[0])
    runner.step()
    for sequence in [siblings[1], *late]:
        scheduler.add(sequence)
    for _ in range(5):
        runner.step()
    if policy == "fcfs":
        assert scheduler.running == (*siblings, late[0])
    else:  # it starts the shortest work first
        assert siblings[0] in scheduler.running
    runner.finish_all()


@pytest.mark.parametrize("policy", ["fcfs", "slo"])
def test_the_overlapped_loop_computes_pages_once_too(policy: str):
    scheduler, runner = with_policy(policy, pages=128)
    for index in range(5):
        scheduler.add(Sequence("a", list(range(18)), SamplingParams(max_tokens=1, n=5), index=index))
    assert sum(computed(scheduler, runner, ahead=True).values()) == 18 + 4 * 2
