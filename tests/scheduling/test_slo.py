import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.errors import ConfigError, SloUnattainable
from emoe_jax.requests.request import SLO, SamplingParams
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.cost import CostModel, StepCost
from emoe_jax.scheduling.estimates import Estimates
from emoe_jax.scheduling.lengths import OutputLengths
from emoe_jax.scheduling.pages import PagePool
from emoe_jax.scheduling.plan import SampledToken, StepPlan, StepResult
from emoe_jax.scheduling.registry import make_admission_policy
from emoe_jax.scheduling.scheduler import Scheduler
from emoe_jax.scheduling.slo import SloPolicy

COST = StepCost(step=0.010, chunk=0.0, prefill_token=0.0001, decode=0.001)


class Machine:
    """A scheduler on a fake clock: each step takes what the cost model says; answers have `max_tokens` tokens."""

    def __init__(self, max_num_seqs: int = 4, *, pages: int = 400, budget: int = 256, **options):
        self.estimates = Estimates(OutputLengths(), CostModel(COST), max_num_seqs, 4000, budget)
        self.policy = SloPolicy(self.estimates, **options)
        self.scheduler = Scheduler(PagePool(pages + 1, 16), max_num_seqs, budget, 4000, budget, policy=self.policy)
        self.now = 0.0
        self.started: list[str] = []
        self.ended: dict[str, float] = {}

    def add(
        self,
        name: str,
        prompt: int = 10,
        tokens: int = 4,
        *,
        ttft: float | None = None,
        latency: float | None = None,
        **rest,
    ) -> Sequence:
        slo = SLO(
            None if ttft is None else ttft * 1e3, None if latency is None else latency * 1e3, rest.pop("strict", False)
        )
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        sequence = Sequence(name, [3] * prompt, params, slo=slo, arrival=self.now, **rest)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule(self.now)
        assert plan or not self.scheduler.has_work, "nothing planned although there is work"
        self.started += [chunk.sequence.request_id for chunk in plan.prefills if chunk.start == 0]
        seconds = COST.of(plan)
        self.now += seconds
        last = [chunk.sequence for chunk in plan.prefills if chunk.is_last]
        result = StepResult({sequence: SampledToken(7) for sequence in (*plan.decodes, *last)})
        for sequence in self.scheduler.update(plan, result, seconds):
            self.ended[sequence.request_id] = self.now
        return plan

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()


def test_the_shortest_work_goes_first_while_nothing_is_due():
    machine = Machine(max_num_seqs=1)
    machine.add("running")
    machine.step()
    machine.add("long", tokens=50)
    machine.add("long prompt", prompt=2000, tokens=5)
    machine.add("short", tokens=5)
    machine.run()
    assert machine.started == ["running", "short", "long prompt", "long"]


def next_up(machine: Machine, count: int = 1) -> list[str]:
    return [sequence.request_id for sequence in machine.scheduler.line(machine.now, count)]


def test_who_starts_next_is_known():
    machine = Machine(max_num_seqs=2)
    machine.add("running", tokens=3)
    machine.step()
    for name, tokens in (("long", 50), ("short", 5), ("middle", 20)):
        machine.add(name, tokens=tokens)
    assert next_up(machine) == ["short"]
    machine.add("urgent", tokens=20, ttft=0.02)
    assert next_up(machine) == ["urgent"]
    machine.step()  # starts it
    assert next_up(machine) == ["short"]
    assert next_up(machine, 2) == ["short", "middle"]
    machine.run()
    assert machine.started[:3] == ["running", "urgent", "short"]
    assert next_up(machine) == []


def test_who_waited_for_long_is_next():
    machine = Machine(max_num_seqs=2, max_wait=40.0)
    for name in ("one", "two"):
        machine.add(name, tokens=50)
    machine.step()
    machine.add("patient", tokens=60)
    machine.add("short", tokens=2)
    machine.scheduler.abort("one")
    assert next_up(machine) == ["short"]
    machine.now = 35.0
    assert next_up(machine) == ["patient"]


def test_whoever_must_start_now_goes_before_shorter_ones():
    machine = Machine(max_num_seqs=1)
    machine.add("running", tokens=10)
    machine.step()
    machine.add("short", tokens=2)
    machine.add("urgent", tokens=20, ttft=0.12)
    machine.run()
    assert machine.started == ["running", "urgent", "short"]
    assert machine.scheduler.attainment.total.attained == 1


def test_an_admission_that_would_make_a_running_sequence_late_waits():
    """Algorithm 1: a relaxed request waits when admitting it now would break a running one's SLO."""
    machine = Machine()
    tight = machine.add("tight", tokens=20, latency=0.30)
    machine.step()
    machine.add("relaxed", prompt=1500, tokens=3, latency=60)
    machine.run()
    assert machine.started == ["tight", "relaxed"]
    assert machine.ended["tight"] <= 0.30
    assert not tight.slo_unattainable
    assert machine.scheduler.attainment.state()["attainment"] == 1.0
    alone = Machine()
    alone.add("loose", tokens=20, latency=30)
    alone.step()
    alone.add("relaxed", prompt=1500, tokens=3, latency=60)
    alone.step()
    assert alone.started == ["loose", "relaxed"]


def test_whoever_cannot_wait_for_running_ones_makes_them_late():
    """One deadline for another: then the place is not left idle. Whoever is late anyway waits."""
    machine = Machine()
    machine.add("tight", tokens=20, latency=0.30)
    machine.step()
    late = machine.add("late", prompt=1500, tokens=3, ttft=0.01)
    machine.step()
    assert late.slo_unattainable
    machine.add("as tight", prompt=1500, tokens=3, ttft=0.25)
    machine.run()
    assert machine.started == ["tight", "as tight", "late"]
    assert machine.ended["tight"] > 0.30


def test_an_admission_waits_for_what_its_experts_would_take_to_load():
    """eMoE eq. 3: dE counts against the running ones."""
    loading = {"a": 0.0, "b": 5.0}
    machine = Machine(loading_seconds=lambda sequence: loading[sequence.task])
    machine.add("running", tokens=20, latency=2.0, task="a")
    machine.step()
    machine.add("other experts", tokens=3, task="b")
    machine.add("same experts", tokens=6, task="a")
    machine.run()
    assert machine.started == ["running", "same experts", "other experts"]


def test_deadlines_that_cannot_be_kept_are_flagged_and_served_last():
    machine = Machine(max_num_seqs=1)
    machine.add("running", tokens=30)
    machine.step()
    late = machine.add("late", tokens=2, ttft=0.001)
    machine.add("in time", tokens=40, latency=50)
    machine.add("no deadline", tokens=41)
    machine.run()
    assert machine.started == ["running", "in time", "no deadline", "late"]
    assert late.slo_unattainable
    assert [machine.policy.state()[key] for key in ("late", "unattainable")] == [0, 1]
    assert machine.scheduler.attainment.total.attained == 1


def test_a_strict_request_that_cannot_be_served_in_time_is_refused():
    machine = Machine(max_num_seqs=1)
    machine.add("running", tokens=100)
    machine.step()
    expected = r"^ttft_ms of 50\.0 cannot be kept: the first token is expected after [0-9]{4} ms$"
    with pytest.raises(SloUnattainable, match=expected) as caught:
        machine.add("a", ttft=0.05, strict=True)
    assert (caught.value.code, machine.scheduler.num_waiting) == ("slo_unattainable", 0)
    machine.add("b", latency=30, strict=True)
    for index in range(40):
        machine.add(f"queued {index}", tokens=50, latency=20)
    with pytest.raises(SloUnattainable, match=r"^latency_ms of 20000\.0 cannot be kept: the end of the answer"):
        machine.add("c", latency=20, strict=True)
    machine.run()
    assert len(machine.ended) == 42


def test_nothing_running_admits_whatever_comes():
    machine = Machine()
    sequence = machine.add("impossible", prompt=3000, ttft=0.001, latency=0.002)
    machine.run()
    assert sequence.finish_reason == "length"
    assert sequence.slo_unattainable


def test_nobody_waits_longer_than_max_wait():
    """A long request among short ones that never stop coming."""
    waits = {}
    for max_wait in (2.0, 1e6):
        machine = Machine(max_num_seqs=1, max_wait=max_wait)
        machine.add("first", tokens=3)
        machine.step()
        long = machine.add("long", tokens=60)
        for index in range(400):
            machine.add(f"short {index}", tokens=3)
            while machine.scheduler.num_waiting > 1:
                machine.step()
        assert long.first_token_at is not None or max_wait == 1e6
        machine.run()
        assert long.first_token_at is not None
        waits[max_wait] = long.first_token_at
    assert waits[2.0] <= 2.0 < 10 < waits[1e6]


def test_prompts_are_not_all_started_in_one_step():
    """Each step's tokens come out at its end, so a step's prompts take no longer than a few empty steps."""
    machine = Machine(max_num_seqs=8, budget=4000)
    for index in range(8):
        machine.add(str(index), prompt=500)
    assert len(machine.step().prefills) == 2
    machine.run()


def test_a_preempted_sequence_goes_first():
    machine = Machine(max_num_seqs=3, pages=250)
    machine.add("a", prompt=1300, tokens=900)
    machine.add("b", prompt=1300, tokens=901)
    while not machine.scheduler.num_preemptions:
        machine.step()
    machine.add("short", tokens=1)
    preempted = machine.scheduler.waiting[0].request_id
    machine.run()
    assert machine.started[2] == preempted
    assert set(machine.ended) == {"a", "b", "short"}


def test_bad_settings():
    with pytest.raises(ConfigError, match="max_wait is 0"):
        Machine(max_wait=0)
    with pytest.raises(ConfigError, match="'lifo'; expected one of slo, fcfs"):
        make_admission_policy("lifo", Scheduler(PagePool(2, 16), 1, 9, 9, 9))


requests = st.tuples(
    st.integers(0, 20),  # steps before it comes
    st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from([None, 0.001, 0.05, 0.5, 5.0]),
    st.sampled_from([None, 0.001, 0.1, 1.0, 10.0]),
    st.sampled_from([None, "a", "b"]),
)


@given(st.lists(requests, min_size=1, max_size=25), st.integers(1, 4), st.sampled_from([0.05, 1.0, 30.0]))
@settings(max_examples=80, deadline=None)
def test_any_workload_completes(workload: list[tuple], max_num_seqs: int, max_wait: float):
    """No deadlock (`step` checks), whatever the deadlines; attainment counts what the clock says."""
    machine = Machine(max_num_seqs, max_wait=max_wait)
    sequences = []
    for index, (steps, prompt, tokens, ttft, latency, task) in enumerate(workload):
        for _ in range(steps):
            machine.step()
        sequences.append(machine.add(str(index), prompt, tokens, ttft=ttft, latency=latency, task=task))
    machine.run()
    assert sorted(machine.started) == sorted(machine.ended) == sorted(s.request_id for s in sequences)
    assert machine.scheduler.pool.num_used == 0
    assert len(machine.policy) == machine.policy.state()["late"] == 0
    kept = 0
    for sequence in sequences:
        slo, first = sequence.slo, sequence.first_token_at
        assert first is not None
        in_time = slo.ttft_ms is None or first - sequence.arrival <= slo.ttft_ms / 1e3
        ended = machine.ended[sequence.request_id] - sequence.arrival
        in_time = in_time and (slo.latency_ms is None or ended <= slo.latency_ms / 1e3)
        kept += in_time and not (slo.ttft_ms is None and slo.latency_ms is None)
    assert machine.scheduler.attainment.total.attained == kept
    assert machine.scheduler.attainment.total.ended == len(sequences)


@pytest.mark.parametrize("tokens", [2, 20])
def test_an_admission_that_would_make_a_running_prompt_s_first_token_late_waits(tokens: int):
    """Algorithm 1 for `ttft_ms`: a prompt of four steps is running when another comes."""
    machine = Machine(budget=256)
    relaxed = {"prompt": 200, "tokens": 3, "latency": 60}
    tight = machine.add("tight", prompt=900, tokens=tokens, ttft=0.14)
    machine.step()
    machine.add("relaxed", **relaxed)
    machine.run()
    assert machine.started == ["tight", "relaxed"]
    assert tight.first_token_at is not None
    assert tight.first_token_at <= 0.14
    assert machine.scheduler.attainment.state()["attainment"] == 1.0
    loose = Machine(budget=256)
    loose.add("loose", prompt=900, tokens=tokens, ttft=60)
    loose.step()
    loose.add("relaxed", **relaxed)
    while len(loose.started) < 2:
        loose.step()
    assert loose.scheduler.num_running == 2  # in the last step of the first one's prompt, where there is room


def test_a_prompt_that_was_started_in_the_same_step_is_protected_too():
    machine = Machine(budget=1000)
    tight = machine.add("tight", prompt=300, tokens=4, ttft=0.05)
    machine.add("relaxed", prompt=600, tokens=4, latency=60)
    machine.run()
    assert tight.first_token_at is not None
    assert tight.first_token_at <= 0.05


def test_time_before_the_engine_took_a_request_counts():
    """Tokenizing took 0.9 s: what is left is too little for a strict deadline, and enough for another."""
    machine = Machine()
    machine.now = 10.0
    late = Sequence("late", [3] * 10, SamplingParams(max_tokens=4), slo=SLO(ttft_ms=905, strict=True), arrival=9.1)
    late.queued_at = 10.0
    with pytest.raises(SloUnattainable, match="ttft_ms of 905"):
        machine.scheduler.add(late)
    early = Sequence("early", [3] * 10, SamplingParams(max_tokens=4), slo=SLO(ttft_ms=950, strict=True), arrival=9.1)
    early.queued_at = 10.0
    machine.scheduler.add(early)
    machine.run()
    assert machine.scheduler.attainment.total.attained == 1


@pytest.mark.parametrize("waited", [0.0, 0.5, 3.0])
def test_waiting_for_loads_is_no_computing_time(waited: float):
    """Steps take what they take, and `waited` more. Neither `c` nor strict deadlines of others may show it."""
    machine = Machine()
    for index in range(6):
        sequence = Sequence(str(index), [3] * 10, SamplingParams(max_tokens=30), routing="exact", arrival=machine.now)
        machine.scheduler.add(sequence)
        while not sequence.finished:
            plan = machine.scheduler.schedule(machine.now)
            seconds = COST.of(plan) + waited
            machine.now += seconds
            last = [chunk.sequence for chunk in plan.prefills if chunk.is_last]
            result = StepResult({other: SampledToken(7) for other in (*plan.decodes, *last)})
            machine.scheduler.update(plan, result, seconds, waited=waited)
    cost = machine.estimates.model.cost
    assert cost.seconds(1) == pytest.approx(COST.seconds(1), rel=0.1)
    assert machine.estimates.pace < 2 * COST.seconds(4)
    assert (machine.estimates.miss_wait > 0.05) == bool(waited)
    machine.add("strict", tokens=20, latency=1.0, strict=True)  # `resident`: it waits for nothing
    if waited:
        with pytest.raises(SloUnattainable):
            machine.add("strict too", tokens=20, latency=1.0, strict=True, routing="exact")
    machine.run()


def test_a_step_ends_when_it_ended():
    """Planned while the step before was running: its own seconds begin later than its plan."""
    machine = Machine()
    sequence = machine.add("a", ttft=1.0)
    plan = machine.scheduler.schedule(0.0)
    machine.scheduler.update(plan, StepResult({sequence: SampledToken(7)}), 0.4, ended=1.2)
    assert sequence.first_token_at == 1.2
