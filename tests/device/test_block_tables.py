"""Block tables on the device are those of the host, whatever happens to sequences and their pages."""

import contextlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax import Engine, SamplingParams
from emoe_jax.device import shapes, step
from emoe_jax.device.block_tables import (
    WRITTEN_AT_ONCE,
    DeviceTables,
    NewPages,
    SentTables,
    TableUpdate,
    blank_tables,
    tables_of,
)
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.device.shapes import Buckets, Shape
from emoe_jax.requests.sequence import Sequence
from tests.engines import RESIDENT, EngineFactory

WIDTH, MOST = 40, 3
SHAPE = Shape(MOST, MOST, 2, 32, WIDTH)


def applied(tables: np.ndarray, update: TableUpdate) -> np.ndarray:
    """The rows that a batch reads; `tables` is changed, as on the device."""
    for new in (*update.before, update.new):
        room = len(new) // 3
        rows, columns, pages = NewPages(**NewPages.packing(room).views(new))
        known = rows >= 0
        tables[rows[known], columns[known]] = pages[known]
    return np.where(np.arange(WIDTH)[None, :] < update.lengths[:, None], tables[update.rows], 0)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), st.integers(0, 5), st.integers(1, 30)),
        st.tuples(st.just("move"), st.integers(0, 5), st.integers(0, 30)),
        st.tuples(st.just("replace"), st.integers(0, 5), st.integers(0, 30)),
        st.tuples(st.just("fail"), st.just(0), st.just(0)),
        st.tuples(st.just("plan"), st.permutations(range(6)), st.integers(1, MOST)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=200)
@given(EVENTS)
def test_the_device_reads_what_the_host_would_send(events: list[Any]) -> None:
    """For the newest plan, and for the one before it where that is computed again after it."""
    buckets = Buckets((1, 2, MOST), ((2, 32),), WIDTH)
    device, host = DeviceTables(buckets.kept_tables), SentTables(WIDTH)
    tables = blank_tables(buckets)
    sequences = [Sequence(str(index), [1]) for index in range(6)]
    page = 0
    plans: deque[tuple[TableUpdate, np.ndarray]] = deque(maxlen=2)
    for kind, which, count in events:
        if kind == "plan":
            chosen = [sequences[index] for index in which[:count]]
            device.begin_plan()
            host.begin_plan()
            expected = np.zeros((MOST, WIDTH), np.int32)
            host.place(chosen, SHAPE, expected)
            plans.append((device.place(chosen, SHAPE, np.zeros_like(expected)), expected))
            np.testing.assert_array_equal(applied(tables, plans[-1][0]), expected)
            for update, wanted in plans:  # all again, oldest first
                np.testing.assert_array_equal(applied(tables, update), wanted)
        elif kind == "fail":
            device.forget()
        else:
            new = [page := page + 1 for _ in range(count)]
            if kind == "replace":
                sequences[which] = Sequence(str(which), [1])
            if kind == "grow":
                pages = sequences[which].pages
                pages += new[: WIDTH - len(pages)]
            else:
                sequences[which].pages = new


def test_the_device_does_as_the_reference() -> None:
    rng = np.random.default_rng(0)
    entries = [(int(row), column, int(rng.integers(1, 99))) for row in (1, 4, 5) for column in range(WIDTH)]
    update = TableUpdate.of([4, 1], [WIDTH, 7], entries, SHAPE)
    buckets = Buckets((1, 2, MOST), ((2, 32),), WIDTH)
    expected = blank_tables(buckets)
    read = applied(expected, update)
    tables = jax.device_put(blank_tables(buckets))
    for new in update.before:
        tables = step.write_pages(tables, new)
    head = np.arange(5, dtype=np.int32)
    words, tables = step.with_tables(head, update.rows, update.lengths, update.new, tables, shape=SHAPE)
    np.testing.assert_array_equal(tables, expected)
    np.testing.assert_array_equal(words, [*range(5), *read.reshape(-1)])
    assert (read > 0).sum(axis=1).tolist() == [WIDTH, 7, 0]


def test_many_new_pages_come_in_several_calls() -> None:
    entries = [(1, column % WIDTH, column) for column in range(3 * WRITTEN_AT_ONCE)]
    update = TableUpdate.of([1], [WIDTH], entries, SHAPE)
    assert len(update.before) == 3
    tables = blank_tables(Buckets((1, 2, MOST), ((2, 32),), WIDTH))
    assert applied(tables, update)[0].sum() == sum(range(3 * WRITTEN_AT_ONCE - WIDTH, 3 * WRITTEN_AT_ONCE))


def test_warming_up_meets_all_that_an_update_needs() -> None:
    update = TableUpdate.of_padding(SHAPE)
    assert len(update.before) == 1
    tables = blank_tables(Buckets((1, 2, MOST), ((2, 32),), WIDTH))
    assert not applied(tables, update).any()
    assert not tables.any()


def test_small_tables_are_sent() -> None:
    few, many = Buckets.of(16, 512, 4096), Buckets.of(256, 8192, 131_072)
    assert (few.keeps_tables, many.keeps_tables) == (False, True)
    assert (few.table_bytes, many.table_bytes) == (0, 4 * 512 * 8192)
    assert isinstance(tables_of(few), SentTables)
    assert isinstance(tables_of(many), DeviceTables)


def test_what_is_sent_does_not_grow_with_the_context() -> None:
    sent = {}
    for length in (4096, 131_072):
        buckets = Buckets.of(256, 8192, length)
        shape = buckets.fit(256)
        update = TableUpdate.of([], [], [], shape)
        sent[length] = update.rows.nbytes + update.lengths.nbytes + update.new.nbytes
    assert sent[4096] == sent[131_072] < 10_000


GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (3, 40, 17, 1, 60, 9, 33, 12)]
OPTIONS: list[dict[str, Any]] = [
    {"expert_memory": "100%"},
    {"expert_memory": "3 slots", "routing": "exact"},
    {"expert_memory": "100%", "kv_memory": 11 * 6144},
]
"""All resident; forwards that are computed again; pages that run out, so that sequences are preempted."""


@pytest.fixture
def load(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineFactory]:
    """Engines that keep their block tables on the device."""
    monkeypatch.setattr(shapes, "LARGE_TABLES", 0)
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Engine:
            limits = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "policy": "static"}
            engine = stack.enter_context(Engine.load(tiny_checkpoint, **limits | RESIDENT | options))
            assert isinstance(engine.parts.runner.tables, DeviceTables)
            return engine

        yield make


@pytest.mark.parametrize("options", OPTIONS, ids=["resident", "again", "preempted"])
def test_tokens_are_those_of_tables_that_are_sent(
    engine_of: EngineFactory, load: EngineFactory, options: dict[str, Any]
) -> None:
    usual = {name: value for name, value in options.items() if name == "routing"}
    expected = [output.token_ids for output in engine_of(expert_memory="100%", **usual).generate(PROMPTS, GREEDY)]
    engine = load(**options)
    assert [output.token_ids for output in engine.generate(PROMPTS, GREEDY)] == expected
    assert [output.token_ids for output in engine.generate(PROMPTS, GREEDY)] == expected  # from the prefix cache
    state = engine.state()
    assert (state["scheduler"]["preemptions"] > 0) == ("kv_memory" in options)
    assert (state["forwards"]["again"] > 0) == ("routing" in options)


def test_a_failed_step_does_not_leave_tables_behind(
    engine_of: EngineFactory, load: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch never reached the device, and took with it what was new in the tables of a sequence that goes on."""
    expected = [output.token_ids for output in engine_of(expert_memory="100%").generate(PROMPTS[:4], GREEDY)]
    engine = load(expert_memory="100%", overlap=False)
    for index, prompt in enumerate(PROMPTS[:4]):
        engine.add_request(str(index), prompt, GREEDY)
    while len(engine.parts.scheduler.running) < 4:
        engine.step()
    sequences = engine.parts.scheduler.running
    tables = engine.parts.runner.tables
    tables.begin_plan()
    tables.place(sequences, engine.parts.runner.buckets.fit(4), np.zeros((4, 6), np.int32))  # and it is not sent
    tables.forget()
    while engine.has_work():
        engine.step()
    assert [engine.pop(str(index)).token_ids for index in range(4)] == expected


def test_what_was_not_sent_is_forgotten(load: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(expert_memory="100%", overlap=False)
    forgotten: list[bool] = []
    monkeypatch.setattr(engine.parts.runner.tables, "forget", lambda: forgotten.append(True))
    monkeypatch.setattr(Dispatcher, "_start", lambda *_: 1 / 0)
    engine.add_request("a", PROMPTS[0], GREEDY)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert forgotten
    engine.pop("a")
