"""`slo` less one of its parts: every part changes what is decided, and only its own variant goes without it."""

import json

import pytest

from emoe_jax.errors import ConfigError
from emoe_jax.requests.request import SLO, SamplingParams
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.pages import PagePool
from emoe_jax.scheduling.plan import StepPlan
from emoe_jax.scheduling.registry import PARTS, VARIANTS, check_policy, make_admission_policy, without
from emoe_jax.scheduling.scheduler import Scheduler
from emoe_jax.tasks.profile import Lengths, TaskProfile

NAMES = ("slo", *VARIANTS)
LENGTHS = {"brief": 4, "wordy": 40}


def scheduler_of(name: str, places: int = 2) -> Scheduler:
    """The experts of `away` take 5 s to load."""
    profile = TaskProfile(1, 4, 2)
    for task, tokens in LENGTHS.items():
        profile = profile.with_task(task, output_length=Lengths.of([tokens]))
    scheduler = Scheduler(PagePool(401, 16), places, 256, 1000, 256)
    loading = {"away": 5.0}
    policy = make_admission_policy(name, scheduler, profile, lambda sequence: loading.get(sequence.task or "", 0.0))
    scheduler.use_policy(policy)
    return scheduler


def sequence_of(name: str, task: str | None = None, arrival: float = 0.0, prompt: int = 10, **of) -> Sequence:
    return Sequence(name, [3] * prompt, SamplingParams(max_tokens=500), task=task, arrival=arrival, **of)


def starts(scheduler: Scheduler, now: float) -> list[str]:
    plan = scheduler.schedule(now)
    scheduler.dispatched(plan)
    return [chunk.sequence.request_id for chunk in plan.prefills if chunk.start == 0]


def test_there_is_a_variant_for_each_part():
    assert [without(part) for part in PARTS] == list(VARIANTS)
    for name in NAMES:
        check_policy(name)
        policy = make_admission_policy(name, Scheduler(PagePool(11, 16), 2, 50, 100, 50))
        assert policy.name == name
        json.dumps(policy.state(), allow_nan=False)
    with pytest.raises(ConfigError, match="scheduling policy is 'slo-without-luck'; expected one of slo, fcfs"):
        check_policy("slo-without-luck")


@pytest.mark.parametrize("name", NAMES)
def test_only_without_g_all_tasks_answer_alike(name: str):
    scheduler = scheduler_of(name)
    for task in LENGTHS:
        scheduler.add(sequence_of(task, task))
    expected = {sequence.task: sequence.expected_tokens for sequence in scheduler.policy.waiting}
    mean = sum(LENGTHS.values()) / len(LENGTHS)
    assert expected == (dict.fromkeys(LENGTHS, mean) if name == without("G") else LENGTHS)
    ended = sequence_of("ended", "brief")
    ended.generated = [7] * 400
    scheduler.policy.ended(ended)
    means = scheduler.policy.state()["output_tokens"]
    assert set(means) == ({"all"} if name == without("G") else {"all", *LENGTHS})
    assert means["all"] > mean


@pytest.mark.parametrize("name", NAMES)
def test_only_without_c_nothing_is_learned_of_steps(name: str):
    policy = scheduler_of(name).policy
    before = policy.state()
    sequence = sequence_of("exact", routing="exact")
    for _ in range(50):
        policy.observe(StepPlan(decodes=(sequence,)), 0.5, waited=0.1)
    after = policy.state()
    for key in ("cost", "seconds_per_token", "miss_wait_s"):
        assert (after[key] == before[key]) == (name == without("c"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("task", "part"), [("away", "dE"), ("brief", None)])
def test_only_without_de_or_the_guard_the_running_ones_pay_for_loads(name: str, task: str, part: str | None):
    scheduler = scheduler_of(name, places=4)
    scheduler.add(sequence_of("running", "brief", slo=SLO(latency_ms=2000.0)))
    assert starts(scheduler, 0.0) == ["running"]
    scheduler.add(sequence_of("next", task))
    waits = part is not None and name not in (without(part), without("guard"))
    assert starts(scheduler, 0.01) == ([] if waits else ["next"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("waited", [5.0, 29.0, 1e6])
def test_only_without_aging_the_patient_are_passed_for_ever(name: str, waited: float):
    scheduler = scheduler_of(name, places=1)
    scheduler.add(sequence_of("patient", "wordy", prompt=200))
    scheduler.add(sequence_of("brief", "brief", arrival=waited))
    aged = waited > 22.5 and name != without("aging")
    assert starts(scheduler, waited) == (["patient"] if aged else ["brief"])
    assert scheduler.policy.state()["max_wait_s"] == (None if name == without("aging") else 30.0)
