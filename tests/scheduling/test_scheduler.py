import zlib
from collections.abc import Callable, Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.errors import CapacityError, ConfigError, RequestError
from emoe_jax.requests.request import SamplingParams
from emoe_jax.requests.sequence import Sequence, SequenceStatus
from emoe_jax.scheduling.pages import PagePool
from emoe_jax.scheduling.plan import SampledToken, StepPlan, StepResult
from emoe_jax.scheduling.scheduler import Scheduler

EOS = 2


def make(
    *,
    pages: int = 64,
    page_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 64,
    prefill_chunk: int = 8,
    prefix_caching: bool = False,
) -> Scheduler:
    pool = PagePool(pages + 1, page_size)
    limits = (max_num_seqs, max_num_batched_tokens, max_model_len, prefill_chunk)
    return Scheduler(pool, *limits, eos_token_ids=(EOS,), prefix_caching=prefix_caching)


def seq(name: str, prompt: int = 5, max_tokens: int = 4, **params) -> Sequence:
    return Sequence(name, list(range(100, 100 + prompt)), SamplingParams(max_tokens=max_tokens, **params))


def expected_token(sequence: Sequence, position: int) -> int:
    """The fake model: a token determined by the sequence and the position it will have."""
    return 1000 + zlib.crc32(f"{sequence.request_id} {sequence.index} {position}".encode()) % 9000


class FakeRunner:
    """A model whose next token depends on the tokens it was fed: it keeps a "cache" per page and checks all of it."""

    def __init__(self, scheduler: Scheduler, token: Callable[[Sequence, int], int] = expected_token):
        self.scheduler = scheduler
        self.token = token
        self.cells: dict[tuple[int, int], Hashable] = {}  # (page, offset) -> what was written there

    def written(self, s: Sequence, position: int) -> Hashable:
        """What only this position of this sequence may hold."""
        return s, s.tokens(position, 1)[0]

    def run(self, plan: StepPlan) -> StepResult:
        scheduler, size = self.scheduler, self.scheduler.pool.page_size
        work = [(s, s.num_tokens - 1, 1, True) for s in plan.decodes]
        work += [(c.sequence, c.start, c.length, c.is_last) for c in plan.prefills]
        assert len({id(s) for s, *_ in work}) == len(work), "a sequence is in the plan twice"
        assert plan.sequences == tuple(s for s, *_ in work)
        assert plan.num_tokens == sum(length for _, _, length, _ in work) <= scheduler.max_num_batched_tokens
        assert len(work) <= scheduler.num_running <= scheduler.max_num_seqs
        assert all(chunk.length <= scheduler.prefill_chunk for chunk in plan.prefills)
        held = [page for s in scheduler.running for page in s.pages]
        assert len(set(held)) == scheduler.pool.num_used
        assert len(set(held)) == len(held) or scheduler.prefix_cache.enabled
        sampled = {}
        for s, start, length, samples in work:
            assert s.status is SequenceStatus.RUNNING
            assert start == s.num_computed
            assert samples == (start + length == s.num_tokens)
            tokens = s.tokens(start, length)
            assert len(tokens) == length > 0
            for position in range(start, start + length):
                page = s.pages[position // size]
                assert held.count(page) == 1, "two sequences share a page that one of them writes to"
                self.cells[page, position % size] = self.written(s, position)
            if samples:  # attention: everything before must be in the sequence's pages
                for position in range(s.num_tokens):
                    assert self.cells[s.pages[position // size], position % size] == self.written(s, position)
                sampled[s] = SampledToken(self.token(s, s.num_tokens))
        return StepResult(sampled)

    def step(self) -> list[Sequence]:
        plan = self.scheduler.schedule(0.0)
        assert bool(plan) or not self.scheduler.has_work, "nothing planned although there is work: a deadlock"
        return self.scheduler.update(plan, self.run(plan))

    def finish_all(self, limit: int = 100_000) -> int:
        steps = 0
        while self.scheduler.has_work:
            self.step()
            steps += 1
            assert steps < limit
        assert self.scheduler.pool.num_used == 0
        return steps


def test_prefill_then_decode_then_length():
    scheduler = make()
    sequence = seq("a", prompt=5, max_tokens=3)
    scheduler.add(sequence)
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.has_work) == (1, 0, True)
    runner = FakeRunner(scheduler)
    plan = scheduler.schedule(0.0)
    assert plan.decodes == ()
    assert [tuple(chunk) for chunk in plan.prefills] == [(sequence, 0, 5, True)]
    assert scheduler.update(plan, runner.run(plan)) == []
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    plan = scheduler.schedule(0.0)
    assert plan.decodes == (sequence,)
    assert plan.prefills == ()
    scheduler.update(plan, runner.run(plan))
    assert runner.step() == [sequence]
    assert sequence.finish_reason == "length"
    assert sequence.generated == [expected_token(sequence, position) for position in (5, 6, 7)]
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0
    assert not scheduler.schedule(0.0)


def test_a_long_prompt_does_not_stall_decodes():
    scheduler = make(max_num_batched_tokens=16, prefill_chunk=8)
    runner = FakeRunner(scheduler)
    short, long, other = seq("short", 3, 20), seq("long", 40, 2), seq("other", 6, 2)
    scheduler.add(short)
    runner.step()
    scheduler.add(long)
    scheduler.add(other)
    plan = scheduler.schedule(0.0)
    assert plan.decodes == (short,)
    # One token of the budget of 16 decodes, 8 are the long prompt's chunk, and 6 are left for the prompt behind it.
    assert [tuple(chunk) for chunk in plan.prefills] == [(long, 0, 8, False), (other, 0, 6, True)]
    scheduler.update(plan, runner.run(plan))
    plan = scheduler.schedule(0.0)
    assert plan.decodes == (short, other)
    assert [tuple(chunk) for chunk in plan.prefills] == [(long, 8, 8, False)]
    scheduler.update(plan, runner.run(plan))
    runner.finish_all()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_of_sequence(ignore_eos: bool):
    scheduler = make()
    sequence = seq("a", prompt=3, max_tokens=6, ignore_eos=ignore_eos)
    scheduler.add(sequence)
    FakeRunner(scheduler, lambda s, position: EOS if position == 5 else 7).finish_all()
    assert sequence.generated == ([7, 7, EOS, 7, 7, 7] if ignore_eos else [7, 7, EOS])
    assert sequence.finish_reason == ("length" if ignore_eos else "stop")


@pytest.mark.parametrize("field", ["stop_token_ids", "ending_token_ids"])
def test_stop_tokens_hold_even_when_eos_is_ignored(field: str):
    scheduler = make()
    sequence = seq("a", prompt=3, max_tokens=6, ignore_eos=True, **{field: (9,)})
    scheduler.add(sequence)
    FakeRunner(scheduler, lambda s, position: {3: EOS, 4: 8}.get(position, 9)).finish_all()
    assert sequence.generated == [EOS, 8, 9]
    assert sequence.finish_reason == "stop"


def test_the_maximum_length_ends_a_sequence():
    scheduler = make(max_model_len=16, pages=4)
    sequence = seq("a", prompt=12, max_tokens=100)
    scheduler.add(sequence)
    FakeRunner(scheduler).finish_all()
    assert sequence.num_tokens == 16
    assert sequence.finish_reason == "length"


def test_finish_from_outside():
    scheduler = make()
    runner = FakeRunner(scheduler)
    first, last = seq("a"), seq("b", max_tokens=1)
    scheduler.add(first)
    scheduler.add(last)
    assert runner.step() == [last]
    scheduler.finish(first, "stop")
    scheduler.finish(last, "stop")  # its last token completed a stop string
    assert (first.finish_reason, last.finish_reason) == ("stop", "stop")
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0


def test_abort_ends_all_completions_of_a_request():
    scheduler = make(max_num_seqs=2)
    runner = FakeRunner(scheduler)
    mine = [Sequence("a", [1, 2, 3], SamplingParams(max_tokens=9, n=3), index=index) for index in range(3)]
    other = seq("b")
    for sequence in (*mine, other):
        scheduler.add(sequence)
    runner.step()
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)
    assert scheduler.abort("a") == mine
    assert all(sequence.finish_reason == "abort" and not sequence.pages for sequence in mine)
    assert scheduler.abort("a") == scheduler.abort("never seen") == []
    assert scheduler.pool.num_used == 0
    runner.finish_all()
    assert other.finish_reason == "length"


def test_abort_while_a_plan_is_in_flight():
    scheduler = make()
    runner = FakeRunner(scheduler)
    gone, stays = seq("gone"), seq("stays")
    scheduler.add(gone)
    scheduler.add(stays)
    runner.step()
    plan = scheduler.schedule(0.0)
    result = runner.run(plan)
    scheduler.abort("gone")
    assert scheduler.update(plan, result) == []
    assert len(gone.generated) == 1
    assert len(stays.generated) == 2
    runner.finish_all()


def test_the_latest_is_preempted_and_keeps_its_tokens():
    scheduler = make(pages=8, page_size=4, max_model_len=32, max_num_seqs=4)
    runner = FakeRunner(scheduler)
    sequences = [seq(name, prompt=3, max_tokens=28) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    newcomer: Sequence | None = None
    while scheduler.has_work:
        runner.step()
        if newcomer is None and scheduler.num_preemptions:
            assert scheduler.waiting == (sequences[2],)
            assert (sequences[2].num_computed, sequences[2].pages) == (0, [])
            assert len(sequences[2].generated) > 0
            newcomer = seq("d", prompt=3, max_tokens=2)
            scheduler.add(newcomer)
            assert scheduler.waiting == (sequences[2], newcomer)
    assert sequences[0].num_preemptions == 0
    assert sequences[2].num_preemptions > 0
    for sequence in sequences:
        assert sequence.generated == [expected_token(sequence, position) for position in range(3, 31)]


def test_who_starts_next_when_the_first_come_first():
    scheduler = make(max_num_seqs=2)
    for name in "abcd":
        scheduler.add(seq(name))
    assert [sequence.request_id for sequence in scheduler.line(0.0, 3)] == ["a", "b", "c"]
    scheduler.schedule(0.0)  # starts two
    assert [sequence.request_id for sequence in scheduler.line(0.0, 3)] == ["c", "d"]


def test_when_sequences_start_is_kept():
    scheduler = make(max_num_seqs=1)
    runner = FakeRunner(scheduler)
    first, second = seq("a", max_tokens=1), seq("b")
    for sequence in (first, second):
        scheduler.add(sequence)
    for now in (2.0, 5.0, 7.0):
        plan = scheduler.schedule(now)
        scheduler.update(plan, runner.run(plan))
    assert (first.started_at, second.started_at) == (2.0, 5.0)


def test_prompts_that_never_fit_are_refused():
    scheduler = make(max_model_len=16)
    with pytest.raises(RequestError, match="16 tokens; at most 15") as caught:
        scheduler.add(seq("a", prompt=16))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="empty"):
        scheduler.add(Sequence("b", []))
    assert not scheduler.has_work
    sequence = seq("c", prompt=15)
    scheduler.add(sequence)
    with pytest.raises(ValueError, match="before"):
        scheduler.add(sequence)
    FakeRunner(scheduler).finish_all()


def test_constructor_limits():
    with pytest.raises(CapacityError, match="15 pages of 4 tokens"):
        make(pages=15, max_model_len=64)
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(7\) is below max_num_seqs \(8\)"):
        make(max_num_batched_tokens=7)
    with pytest.raises(ConfigError, match="prefill_chunk is 0"):
        make(prefill_chunk=0)
    with pytest.raises(ConfigError, match="max_num_seqs is 0"):
        make(max_num_seqs=0)
    with pytest.raises(ConfigError, match="max_model_len is 1"):
        make(max_model_len=1)


Workload = tuple[Scheduler, list[tuple[int, Sequence]], dict[int, str]]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """A scheduler with tight limits, requests with the step of their arrival, and aborts by step."""
    page_size = draw(st.integers(1, 8))
    max_model_len = draw(st.integers(2, 48))
    full = -(-max_model_len // page_size)
    max_num_seqs = draw(st.integers(1, 6))
    scheduler = make(
        pages=draw(st.integers(full, 4 * full)),
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 40)),
        max_model_len=max_model_len,
        prefill_chunk=draw(st.integers(1, 16)),
    )
    count = draw(st.integers(1, 12))
    arrivals = [
        (draw(st.integers(0, 30)), seq(str(i), draw(st.integers(1, max_model_len - 1)), draw(st.integers(1, 40))))
        for i in range(count)
    ]
    aborts = draw(st.dictionaries(st.integers(0, 60), st.integers(0, count - 1).map(str), max_size=4))
    return scheduler, arrivals, aborts


def play(workload: Workload, step_once: Callable[[], object]) -> None:
    """Add and abort requests as the workload has it, until all have ended."""
    scheduler, arrivals, aborts = workload
    step = 0
    while scheduler.has_work or step <= 60:
        for _, sequence in (pair for pair in arrivals if pair[0] == step):
            scheduler.add(sequence)
        if step in aborts:
            scheduler.abort(aborts[step])
        step_once()
        step += 1
        assert step < 10_000


@given(workloads())
@settings(max_examples=150, deadline=None)
def test_any_workload_completes(workload: Workload):
    """No deadlock, no budget or page exceeded (the runner checks), all tokens kept over preemptions."""
    scheduler, arrivals, _ = workload
    play(workload, FakeRunner(scheduler).step)
    assert scheduler.pool.num_used == 0
    for _, sequence in arrivals:
        prompt = len(sequence.prompt_token_ids)
        assert sequence.finished
        assert sequence.generated == [expected_token(sequence, prompt + i) for i in range(len(sequence.generated))]
        if sequence.finish_reason != "abort":
            room = scheduler.max_model_len - prompt
            assert len(sequence.generated) == min(sequence.params.max_tokens, room)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=2, max_size=12))
@settings(max_examples=50, deadline=None)
def test_first_come_first_served(sizes: list[tuple[int, int]]):
    """With pages for all, first tokens come in the order of arrival when the prompts are equally long."""
    scheduler = make(pages=400, max_num_seqs=3)
    sequences = [seq(str(i), prompt=9, max_tokens=tokens) for i, (_, tokens) in enumerate(sizes)]
    for sequence in sequences:
        scheduler.add(sequence)
    runner = FakeRunner(scheduler)
    started: list[Sequence] = []
    while scheduler.has_work:
        runner.step()
        started += [sequence for sequence in sequences if sequence.generated and sequence not in started]
    assert started == sequences
