import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.requests.request import SamplingParams
from emoe_jax.requests.sequence import Sequence
from emoe_jax.scheduling.cost import CostModel, StepCost
from emoe_jax.scheduling.lengths import DEFAULT_TOKENS, MAX_TASKS, OutputLengths, remaining_tokens
from emoe_jax.scheduling.plan import PrefillChunk, StepPlan
from emoe_jax.tasks.profile import Lengths, TaskProfile

TRUTH = StepCost(step=0.02, chunk=0.003, prefill_token=0.00005, decode=0.0002)


def plan_of(decodes: int, prefills: list[int]) -> StepPlan:
    sequence = Sequence("a", [1])
    return StepPlan((sequence,) * decodes, tuple(PrefillChunk(sequence, 0, length, True) for length in prefills))


def random_plan(rng: random.Random) -> StepPlan:
    return plan_of(rng.randint(0, 64), [rng.randint(1, 500) for _ in range(rng.choice([0, 0, 1, 1, 2]))])


def seconds_of(plan: StepPlan, cost: StepCost = TRUTH) -> float:
    return cost.of(plan)


@pytest.mark.parametrize("prior", [StepCost(), StepCost(1.0, 1.0, 1.0, 1.0), StepCost(0.0, 0.0, 0.0, 0.0)])
def test_it_learns_what_steps_take(prior: StepCost):
    rng, model = random.Random(0), CostModel(prior)
    for _ in range(300):
        plan = random_plan(rng)
        model.observe(plan, seconds_of(plan) * rng.gauss(1, 0.05))
    for plan in (plan_of(1, []), plan_of(64, []), plan_of(16, [400]), plan_of(0, [30, 30])):
        assert seconds_of(plan, model.cost) == pytest.approx(seconds_of(plan), rel=0.05)
    assert model.state()["observed"] == 300


def test_outliers_hardly_count():
    rng, model = random.Random(0), CostModel()
    for step in range(400):
        plan = random_plan(rng)
        model.observe(plan, 3.0 if step % 25 == 24 else seconds_of(plan) * rng.gauss(1, 0.05))
    assert seconds_of(plan_of(32, [200]), model.cost) == pytest.approx(seconds_of(plan_of(32, [200])), rel=0.15)


def test_a_machine_that_changes_is_followed():
    rng, model = random.Random(0), CostModel()
    for factor in (1.0, 4.0):
        for _ in range(800):
            plan = random_plan(rng)
            model.observe(plan, factor * seconds_of(plan))
    assert seconds_of(plan_of(32, [200]), model.cost) == pytest.approx(4 * seconds_of(plan_of(32, [200])), rel=0.1)


def test_what_is_not_observed_any_more_stays():
    rng, model = random.Random(0), CostModel()
    for _ in range(300):
        plan = random_plan(rng)
        model.observe(plan, seconds_of(plan))
    before = model.cost.prefill(1000)
    for _ in range(20_000):
        plan = plan_of(rng.randint(1, 64), [])
        model.observe(plan, seconds_of(plan))
    assert model.cost.prefill(1000) == pytest.approx(before, rel=0.05)


@given(
    st.lists(st.tuples(st.integers(0, 64), st.lists(st.integers(1, 4096), max_size=4), st.floats(0, 1e4)), max_size=60)
)
@settings(max_examples=60, deadline=None)
def test_estimates_are_never_negative(steps: list[tuple[int, list[int], float]]):
    model = CostModel()
    for decodes, prefills, seconds in steps:
        model.observe(plan_of(decodes, prefills), seconds)
        cost = model.cost
        assert min(cost.step, cost.chunk, cost.prefill_token, cost.decode) >= 0
        assert cost.seconds(64, 4096, 4) < float("inf")


def answer(task: str | None, tokens: int, max_tokens: int = 1000, ignore_eos: bool = False) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    sequence = Sequence("a", [1, 2], params, task=task)
    sequence.generated = [7] * tokens
    return sequence


def test_lengths_start_at_the_profile_and_follow_what_is_seen():
    profile = TaskProfile(1, 4, 2).with_task("qa", output_length=Lengths.of([10])).with_task("sum")
    lengths = OutputLengths(profile)
    assert lengths.mean("qa") == lengths.mean("sum") == lengths.mean(None) == 10
    for _ in range(400):
        lengths.observe(answer("sum", 50))
    assert lengths.mean("sum") == pytest.approx(50, rel=0.05)
    assert lengths.mean("qa") == 10
    assert 10 < lengths.mean(None) <= 50
    assert lengths.mean("new") == lengths.mean(None)


def test_lengths_without_a_profile():
    lengths = OutputLengths()
    assert lengths.expected(answer(None, 0), 4096) == DEFAULT_TOKENS
    assert lengths.expected(answer(None, 0, max_tokens=5), 4096) == 5
    assert lengths.expected(answer(None, 0), 10) == 8
    assert lengths.expected(answer(None, 0, ignore_eos=True), 4096) == 1000
    for _ in range(50):
        lengths.observe(answer("x", 4))
    assert lengths.expected(answer(None, 0), 4096) < 12


def test_made_up_task_names_are_bounded():
    lengths = OutputLengths()
    for index in range(10 * MAX_TASKS):
        lengths.observe(answer(f"task {index}", 4))
    assert len(lengths.state()) == MAX_TASKS + 1


def test_the_expectation_is_reset_to_five_percent():
    """eMoE 1.5: decremented each step; at 0 it becomes 5 % of its initial value, again and again."""
    expected, left = 40.0, []
    counter = expected
    for generated in range(60):
        left.append(counter)
        assert remaining_tokens(expected, generated) == counter
        counter -= 1
        if counter == 0:
            counter = 0.05 * expected
    assert left[39:45] == [1, 2, 1, 2, 1, 2]


@given(st.floats(1, 1e6), st.integers(0, 10**6))
def test_something_always_remains(expected: float, generated: int):
    assert 0 < remaining_tokens(expected, generated) <= expected
