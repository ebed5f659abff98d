"""Bytes and operations of a tiny model worked out by hand, and what holds for all models."""

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.models import config_from_hf
from emoe_jax.planning.roofline import Roofline, Work, read_parameters, total_seconds
from emoe_jax.planning.targets import CARDS, Costs, Target
from tests.engines import TINY

CONFIG = config_from_hf(TINY)
# D 32, F 24, L 3, N 4, K 2, H 8, E 8, k 2, V 61.
HEAD, EXPERT = 61 * 32, 3 * 24 * 32
DENSE = HEAD + 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32 + 8 * 32)
SLOW = Target(
    "slow", "gpu", 10**6, bandwidth=1e6, link=1e5, half_flops=1e7, float32_flops=1e6, costs=Costs(layers=0.5 / 3)
)


def roofline(slots: float, dtype: str = "float32") -> Roofline:
    return Roofline(CONFIG, dtype, dtype, slots)


def test_a_decode_step_by_hand() -> None:
    work = roofline(8).decode(batch=1, context=10)
    assert read_parameters(CONFIG) == DENSE
    assert work == Work(
        dense_bytes=4 * DENSE,
        expert_bytes=4 * 3 * 2 * EXPERT,
        kv_bytes=4 * 3 * 10 * 2 * 2 * 8,
        link_bytes=0,
        operations=2 * (DENSE + 3 * 2 * EXPERT) + 4 * 3 * 10 * 4 * 8,
        layers=3,
        rows=3,
        choices=3 * 2,
        repeated_bytes=0,
        packed_bytes=0,
    )
    assert work.seconds(SLOW, "float32") == max(work.memory_bytes / 1e6, work.operations / 1e6) + 0.5
    assert work.seconds(SLOW, "bfloat16") == max(work.memory_bytes / 1e6, work.operations / 1e7) + 0.5


def test_rows_that_share_experts_by_hand() -> None:
    """Few rows of an expert each multiply for themselves, many together; other weights always together."""
    few, many = roofline(8).decode(batch=3, context=10), roofline(8).decode(batch=200, context=10)
    visited = 8 * (1 - 0.75**3)
    assert (few.layers, few.rows, few.choices) == (3, 3 * 3, 3 * 3 * 2)
    assert few.repeated_bytes == pytest.approx(4 * 3 * (3 * 2 - visited) * EXPERT)
    assert few.packed_bytes == 4 * DENSE
    assert many.repeated_bytes == 0
    assert many.packed_bytes == pytest.approx(4 * (DENSE + 3 * 8 * EXPERT))


def test_costs_are_added_by_what_they_count() -> None:
    work, costs = roofline(8).decode(3, 10), Costs(0.0, 2.0, 3.0, 4.0, 5e-3, 6e-3, 7e-3)
    added = 2.0 * 3 + 3.0 * 9 + 4.0 * 18
    added += 5e-3 * work.repeated_bytes + 6e-3 * work.packed_bytes + 7e-3 * work.operations
    free = dataclasses.replace(SLOW, costs=Costs())
    difference = work.seconds(dataclasses.replace(SLOW, costs=costs), "float32") - work.seconds(free, "float32")
    assert difference == pytest.approx(added)
    assert all(Target.of_card(name).costs == Costs() for name in CARDS)


def test_the_host_works_behind_the_device_but_before_a_prompt() -> None:
    work = roofline(8).decode(1, 10)
    device = work.device_seconds(dataclasses.replace(SLOW, costs=Costs()), "float32")
    for host, step in ((0.5 * device, device), (2 * device, 2 * device)):
        target = dataclasses.replace(SLOW, costs=Costs(host=host))
        assert work.seconds(target, "float32") == pytest.approx(step)
        assert total_seconds([work, work], target, "float32") == pytest.approx(host + 2 * step)


def test_half_precision_reads_half_and_int8_experts_less() -> None:
    full, half = roofline(8).decode(1, 10), roofline(8, "bfloat16").decode(1, 10)
    assert half.memory_bytes * 2 == full.memory_bytes
    eight = Roofline(CONFIG, "float32", "int8", 8).decode(1, 10)
    assert eight.dense_bytes == full.dense_bytes
    assert eight.expert_bytes == 3 * 2 * (EXPERT + 4 * (2 * 24 + 32))


def test_tied_embeddings_are_read_as_the_head() -> None:
    assert read_parameters(CONFIG.replace(tie_embeddings=True)) == DENSE


def test_a_window_bounds_what_is_seen() -> None:
    windowed = dataclasses.replace(roofline(8), config=CONFIG.replace(sliding_windows=(4, None, 4)))
    assert windowed.decode(2, 10).kv_bytes == 4 * 2 * (4 + 10 + 4) * 2 * 2 * 8


def test_distinct_experts_are_the_mean_over_independent_tokens() -> None:
    """Two tokens of two choices among eight: an expert is left out by both with (6/8)^2."""
    assert roofline(8).distinct_experts(2) == (pytest.approx(8 * (1 - 0.75**2)), 0.0)
    resident, absent = roofline(4).distinct_experts(3, coverage=0.75)
    assert resident == pytest.approx(4 * (1 - (1 - 2 * 0.75 / 4) ** 3))
    assert absent == pytest.approx(4 * (1 - (1 - 2 * 0.25 / 4) ** 3))
    assert roofline(4).distinct_experts(1, coverage=0.75) == (pytest.approx(1.5), pytest.approx(0.5))


def test_an_absent_expert_is_loaded_written_and_read() -> None:
    all_of_them, half = roofline(8).decode(1, 10), roofline(4).decode(1, 10, coverage=0.75)
    record = 4 * EXPERT
    assert half.link_bytes == pytest.approx(3 * 0.5 * record)
    assert half.expert_bytes == pytest.approx(all_of_them.expert_bytes + half.link_bytes)
    busy = max(half.memory_bytes / 1e6, half.operations / 1e6)
    assert half.seconds(SLOW, "float32") == pytest.approx(busy + half.link_bytes / 1e5 + 0.5)


def test_coverage_is_at_least_that_of_experts_at_random() -> None:
    assert roofline(4).coverage(None) == roofline(4).coverage(0.1) == 0.5
    assert roofline(4).coverage(0.9) == 0.9


def test_a_prompt_is_read_in_chunks() -> None:
    steps = roofline(8).prefill(tokens=40, chunk=16)
    assert len(steps) == 3
    assert [step.dense_bytes for step in steps] == [4 * DENSE] * 3
    pairs = sum(range(1, 41))
    rows = DENSE - HEAD + 3 * 2 * EXPERT
    assert sum(step.operations for step in steps) == 2 * (40 * rows + 3 * HEAD) + 4 * 3 * pairs * 4 * 8
    assert total_seconds(steps, SLOW, "float32") == pytest.approx(sum(step.seconds(SLOW, "float32") for step in steps))
    [alone] = roofline(8).prefill(tokens=1, chunk=16)
    assert alone == roofline(8).decode(batch=1, context=1)


@settings(deadline=None, max_examples=200)
@given(
    slots=st.floats(2, 8),
    batch=st.integers(1, 300),
    coverages=st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
def test_more_coverage_never_takes_longer(slots: float, batch: int, coverages: list[float]) -> None:
    less, more = sorted(coverages)
    times = [roofline(slots).decode(batch, 20, coverage).seconds(SLOW, "float32") for coverage in (less, more)]
    assert times[1] <= times[0] * (1 + 1e-9)


@settings(deadline=None, max_examples=100)
@given(slots=st.floats(2, 8), coverage=st.floats(0, 1))
def test_more_sequences_read_more_and_never_more_than_there_is(slots: float, coverage: float) -> None:
    for few, many in itertools.pairwise(
        roofline(slots).distinct_experts(batch, coverage) for batch in (1, 2, 7, 64, 4096)
    ):
        assert all(one <= other * (1 + 1e-12) for one, other in zip(few, many, strict=True))
        assert many[0] <= slots
        assert many[1] <= 8 - slots
    alone = roofline(slots).distinct_experts(1, coverage)
    assert sum(alone) == pytest.approx(2)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, "overhead"),
        ({"costs": Costs(), "bandwidth": 1e4}, "memory"),
        ({"costs": Costs(), "link": 1.0}, "link"),
        ({"costs": Costs(), "bandwidth": 1e9, "link": 1e9}, "products"),
    ],
)
def test_what_takes_most_of_a_step(changes: dict[str, Any], bound: str) -> None:
    target = dataclasses.replace(SLOW, **changes)
    assert roofline(4).decode(1, 10, coverage=0.9).bound(target, "float32") == bound
