"""A step that fails ends the requests of its batch, and no others."""

import time
from typing import Any

import jax
import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.attention import LayerKV
from emoe_jax.device import layer_steps, step
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.device.executables import Executables
from emoe_jax.device.ways import Ways
from emoe_jax.requests.contract import RoutingContract
from tests.engines import EngineFactory

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (3, 20, 1, 40, 9, 12, 33, 5)]


def count_failures(engine: Engine) -> int:
    """Step until nothing is left to do; how many steps raised."""
    failures = 0
    while engine.has_work():
        try:
            engine.step()
        except RuntimeError:
            failures += 1
    return failures


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("method", ["dispatch", "collect"])
@pytest.mark.parametrize("fatal", [1, 2, 6])
def test_a_failing_step_ends_its_batch_only(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch, overlap: bool, method: str, fatal: int
) -> None:
    """Twice as many requests as places, so that some wait while the others fail."""
    engine = engine_of(expert_memory="100%", overlap=overlap)
    expected = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    original, calls = getattr(Dispatcher, method), 0
    batch: set[str] = set()

    def fail_once(runner: Dispatcher, argument: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fatal:
            plan = argument if method == "dispatch" else argument.plan
            batch.update(sequence.request_id for sequence in plan.sequences)
            raise RuntimeError("the device is gone")
        return original(runner, argument)

    monkeypatch.setattr(Dispatcher, method, fail_once)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, GREEDY)
    failures = count_failures(engine)
    outputs = {str(index): engine.pop(str(index)) for index in range(len(PROMPTS))}
    assert failures == 1
    assert 0 < len(batch) < len(PROMPTS)
    for index, tokens in enumerate(expected):
        output = outputs[str(index)]
        if str(index) in batch:
            assert output.completions[0].finish_reason == "error"
        else:
            assert (output.completions[0].finish_reason, output.token_ids) == ("length", tokens)
    engine.step()  # what may still be in flight
    assert engine.state()["scheduler"]["pages_used"] == 0
    assert engine.generate(PROMPTS[1], GREEDY)[0].token_ids == expected[1]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("routing", "function"), [("resident", "whole_step"), ("exact", "go_on")])
@pytest.mark.parametrize("fatal", [1, 4, 9])
def test_a_failing_call_that_takes_the_kv_cache_along_costs_its_batch_only(
    engine_of: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
    overlap: bool,
    routing: RoutingContract,
    function: str,
    fatal: int,
) -> None:
    """The donated arrays are gone when the call raises. Others are computed again, and no lost page is reused."""
    monkeypatch.setattr(Ways, "peek", lambda ways, shape: "layered")
    engine = engine_of(expert_memory="5 slots", overlap=overlap, routing=routing, prefix_caching=True)
    expected = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    original, calls = Executables.call, 0

    def fail_once(executables: Executables, called: Any, key: Any, *args: Any, **statics: Any) -> Any:
        nonlocal calls
        if called in (step.whole_step, layer_steps.go_on) and called.__name__ == function:
            calls += 1
            if calls == fatal:
                for part in jax.tree.leaves(args, is_leaf=lambda part: isinstance(part, LayerKV)):
                    if isinstance(part, LayerKV):
                        for array in jax.tree.leaves(part):
                            array.delete()
                raise RuntimeError("the device is gone")
        return original(executables, called, key, *args, **statics)

    monkeypatch.setattr(Executables, "call", fail_once)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, GREEDY)
    failures = count_failures(engine)
    assert failures == 1
    outputs = [engine.pop(str(index)) for index in range(len(PROMPTS))]
    reasons = [output.completions[0].finish_reason for output in outputs]
    assert set(reasons) == {"error", "length"}
    for output, reason, tokens in zip(outputs, reasons, expected, strict=True):
        assert reason == "error" or output.token_ids == tokens
    assert engine.state()["scheduler"]["pages_used"] == 0
    assert [engine.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS] == expected


def test_time_in_the_compiler_is_no_time_of_a_step(engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the watchdog nor the choice of a way learns from steps that were compiled, or read from JAX's cache."""
    engine, slow = engine_of(expert_memory="3 slots", routing="exact"), 3.0
    engine.generate(PROMPTS[0], GREEDY)
    call, took = Executables.call, Ways.took
    told: list[float] = []
    compiled: list[float] = []

    def noting(ways: Ways, shape: Any, way: Any, seconds: float, repeated: bool) -> None:
        told.append(seconds)
        took(ways, shape, way, seconds, repeated)

    def compile_slowly_once(executables: Executables, function: Any, *arguments: Any, **static: Any) -> Any:
        if not compiled:
            time.sleep(slow)
            executables.seconds += slow
            compiled.append(slow)
        return call(executables, function, *arguments, **static)

    with monkeypatch.context() as patch:
        patch.setattr(Executables, "call", compile_slowly_once)
        patch.setattr(Ways, "took", noting)
        engine.generate(PROMPTS[0], GREEDY)
    assert compiled == [slow]
    assert (engine.vitals.longest_step or 0.0) < slow
    assert max(told) < slow


def test_executables_say_what_compiling_took() -> None:
    executables, function = Executables(), jax.jit(lambda x: x + 1)
    executables.call(function, "a test's", np.zeros(2))
    seconds = executables.seconds
    assert seconds > 0
    executables.call(function, "a test's", np.zeros(2))
    assert executables.seconds == seconds


def test_vitals_tell_a_step_at_work(engine_of: EngineFactory) -> None:
    """They are there while the compiler works, and grow with steps and with experts that come."""
    engine = engine_of(expert_memory="50%", routing="exact")
    assert (engine.vitals.longest_step, engine.vitals.compiling) == (None, False)
    seen: list[bool] = []
    function = jax.jit(lambda x: seen.append(engine.vitals.compiling) or x)  # called while it is traced
    Executables.compile(engine.parts.runner.executables, function, "a test's", np.zeros(1))
    assert seen == [True]
    before = engine.vitals
    engine.generate(PROMPTS[0], GREEDY)
    steps, staged = engine.vitals.progress[:2]
    assert steps > before.progress[0]
    assert staged > before.progress[1]
    assert (engine.vitals.longest_step or 0) > 0
    assert not engine.vitals.compiling
