"""Slab and KV cache trade places between steps: no token changes, nothing is lost, and the plan holds throughout."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from emoe_jax import ConfigError, Engine, SamplingParams
from emoe_jax.device import runner as runner_module
from emoe_jax.experts.slab import ExpertSlab
from emoe_jax.experts.store import ExpertStore, aligned_record
from emoe_jax.memory import trade
from emoe_jax.memory.trade import Pressure
from emoe_jax.models import open_checkpoint
from tests.engines import EngineFactory

PAGE = 16 * 3 * 2 * 2 * 8 * 4
EXPERT = 3 * 32 * 24 * 4
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (3, 17, 1, 40, 9)]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
TIGHT: dict[str, Any] = {
    "expert_memory": "6 slots",
    "kv_memory": 9 * PAGE,
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "memory_trade": True,
}
"""A lean slab of 3 slots per layer leaves 9 + 13 pages; four sequences of 96 tokens want 24 and the trash page."""


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "overlapped"])
def tight(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint, **TIGHT, policy="lru", overlap=request.param) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine_of: EngineFactory) -> list[list[int]]:
    full = engine_of(expert_memory="100%")
    return [full.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]


def check_slab(engine: Engine, checkpoint: Path) -> None:
    """Every resident expert's slot holds its weights."""
    source, slab, table = open_checkpoint(checkpoint), engine.parts.residency.slab, engine.parts.residency.table
    record = aligned_record(slab.record_format)
    for layer, weights in enumerate(slab.weights):
        assert weights.capacity == slab.capacities[layer] == table.capacities[layer]
        for expert in table.resident(layer).tolist():
            source.read_expert(layer, expert, record, slab.record_format)
            for part, array in zip(slab.record_format.views(record), (weights.w_in, weights.w_out), strict=True):
                np.testing.assert_array_equal(array[table.slot(layer, expert)], part)


def run(engine: Engine, routings: list[Any], trade_every: int, checkpoint: Path) -> list[list[int]]:
    """Tokens of all prompts, with a trade asked for every few steps, to and fro."""
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, GREEDY, routing=routings[index % len(routings)])
    steps, was_lean, seen = 0, engine.state()["memory_trade"]["lean"], set()
    while engine.has_work():
        if steps % trade_every == 0:
            engine.trade_memory(lean=steps // trade_every % 2 == 0)
        engine.step()
        steps += 1
        state = engine.state()
        if state["memory_trade"]["lean"] != was_lean:
            was_lean = not was_lean
            check_slab(engine, checkpoint)
        seen.add((state["memory"]["slab"], state["memory"]["kv_cache"]))
        assert state["scheduler"]["pages"] + 1 == state["memory"]["kv_cache"] // PAGE
        assert state["memory"]["slab"] + state["memory"]["kv_cache"] <= 18 * EXPERT + 9 * PAGE
        assert sum(state["residency"]["slots"]) * EXPERT == state["memory"]["slab"]
    assert seen == {(18 * EXPERT, 9 * PAGE), (9 * EXPERT, 22 * PAGE)}
    assert engine.state()["scheduler"]["pages_used"] == 0
    return [engine.pop(str(index)).token_ids for index in range(len(PROMPTS))]


def test_exact_tokens_are_the_same_across_trades(
    tight: Engine, expected: list[list[int]], tiny_checkpoint: Path
) -> None:
    before = tight.state()["memory_trade"]["trades"]
    assert run(tight, ["exact"], 4, tiny_checkpoint) == expected
    assert tight.state()["memory_trade"]["trades"] >= before + 4
    assert tight.state()["memory_trade"]["error"] is None


def test_both_contracts_go_on_across_trades(tight: Engine, expected: list[list[int]], tiny_checkpoint: Path) -> None:
    tokens = run(tight, ["exact", "resident"], 3, tiny_checkpoint)
    assert tokens[::2] == expected[::2]
    assert all(len(answer) == 24 for answer in tokens)


def test_an_expert_on_its_way_finds_its_place_or_not(
    tight: Engine, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads that were asked for before a trade are committed after it."""
    read = ExpertStore.read

    def slowly(store: ExpertStore, layer: int, expert: int) -> Any:
        time.sleep(0.02)
        return read(store, layer, expert)

    monkeypatch.setattr(ExpertStore, "read", slowly)
    run(tight, ["resident"], 2, tiny_checkpoint)
    tight.parts.residency.settle(10.0)
    check_slab(tight, tiny_checkpoint)


def test_kept_prefixes_survive_trades(tiny_checkpoint: Path, engine_of: EngineFactory) -> None:
    with Engine.load(tiny_checkpoint, **TIGHT, policy="static", routing="exact") as engine:
        prompt = PROMPTS[3] + PROMPTS[1]
        first = engine.generate(prompt, GREEDY)[0]
        assert first.token_ids == engine_of(expert_memory="100%").generate(prompt, GREEDY)[0].token_ids
        for lean in (True, False, True):
            engine.trade_memory(lean)
            again = engine.generate(prompt, GREEDY)[0]
            assert engine.state()["memory_trade"]["lean"] == lean
            assert again.num_cached_tokens == 48
            assert again.token_ids == first.token_ids


def test_pages_in_use_move_down_and_those_too_many_are_waited_for(tiny_checkpoint: Path) -> None:
    with Engine.load(tiny_checkpoint, **TIGHT, policy="static", prefix_caching=False) as engine:
        engine.trade_memory(lean=True)
        for index in range(4):
            engine.add_request(str(index), PROMPTS[3], GREEDY, routing="exact")
        while engine.has_work():
            engine.step()
            state = engine.state()
            if state["scheduler"]["pages_used"] > 8:
                engine.trade_memory(lean=False)
                assert state["memory_trade"]["lean"]  # 9 pages do not hold them
        engine.trade_memory(lean=False)
        engine.generate(PROMPTS[0], GREEDY)
        assert not engine.state()["memory_trade"]["lean"]
        tokens = [engine.pop(str(index)).token_ids for index in range(4)]
        assert tokens == [engine.generate(PROMPTS[3], GREEDY, routing="exact")[0].token_ids] * 4


def test_no_more_than_the_plan_is_ever_allocated(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Records in host memory would count: on a CPU they are arrays like those of the device.
    with Engine.load(tiny_checkpoint, **TIGHT, policy="static", host_memory="0") as engine:
        engine.generate(PROMPTS[1], GREEDY, routing="resident")
        engine.step()  # nothing is in flight any more
        live: list[int] = []

        def count(*_: Any) -> None:
            live.append(sum(array.nbytes for array in jax.live_arrays()))

        for owner, name in ((ExpertSlab, "_empty"), (runner_module, "resize_pages")):
            original = getattr(owner, name)

            def counted(*args: Any, original: Any = original, **options: Any) -> Any:
                result = original(*args, **options)
                count()  # the new arrays are there, the old ones still too
                return result

            monkeypatch.setattr(owner, name, counted)
        count()
        for lean in (True, False):
            engine.trade_memory(lean)
            engine.step()
            assert engine.state()["memory_trade"]["lean"] == lean
            assert engine.parts.residency.slab.nbytes == engine.memory_report()["slab"]
        assert len(live) == 1 + 2 * (3 + 3)
        few = 4096  # block tables and the like
        assert max(live) - live[0] <= engine.memory.trade_bytes + few
        assert max(live) > live[0]


def test_a_trade_that_fails_is_the_last_and_harms_nobody(
    tiny_checkpoint: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.load(tiny_checkpoint, **TIGHT, policy="lru") as engine:
        resize, calls = ExpertSlab.resize, []

        def fail(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
            resize(*args)

        monkeypatch.setattr(ExpertSlab, "resize", fail)
        engine.trade_memory(lean=True)
        assert [output.token_ids for output in engine.generate(PROMPTS, GREEDY, routing="exact")] == expected
        state = engine.state()
        assert state["memory_trade"]["error"].startswith("RuntimeError: RESOURCE_EXHAUSTED")
        assert state["residency"]["slots"] == [3, 6, 6]
        assert state["scheduler"]["pages"] == 8
        check_slab(engine, tiny_checkpoint)


def test_load_makes_them_trade_and_calm_trades_back(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing compiles meanwhile: both splits are warmed up."""
    monkeypatch.setattr(trade, "DWELL_SECONDS", 0.0)
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compilations.append(event)

    few: dict[str, Any] = TIGHT | {"max_num_seqs": 2, "max_num_batched_tokens": 8, "kv_memory": 7 * PAGE}
    with Engine.load(tiny_checkpoint, **few, policy="lru") as engine:
        engine.warm_up()
        state = engine.state()
        assert state["memory_trade"] == {
            "possible": True, "lean": False, "trades": 0, "trade_seconds": 0.0, "error": None,
        }  # fmt: skip
        assert all(len(experts) == 6 for experts in state["residency"]["experts"])
        assert 0 < state["memory"]["workspace"] < 64 << 20
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            for index in range(4):
                routing = ("resident", "exact")[index % 2]
                engine.add_request(
                    str(index), PROMPTS[1], SamplingParams(max_tokens=70, ignore_eos=True), routing=routing
                )
            lean: list[bool] = []
            while engine.has_work():
                engine.step()
                lean.append(engine.state()["memory_trade"]["lean"])
            assert any(lean)
            engine.generate([PROMPTS[0]] * 2, GREEDY)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert not engine.state()["memory_trade"]["lean"]
        assert engine.state()["memory_trade"]["trades"] >= 2
        assert compilations == []


def test_a_plan_without_a_trade_refuses_one(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="100%")
    assert not engine.state()["memory_trade"]["possible"]
    with pytest.raises(ConfigError, match="nothing can be traded"):
        engine.trade_memory(lean=True)


def test_pressure_neither_hurries_nor_flaps() -> None:
    pressure = Pressure(0.0, planned_pages=100)
    for step in range(200):  # a tenth of a second each; pages are short from the start
        pressure.look(step / 10, short=True, used=99)
        assert pressure.wants_pages(step / 10) == (step >= 150)
    pressure.traded(20.0)
    pressure.look(20.0, short=True, used=99)
    assert not pressure.wants_pages(20.0)
    assert not pressure.spares_pages(30.0)
    for step in range(300, 600):
        busy = step < 400
        pressure.look(step / 10, short=False, used=60 if busy else 50)
        assert pressure.spares_pages(step / 10) == (step >= 549)
    once = Pressure(0.0, planned_pages=100)
    for step in range(1000):  # one step in four lacks pages: no reason to trade
        once.look(step / 10, short=step % 4 == 0, used=99)
        assert not once.wants_pages(step / 10)
