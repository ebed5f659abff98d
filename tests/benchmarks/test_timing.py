"""Benchmarks report exactly what a step takes, on a clock that only steps advance, however far an engine runs ahead."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import decoding, peers, recording, timing
from benchmarks.overhead import steps
from benchmarks.residency import live
from emoe_jax import EmoeError
from tests.benchmarks.device_clock import AheadEngine, Clock, LibraryInStep
from train.tasks.example import Example

DECODE = 0.031


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (timing, peers, recording, live, steps):
        monkeypatch.setattr(module, "time", clock)
    return clock


def ours(engine: Any) -> peers.Ours:
    """`peers.Ours` over this engine."""
    found = object.__new__(peers.Ours)
    found._engine = engine
    return found


@pytest.mark.parametrize(("ahead", "host"), [(True, 0.0), (True, 0.004), (False, 0.0), (False, 0.004)])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("turns", "calls"), [(1, 1), (3, 4), (2, 7)])
def test_peers_are_timed_alike(clock: Clock, ahead: bool, host: float, batch: int, turns: int, calls: int) -> None:
    """An idle device between the turns gives nobody a step for nothing."""
    side = ours(AheadEngine(clock, DECODE, ahead=ahead, host=host))
    other: Any = LibraryInStep(clock, 0.05)
    prompts = np.ones((batch, peers.PROMPT), np.int64)
    side.start(prompts)
    other.start(prompts)
    medians = peers.interleave({"ours": side.decode, "theirs": other.decode}, turns, calls)
    hidden = ahead  # the host's work is done while the device computes
    assert medians["ours"] == pytest.approx(DECODE if hidden else DECODE + 2 * host, abs=1e-9)
    assert medians["theirs"] == pytest.approx(0.05, abs=1e-9)
    assert [len(row) for row in side.tokens()] == [len(row) for row in other.tokens()]


def test_a_whole_comparison(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "read_bandwidth", lambda: 1e10)
    engine = AheadEngine(clock, DECODE, prefill=0.4)
    monkeypatch.setattr(AheadEngine, "generate", lambda self, *_: clock.sleep(0.4) or [FIRST], raising=False)
    numbers = peers.compare(ours(engine), LibraryInStep(clock, 2 * DECODE), 2)  # pyright: ignore[reportArgumentType]
    assert numbers["decode_b1"] == pytest.approx(2)
    assert numbers["decode_b8"] == pytest.approx(2)
    assert numbers["decode_b8_ours_tokens_per_s"] == pytest.approx(8 / DECODE)
    assert numbers["prefill_512"] == pytest.approx(2 * DECODE / 0.4)
    assert not engine.busy  # nothing runs on during what is measured next


class First:
    token_ids = (3,)


FIRST = First()


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("batch", "prompts_per_step"), [(1, 1), (16, 16), (16, 3)])
def test_decoding(clock: Clock, ahead: bool, batch: int, prompts_per_step: int) -> None:
    engine: Any = AheadEngine(clock, DECODE, ahead=ahead, prompts_per_step=prompts_per_step)
    for seed in range(2):
        clock.sleep(seed)
        assert decoding.decode_seconds(engine, batch, seed) == pytest.approx(DECODE, abs=1e-9)
        assert not engine.busy


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("batch", "prompts_per_step"), [(1, 1), (8, 8), (8, 3)])
def test_recording_counts_the_finished_file(clock: Clock, ahead: bool, batch: int, prompts_per_step: int) -> None:
    engine: Any = AheadEngine(clock, DECODE, ahead=ahead, prompts_per_step=prompts_per_step)
    engine.finishing = 0.2
    assert recording.trial(engine, batch, 10, None) == pytest.approx((DECODE, DECODE), abs=1e-9)
    recorded = recording.trial(engine, batch, 10, Path("trace.npz"))
    assert recorded == pytest.approx((DECODE, DECODE + 0.02), abs=1e-9)
    assert not engine.busy


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize(("batch", "prompts_per_step"), [(1, 1), (16, 16), (16, 3)])
def test_the_live_grid(
    clock: Clock, ahead: bool, batch: int, prompts_per_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_prompt_ids", lambda *_: [1, 2])
    monkeypatch.setattr(live, "_test_examples", lambda per_task: [Example("", "", "qa")] * (4 * per_task))
    engine: Any = AheadEngine(clock, DECODE, ahead=ahead, prompts_per_step=prompts_per_step)
    for repetition in range(2):
        clock.sleep(1)
        assert live.decode_seconds(engine, batch, repetition) == pytest.approx(DECODE, abs=1e-9)
        assert not engine.busy


def test_steps_of_another_batch_are_not_timed(clock: Clock) -> None:
    engine: Any = AheadEngine(clock, DECODE)
    batch = timing.DecodingBatch(engine, [[1], [2]], 4)
    with pytest.raises(EmoeError, match="decoded 0 sequences where all 2"):
        timing.per_call(batch.step, 100)


def test_a_comparison_that_outgrows_the_context_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for repetitions in ("0", str(peers.MAX_REPETITIONS + 1)):
        with pytest.raises(SystemExit):
            peers.main(["--repetitions", repetitions])
        assert "--repetitions" in capsys.readouterr().err
