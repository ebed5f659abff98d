"""What has room: the parts add up, memory is never worse than less of it, and what is advised fits."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.engine_config import EngineConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models import config_from_hf
from emoe_jax.planning.fit import Footprint
from emoe_jax.planning.plan import Load, advised, speed_of
from emoe_jax.planning.targets import Target
from emoe_jax.scheduling.pages import PAGE_SIZE, pages_for
from tests.engines import TINY

CONFIG = config_from_hf(TINY)
# Bytes in float32, as tests/benchmarks/test_memory.py works them out; of three layers with eight experts each.
WEIGHTS, EXPERT, PAGE = 56_448, 9_216, 6_144
STAGING = 64 * EXPERT  # 32 records, and twice 16 more
STEP = 100_000


def footprint(step_bytes: int | None = STEP, **options: Any) -> Footprint:
    defaults: dict[str, Any] = {"expert_memory": "50%", "dtype": "float32"}
    return Footprint(CONFIG, EngineConfig(**defaults | options), "gpu", step_bytes)


def target(memory_bytes: int) -> Target:
    return Target("a card", "gpu", memory_bytes, bandwidth=1e9, link=1e8, half_flops=1e12, float32_flops=1e12)


def room(slots: int, pages: int) -> int:
    """A device with room for so much, and nothing more."""
    return WEIGHTS + STAGING + STEP + slots * EXPERT + (pages + 1) * PAGE


def test_a_fit_by_hand() -> None:
    fit = footprint(max_model_len=32, max_num_seqs=3).fit(target(room(12, 7)))
    assert fit.fits
    assert dataclasses.asdict(fit.parts) == {
        "weights": WEIGHTS,
        "slab": 12 * EXPERT,
        "kv": 7 * PAGE,  # three sequences of two pages, and the page of padding
        "workspace": STAGING + STEP,
    }
    assert (fit.slots, fit.context, fit.max_context, fit.max_batch) == (12, 32, 2 * PAGE_SIZE, 3)
    alone = footprint(max_num_seqs=1).fit(target(room(12, 200)))
    assert (alone.context, alone.max_context, alone.max_batch) == (96, 96, 33)  # the model's own limit


def test_what_does_not_fit_says_both_numbers_and_what_it_would_take() -> None:
    few = footprint(max_model_len=32, max_num_seqs=4).fit(target(room(12, 6)))
    assert few.problem == "the KV cache has room for 3 sequences of 32 tokens at once, not for 4"
    assert few.parts.total <= room(12, 6)
    small = footprint(max_model_len=32, max_num_seqs=2).fit(target(room(11, 7)))
    assert small.problem is None  # with fewer pages to spare
    none = footprint(expert_memory="100%", max_model_len=32, max_num_seqs=2).fit(target(room(20, 4)))
    assert none.problem is not None
    assert "expert memory of 100%" in none.problem
    assert none.parts.total == room(24, 4) > room(20, 4)
    assert (none.max_context, none.max_batch) == (0, 0)


def test_a_context_beyond_the_model_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="max_model_len is 97; the model allows 2 to 96"):
        footprint(max_model_len=97).fit(target(10**9))


def test_without_a_figure_a_tenth_of_the_device_is_workspace() -> None:
    fit = footprint(step_bytes=None).fit(target(10_000_000))
    assert fit.parts.workspace == 1_000_000
    assert footprint(step_bytes=None, expert_memory="100%").fit(target(100_000)).parts.workspace == 10_000


def test_formats_are_those_of_the_engine() -> None:
    assert (footprint().dtype, footprint().expert_format, footprint().record_bytes) == ("float32", "float32", EXPERT)
    eight = footprint(expert_format="int8")
    assert (eight.expert_format, eight.record_bytes) == ("int8", EXPERT // 4 + 4 * (2 * 24 + 32))
    stored = dataclasses.replace(footprint(), config=CONFIG.replace(expert_format="int8"))
    assert stored.expert_format == "int8"
    half = dataclasses.replace(footprint(dtype="auto"), config=CONFIG.replace(dtype="bfloat16"))
    assert (half.dtype, dataclasses.replace(half, platform="cpu").dtype) == ("bfloat16", "float32")


SIZES = {
    "memory": st.integers(0, 4_000_000),
    "more": st.integers(0, 2_000_000),
    "slots": st.integers(2, 8),
    "context": st.none() | st.integers(2, 96),
    "batch": st.integers(1, 40),
}


@settings(deadline=None, max_examples=150)
@given(**SIZES)
def test_parts_add_up_and_more_memory_never_gives_less(
    memory: int, more: int, slots: int, context: int | None, batch: int
) -> None:
    asked = footprint(expert_memory=f"{slots} slots", max_model_len=context or "auto", max_num_seqs=batch)
    fit, larger = asked.fit(target(memory)), asked.fit(target(memory + more))
    for each, device in ((fit, memory), (larger, memory + more)):
        parts = each.parts
        assert parts.total == parts.weights + parts.slab + parts.kv + parts.workspace
        if each.fits:
            assert parts.total <= device
            assert each.max_context >= (context or 2)
            assert each.max_batch >= (batch if context else 1)
    assert larger.max_context >= fit.max_context
    if context is not None:
        assert larger.max_batch >= fit.max_batch
        assert larger.fits >= fit.fits


@settings(deadline=None, max_examples=100)
@given(memory=st.integers(800_000, 2_000_000), slots=st.integers(2, 8), batch=st.integers(1, 20))
def test_the_longest_context_and_the_largest_batch_fit_and_no_more_do(memory: int, slots: int, batch: int) -> None:
    budget = f"{slots} slots"
    device = target(memory)
    fit = footprint(expert_memory=budget, max_model_len=48, max_num_seqs=batch).fit(device)
    if fit.max_context >= 2:
        assert footprint(expert_memory=budget, max_model_len=fit.max_context, max_num_seqs=batch).fit(device).fits
    if fit.max_context < 96:
        longer = fit.max_context + PAGE_SIZE
        assert not footprint(expert_memory=budget, max_model_len=longer, max_num_seqs=batch).fit(device).fits
    if fit.max_batch:
        assert footprint(expert_memory=budget, max_model_len=48, max_num_seqs=fit.max_batch).fit(device).fits
    assert not footprint(expert_memory=budget, max_model_len=48, max_num_seqs=fit.max_batch + 1).fit(device).fits


@settings(deadline=None, max_examples=60)
@given(memory=st.integers(600_000, 1_200_000), batch=st.integers(1, 8))
def test_the_largest_share_fits_and_a_slot_more_does_not(memory: int, batch: int) -> None:
    asked = footprint(max_model_len=64, max_num_seqs=batch)
    share, pages = asked.largest_share(target(memory)), batch * pages_for(64)
    if share is None:
        assert memory < room(6, pages)  # top-k of each layer
        return
    slots = int(share * 24 / 100)
    assert memory >= room(slots, pages)
    assert slots == 24 or memory < room(slots + 2, pages)  # a share is rounded down to a tenth of a percent
    assert footprint(expert_memory=f"{share:g}%", max_model_len=64, max_num_seqs=batch).fit(target(memory)).fits


def test_what_to_change_is_tried_before_it_is_named() -> None:
    asked = footprint(expert_memory="100%", max_model_len=64, max_num_seqs=2)
    device = target(room(16, 8))
    fit = asked.fit(device)
    assert not fit.fits
    advice = list(advised(asked, fit, speed_of(asked, fit, device, Load()), device, Load()))
    assert advice == [
        "--expert-memory 66.6% fits: the most of the experts that leaves room for the sequences",
        "--expert-format int8 fits with the same --expert-memory",
    ]
    crowded = footprint(expert_memory="25%", max_model_len=64, max_num_seqs=5)
    device = target(room(6, 12))
    fit = crowded.fit(device)
    assert list(advised(crowded, fit, speed_of(crowded, fit, device, Load()), device, Load())) == [
        "--expert-format int8 fits with the same --expert-memory",
        "--context 32 fits: the longest sequences, 5 at once",
        "--batch 3 fits: as many sequences of 64 tokens as have room at once",
    ]
    hasty = Load(tpot_ms=1e-9)
    assert list(advised(crowded, fit, speed_of(crowded, fit, device, hasty), device, hasty)) == []
