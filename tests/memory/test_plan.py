"""Bytes of the memory plan: never above the budget, in either split and on the way between them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax import Engine, SamplingParams
from emoe_jax.device.compiling import bytes_beside
from emoe_jax.device.executables import Executables
from emoe_jax.device.kv_cache import page_bytes
from emoe_jax.device.shapes import Buckets
from emoe_jax.errors import CapacityError, ConfigError
from emoe_jax.experts.pieces import staging_bytes
from emoe_jax.memory.plan import (
    WORKSPACE_SHARE,
    MemoryPlan,
    dense_parameters,
    usable_memory,
)
from emoe_jax.memory.splits import MemorySplit, Sizes, changes, lean_split, peak_bytes
from emoe_jax.models import config_from_hf
from emoe_jax.scheduling.pages import pages_for
from tests.engines import TINY

CONFIG = config_from_hf(TINY)
EXPERT = 3 * 32 * 24 * 4
PAGE = page_bytes(CONFIG, "float32")
DENSE = dense_parameters(CONFIG) * 4
STAGING = staging_bytes(EXPERT)


def plan(device_bytes: int, **options: Any) -> MemoryPlan:
    defaults: dict[str, Any] = {"platform": "cpu", "max_num_seqs": 4}
    return MemoryPlan.of(CONFIG, device_bytes=device_bytes, **(defaults | options))


def device_for(slots: int, pages: int, step_bytes: int) -> int:
    """A device that is full with so many slots per layer and pages."""
    return DENSE + STAGING + step_bytes + 3 * slots * EXPERT + pages * PAGE


@given(
    slots=st.integers(2, 8),
    spare=st.integers(0, 60 * PAGE),
    step_bytes=st.integers(0, 40 * PAGE),
    max_num_seqs=st.integers(1, 12),
    max_model_len=st.sampled_from([None, 16, 40, 96]),
    may_trade=st.booleans(),
    uneven=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_nothing_exceeds_the_budget(
    slots: int,
    spare: int,
    step_bytes: int,
    max_num_seqs: int,
    max_model_len: int | None,
    may_trade: bool,
    uneven: bool,
) -> None:
    device = device_for(slots, 2, step_bytes) + spare
    options: dict[str, Any] = {"expert_memory": f"{100 * slots / 8:g}%", "max_model_len": max_model_len}
    if uneven and 2 < slots < 8:
        options["spread"] = lambda capacities: (capacities[0] + 1, capacities[1] - 1, *capacities[2:])
    options |= {"step_bytes": step_bytes, "max_num_seqs": max_num_seqs}
    try:
        before = plan(device, **options)
    except CapacityError:
        assert max_model_len is not None  # a whole sequence of it does not fit
        return
    ours = plan(device, **options, may_trade=may_trade)
    assert sum(ours.capacities) == 3 * slots
    assert sum(part for name, part in ours.report().items() if name not in ("device", "host")) <= device
    assert ours.workspace_bytes >= STAGING + step_bytes
    assert ours.num_pages - 1 >= pages_for(ours.max_model_len)
    if ours.lean is None:
        assert ours == before
        return
    assert may_trade
    lean = ours.lean
    assert lean.num_pages > before.num_pages >= ours.num_pages
    assert all(max(2, -(-old // 2)) <= new <= old for old, new in zip(ours.capacities, lean.capacities, strict=True))
    assert sum(part for name, part in ours.report(lean).items() if name not in ("device", "host")) <= device
    for one, other in ((ours.planned, lean), (lean, ours.planned)):
        assert DENSE + STAGING + peak_bytes(one, other, ours.sizes) <= device  # no step runs meanwhile
    with pytest.raises(CapacityError, match="steps and loading experts need"):
        ours.measured(device)
    assert ours.measured(step_bytes).workspace_bytes == ours.workspace_bytes


def test_int8_records_are_what_amounts_of_memory_buy() -> None:
    """40 % of the experts' bytes in float32 hold all of them; a share still means a share of the experts."""
    raw = TINY | {"hidden_size": 256, "intermediate_size": 256}
    config = config_from_hf(raw)
    expert = 3 * 256 * 256 * 4
    kib_of_40 = int(0.4 * 8 * 3 * expert) // 1024
    options: dict[str, Any] = {"platform": "cpu", "device_bytes": 1 << 30, "host_memory": "auto"}
    options |= {"machine_bytes": 1 << 30, "expert_memory": f"{kib_of_40}KiB"}
    plain = MemoryPlan.of(config, **options)
    eight = MemoryPlan.of(config, expert_format="int8", **options)
    assert sum(plain.capacities) == int(0.4 * 24)
    assert eight.capacities == (8, 8, 8)
    assert eight.slab_bytes == 24 * (3 * 256 * 256 + 4 * (512 + 256)) <= 1024 * kib_of_40
    assert (eight.dtype, eight.expert_format, eight.host_bytes) == ("float32", "int8", 0)
    stored = MemoryPlan.of(config.replace(expert_format="int8"), **options)
    assert stored == eight
    options["expert_memory"] = "50%"
    share = MemoryPlan.of(config, expert_format="int8", **options)
    assert share.capacities == (4, 4, 4)
    assert share.host_bytes == eight.slab_bytes  # host memory has room for all records


def test_a_trade_shrinks_before_it_grows() -> None:
    before, after = MemorySplit((4, 6), 10), MemorySplit((2, 6), 14)
    there, back = list(changes(before, after, 2)), list(changes(after, before, 2))
    assert [(c.what, c.layer, c.before, c.after) for c in there] == [
        ("slots", 0, 4, 2),
        ("pages", 0, 10, 14),
        ("pages", 1, 10, 14),
    ]
    assert [(c.what, c.layer) for c in back] == [("pages", 0), ("pages", 1), ("slots", 0)]
    # On the way there: first 2 new slots beside the old 4, last the second layer's 14 new pages beside its old 10.
    assert peak_bytes(before, after, Sizes(slot=100, layer_page=1, num_layers=2)) == 1000 + 200 + 20


@pytest.mark.parametrize(
    ("wanted", "top_k", "expected"),
    [
        (25, 2, MemorySplit((5, 5), 25)),  # a slot of each layer buys 6 pages
        (29, 2, MemorySplit((4, 4), 29)),
        (100, 2, MemorySplit((3, 3), 22 + 18)),  # half of the slots, rounded up, stay
        (100, 4, MemorySplit((4, 4), 22 + 12)),  # top-k stay
        (100, 6, None),
        (22, 2, None),
    ],
)
def test_only_as_many_slots_are_given_up_as_the_cache_wants(
    wanted: int, top_k: int, expected: MemorySplit | None
) -> None:
    sizes = Sizes(slot=30, layer_page=5, num_layers=2)
    assert lean_split(MemorySplit((6, 6), 22), sizes, wanted, top_k) == expected


def kv_room(device_bytes: int) -> int:
    """A tenth of what weights and steps leave."""
    return -(-(device_bytes - DENSE - STAGING) // 10)


@pytest.mark.parametrize("spare", [0, 1, 50 * PAGE])
def test_all_experts_are_resident_where_they_fit(spare: int) -> None:
    """Beside the KV cache that four sequences want."""
    pages = 4 * pages_for(96) + 1
    found = plan(device_for(8, pages, 0) + spare, step_bytes=0, max_model_len=96)
    assert (found.capacities, found.num_pages) == ((8, 8, 8), pages)


@pytest.mark.parametrize("pages", [150, 200])
def test_all_experts_are_resident_beside_a_tenth_for_the_cache(pages: int) -> None:
    """Where the KV cache wants more than there is, it leaves experts alone that leave it a tenth."""
    device = device_for(8, pages, 0)
    assert pages * PAGE >= kv_room(device)
    found = plan(device, step_bytes=0, max_model_len=96, max_num_seqs=500)
    assert (found.capacities, found.num_pages, found.is_bound) == ((8, 8, 8), pages, True)


@settings(deadline=None, max_examples=60)
@given(slots=st.integers(6, 23), more=st.integers(0, EXPERT - 1), max_num_seqs=st.integers(1, 600))
def test_where_not_all_fit_as_many_are_resident_as_do(slots: int, more: int, max_num_seqs: int) -> None:
    """One expert more would take of what is the KV cache's."""
    device = DENSE + STAGING + slots * EXPERT + (pages_for(96) + 1) * PAGE + more
    found = plan(device, step_bytes=0, max_model_len=96, max_num_seqs=max_num_seqs)
    wanted = (max_num_seqs * pages_for(96) + 1) * PAGE
    needed = (pages_for(96) + 1) * PAGE
    reserve = min(wanted, max(needed, kv_room(device)))
    resident = sum(found.capacities)
    assert min(found.capacities) >= 2
    assert resident * EXPERT + found.kv_bytes <= device - DENSE - STAGING
    if resident > 6:
        assert resident * EXPERT <= device - DENSE - STAGING - reserve
    if resident < 24:
        assert (resident + 1) * EXPERT > device - DENSE - STAGING - reserve


def test_the_cache_gives_way_to_the_experts_that_a_token_needs() -> None:
    one = pages_for(96) + 1
    found = plan(device_for(2, one, 0), step_bytes=0, max_model_len=96, max_num_seqs=9)
    assert (found.capacities, found.num_pages) == ((2, 2, 2), one)
    both = r"for experts and KV cache; 2 experts of each layer need 54 KiB, and the KV cache needs 42 KiB"
    with pytest.raises(CapacityError, match=both):
        plan(device_for(2, one, 0) - 1, step_bytes=0, max_model_len=96, max_num_seqs=9)


def test_a_cache_that_is_asked_for_comes_before_experts() -> None:
    found = plan(device_for(5, 40, 0), step_bytes=0, max_model_len=96, max_num_seqs=500, kv_memory=40 * PAGE)
    assert (found.capacities, found.num_pages) == ((5, 5, 5), 40)
    with pytest.raises(CapacityError, match=r"need 54 KiB, and the KV cache needs 1 TiB"):
        plan(device_for(5, 40, 0), step_bytes=0, max_model_len=96, kv_memory="1TiB")


def test_on_a_cpu_experts_leave_memory_to_other_programs() -> None:
    device, machine = device_for(8, 60, 0), int((DENSE + 15.5 * EXPERT) / 0.75)
    assert plan(device, step_bytes=0, max_model_len=96, machine_bytes=machine).capacities == (5, 5, 5)
    assert plan(device, step_bytes=0, max_model_len=96, machine_bytes=2 * device).capacities == (8, 8, 8)
    assert plan(device, platform="gpu", step_bytes=0, dtype="float32", machine_bytes=1).capacities == (8, 8, 8)


def test_without_a_figure_a_tenth_is_workspace() -> None:
    ours = plan(1 << 30)
    assert ours.workspace_bytes == pytest.approx(WORKSPACE_SHARE * (1 << 30), abs=1)
    assert not ours.is_tight
    assert plan(device_for(4, 10, 0), expert_memory="50%", step_bytes=0).is_tight
    assert dataclasses.replace(ours, is_bound=True).is_tight


def test_where_memory_is_tight_steps_are_compiled_before_it_is_split(tiny_checkpoint: Path) -> None:
    """700 kB for what a step takes and for pages of 6 kB each."""
    budget = device_for(4, 0, 700_000)
    options: dict[str, Any] = {"expert_memory": "4 slots", "max_num_seqs": 20, "max_num_batched_tokens": 20}
    with Engine.load(tiny_checkpoint, device_memory=budget, max_model_len=96, **options) as engine:
        memory = engine.memory_report()
        assert memory["device"] == budget
        assert STAGING < memory["workspace"] < STAGING + 700_000
        assert sum(part for name, part in memory.items() if name not in ("device", "host")) <= budget
        assert memory["kv_cache"] >= 7 * PAGE
        assert memory["workspace"] + memory["kv_cache"] > STAGING + 700_000 - PAGE  # nothing lies idle
        assert len(engine.generate([3, 4, 5], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
        assert engine.memory.measured(engine.parts.runner.workspace_bytes).workspace_bytes <= memory["workspace"]
    with pytest.raises(CapacityError):  # all but what a step takes fits
        Engine.load(tiny_checkpoint, device_memory=device_for(4, 0, 60_000), max_model_len=96, **options)


def test_host_memory_holds_all_experts_in_half_of_what_is_left() -> None:
    some = functools.partial(plan, expert_memory="40%")
    experts = len(CONFIG.moe_layers) * CONFIG.num_experts * EXPERT
    device = some(10 << 20, platform="gpu", dtype="float32", machine_bytes=4 * experts)
    assert device.host_bytes == experts
    assert some(10 << 20, platform="gpu", dtype="float32", machine_bytes=experts).host_bytes == experts // 2
    shared = some(10 << 20, machine_bytes=12 << 20, step_bytes=1 << 20)  # a CPU's memory is the machine's
    taken = shared.dense_bytes + shared.slab_bytes + shared.kv_bytes + shared.workspace_bytes
    assert shared.host_bytes == min(experts, ((12 << 20) - taken) // 2)
    assert some(10 << 20, machine_bytes=1 << 20).host_bytes == 0
    assert some(10 << 20, machine_bytes=1 << 40, expert_memory="100%").host_bytes == 0
    assert some(10 << 20, machine_bytes=1 << 40, host_memory="3MiB").host_bytes == 3 << 20
    assert some(10 << 20, machine_bytes=1 << 40, host_memory="0").host_bytes == 0


def test_a_budget_is_within_the_device() -> None:
    assert usable_memory("1MiB") == 1 << 20
    assert 0 < usable_memory() < 1 << 60
    with pytest.raises(CapacityError, match="device_memory of 1024 TiB is more than the device's"):
        usable_memory("1024TiB")
    with pytest.raises(ConfigError, match="device_memory"):
        usable_memory("40%")


def test_workspace_has_what_comes_from_the_host_and_what_stays() -> None:
    """Sent arguments are there twice: those of two steps. Block tables and logits for audits stay beside them."""
    executables, place = Executables(), jax.ShapeDtypeStruct((1000,), np.float32)
    executables.compile(jax.jit(jnp.sum), 0, place)
    before = executables.workspace_bytes
    executables.compile(jax.jit(lambda there, sent: there.sum() + sent.sum()), 0, place, np.zeros(1000, np.float32))
    assert executables.workspace_bytes >= before + 2 * 4000
    small, large = Buckets.of(4, 64, 96), Buckets.of(256, 64, 131_072)
    assert bytes_beside(small, 1000) == 2 * 4 * 1000 * 4
    assert bytes_beside(large, 1000) == 4 * 512 * 8192 + 2 * 16 * 1000 * 4
