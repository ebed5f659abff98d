"""Several callers of one engine at once: whichever advances it, each gets all that is its own."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.device.dispatcher import Dispatcher
from emoe_jax.requests.request import Delta
from tests.engines import EngineFactory

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (3, 20, 1, 40, 9, 12)]


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def engine(request: pytest.FixtureRequest, engine_of: EngineFactory) -> Iterator[Engine]:
    """All experts resident; nothing may be left over afterwards."""
    engine = engine_of(expert_memory="100%", overlap=request.param)
    yield engine
    engine.step()  # what may still be in flight
    assert engine.state()["scheduler"]["pages_used"] == 0
    assert not engine.has_work()


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def alone(engine: Engine, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return engine.generate(prompt, params)[0].token_ids


@pytest.mark.parametrize("count", [2, 3, 6], ids="{} iterators".format)
def test_interleaved_iterators_get_their_own_deltas(engine: Engine, count: int) -> None:
    """Of different lengths, and more of them than places."""
    lengths = [SamplingParams(max_tokens=3 + 4 * index, temperature=0, ignore_eos=True) for index in range(count)]
    expected = [alone(engine, PROMPTS[index], lengths[index]) for index in range(count)]
    streams = [engine.stream(PROMPTS[index], lengths[index]) for index in range(count)]
    got: list[list[Delta]] = [[] for _ in streams]
    for deltas in itertools.zip_longest(*streams):
        for index, delta in enumerate(deltas):
            if delta is not None:
                got[index].append(delta)
    assert [tokens_of(deltas) for deltas in got] == expected
    for deltas in got:
        assert len({delta.request_id for delta in deltas}) == 1
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]


def test_an_iterator_that_is_read_late_has_missed_nothing(engine: Engine) -> None:
    expected = [alone(engine, prompt) for prompt in PROMPTS[:2]]
    late = engine.stream(PROMPTS[0], GREEDY)
    first = [next(late)]
    assert tokens_of(list(engine.stream(PROMPTS[1], GREEDY))) == expected[1]
    assert tokens_of([*first, *late]) == expected[0]


@pytest.mark.parametrize("n", [1, 3])
def test_generate_inside_a_stream(engine: Engine, n: int) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.7, seed=5, n=n, ignore_eos=True)
    expected = [completion.token_ids for completion in engine.generate(PROMPTS[3], params)[0].completions]
    inner = [alone(engine, prompt) for prompt in PROMPTS[:2]]
    got: list[list[int]] = [[] for _ in range(n)]
    for delta in engine.stream(PROMPTS[3], params):
        got[delta.index].extend(delta.token_ids)
        assert [output.token_ids for output in engine.generate(PROMPTS[:2], GREEDY)] == inner
    assert got == expected


def test_callers_of_step_beside_iterators_and_generate(engine: Engine) -> None:
    expected = [alone(engine, prompt) for prompt in PROMPTS[:3]]
    stream = engine.stream(PROMPTS[0], GREEDY)
    streamed = [next(stream)]
    engine.add_request("mine", PROMPTS[1], GREEDY)
    streamed.append(next(stream))
    streamed.append(next(stream))
    assert alone(engine, PROMPTS[2]) == expected[2]
    mine = []
    while engine.has_work():
        mine += engine.step()
    assert {delta.request_id for delta in mine} == {"mine"}
    assert tokens_of(mine) == expected[1]
    assert engine.pop("mine").token_ids == expected[1]
    assert tokens_of([*streamed, *stream]) == expected[0]


def test_closing_one_iterator_leaves_the_others_alone(engine: Engine) -> None:
    expected = alone(engine, PROMPTS[1])
    closed, kept = engine.stream(PROMPTS[0], GREEDY), engine.stream(PROMPTS[1], GREEDY)
    next(closed)
    got = [next(kept)]
    closed.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert tokens_of([*got, *kept]) == expected


def test_popped_requests_leave_nothing_for_the_next_step(engine: Engine) -> None:
    engine.add_request("mine", PROMPTS[1], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    alone(engine, PROMPTS[0])
    assert engine.has_work()
    engine.pop("mine")
    assert engine.step() == []


def test_an_id_in_use_is_no_obstacle(engine: Engine) -> None:
    expected = alone(engine, PROMPTS[0])
    name, _, last = engine.generate(PROMPTS[0], GREEDY)[0].request_id.rpartition("-")
    taken = [f"{name}-{int(last) + ahead}" for ahead in (1, 2)]
    for request_id in taken:
        engine.add_request(request_id, PROMPTS[1], GREEDY)
    assert alone(engine, PROMPTS[0]) == expected
    while engine.has_work():
        engine.step()
    assert [engine.pop(request_id).completions[0].finish_reason for request_id in taken] == ["length", "length"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Set `fail` to have the next plan that a sequence of these requests is part of fail in `method`."""
    wanted: dict[str, Any] = {"fail": None}

    def wrap(method: str) -> None:
        original = getattr(Dispatcher, method)

        def run(runner: Dispatcher, argument: Any) -> Any:
            plan = argument if method == "dispatch" else argument.plan
            if wanted["fail"] == method:
                wanted["fail"] = None
                wanted["ids"] = {sequence.request_id for sequence in plan.sequences if not sequence.finished}
                raise RuntimeError("the device is gone")
            return original(runner, argument)

        monkeypatch.setattr(Dispatcher, method, run)

    wrap("dispatch")
    wrap("collect")
    return wanted


@pytest.mark.parametrize("method", ["dispatch", "collect"])
def test_a_failed_step_reaches_every_iterator_of_its_batch(
    engine: Engine, failing: dict[str, Any], method: str
) -> None:
    expected = alone(engine, PROMPTS[2])
    first, second = engine.stream(PROMPTS[0], GREEDY), engine.stream(PROMPTS[1], GREEDY)
    before = {0: [next(first)], 1: [next(second)]}
    failing["fail"] = method
    for index, stream in enumerate((first, second)):
        with pytest.raises(RuntimeError, match="the device is gone"):
            before[index].extend(stream)  # no `StopIteration`, as if the answer were whole
        assert len(before[index]) < GREEDY.max_tokens
    assert len(failing["ids"]) == 2
    assert alone(engine, PROMPTS[2]) == expected


def test_a_failed_step_ends_no_other_callers_request(engine: Engine, failing: dict[str, Any]) -> None:
    """Streams take all places before `generate` and a caller of `step` come: the batch that fails is not theirs."""
    expected = alone(engine, PROMPTS[4])
    streams = [engine.stream(prompt, GREEDY) for prompt in PROMPTS[:4]]
    for stream in streams:
        next(stream)
    engine.add_request("mine", PROMPTS[4], GREEDY)
    failing["fail"] = "collect"
    assert alone(engine, PROMPTS[4]) == expected
    mine = []
    while engine.has_work():
        mine += engine.step()
    assert tokens_of(mine) == engine.pop("mine").token_ids == expected
    for stream in streams:
        with pytest.raises(RuntimeError, match="the device is gone"):
            list(stream)


def test_a_failure_during_another_callers_step_is_raised_by_the_next(engine: Engine, failing: dict[str, Any]) -> None:
    engine.add_request("mine", PROMPTS[0], GREEDY)
    engine.step()
    stream = engine.stream(PROMPTS[1], GREEDY)
    failing["fail"] = "dispatch"
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(stream)
    assert engine.has_work()
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()
    assert not engine.has_work()
    assert engine.pop("mine").completions[0].finish_reason == "error"
