"""Routing contracts: what each one promises, whichever way a batch is computed."""

from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from emoe_jax import Engine, RequestError, SamplingParams
from emoe_jax.device.dispatcher import Dispatched, Dispatcher
from emoe_jax.device.executables import Executables
from emoe_jax.device.runner import BatchRun, Runner
from emoe_jax.device.ways import Ways
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.scheduling.plan import StepPlan
from tests.engines import EngineFactory

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True, logprobs=2)
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (3, 17, 1, 40, 9)]
LAYERS = 3


@pytest.fixture(params=["whole", "layered", "measured"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How batches are computed: always whole, with the next step begun before one stands; always layered; as usual."""
    if request.param != "measured":
        monkeypatch.setattr(Ways, "peek", lambda ways, shape: request.param)
        monkeypatch.setattr(Ways, "overlaps", True)
    return request.param


@pytest.fixture(scope="module")
def full(engine_of: EngineFactory) -> Engine:
    return engine_of(expert_memory="100%")


@pytest.mark.parametrize(
    ("slots", "params"), [(2, GREEDY), (3, DRAWN), (6, GREEDY)], ids=["2-greedy", "3-drawn", "6-greedy"]
)
def test_exact_gives_the_full_models_tokens(
    engine_of: EngineFactory, full: Engine, way: str, slots: int, params: SamplingParams
) -> None:
    engine = engine_of(expert_memory=f"{slots} slots", policy="lru")
    before = dict(engine.loop.dispatcher.forwards)
    outputs = engine.generate(PROMPTS, params, routing="exact")
    for output, wanted in zip(outputs, full.generate(PROMPTS, params), strict=True):
        assert output.token_ids == wanted.token_ids
        assert (output.substituted, output.substituted_weight) == (0, 0)
        if params.logprobs:
            ours, theirs = ([token.logprob for token in each.logprobs or []] for each in (output, wanted))
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    counted = {name: count - before[name] for name, count in engine.loop.dispatcher.forwards.items()}
    if way == "whole":
        assert counted["whole"] > 0
        assert counted["layered"] == 0
        assert counted["again"] > 0
    if way == "layered":
        assert (counted["whole"], counted["again"]) == (0, 0)


def test_a_token_never_gives_up_more_than_its_budget(engine_of: EngineFactory, way: str) -> None:
    """Answers of one token to prompts of one token: what an answer gave up, that token did, in all layers together."""
    prompts, one = [[token] for token in range(48)], SamplingParams(max_tokens=1, temperature=0)
    given_up = {}
    for budget in (0.3, 0.6, None):
        options = {"tolerance": 1.0, "substitution_budget": budget, "sacred": 0}
        engine = engine_of(expert_memory="3 slots", routing="bounded", **options)
        outputs = engine.generate(prompts, one)
        assert all(output.tolerance == 1.0 for output in outputs)
        given_up[budget] = np.array([LAYERS * output.substituted_weight for output in outputs])
    assert given_up[0.3].max() <= 0.3 + 1e-6
    assert 0.3 < given_up[0.6].max() <= 0.6 + 1e-6
    assert given_up[None].max() > 1


def test_sacred_choices_are_kept(engine_of: EngineFactory, way: str) -> None:
    """With two choices per layer at most the second one goes, and its share is below one half."""
    engine = engine_of(expert_memory="3 slots", policy="lru", routing="bounded", tolerance=1.0)
    outputs = engine.generate(PROMPTS, GREEDY)
    assert any(output.substituted > 0 for output in outputs)
    for output in outputs:
        assert output.substituted <= 0.5
        assert output.substituted_weight <= output.substituted


def test_a_tolerance_between_loads_less_than_exact_and_substitutes_less_than_resident(
    engine_of: EngineFactory, way: str
) -> None:
    engine = engine_of(expert_memory="4 slots", policy="static", host_memory="0")
    loads, weights = [], []
    for tolerance in (0.0, 0.3, 0.45):
        before = engine.parts.residency.loads.waited_loads
        outputs = [engine.generate(prompt, GREEDY, tolerance=tolerance)[0] for prompt in PROMPTS]
        loads.append(engine.parts.residency.loads.waited_loads - before)
        weights.append(sum(output.substituted_weight for output in outputs))
    assert loads[0] > loads[2] > 0
    assert loads[0] > loads[1] > loads[2] or way == "measured"  # whole forwards also load what they guess
    assert 0 == weights[0] < weights[1] < weights[2]


def test_uncached_logits_keep_the_contracts(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="3 slots", sacred=0)
    prompt = PROMPTS[3]
    np.testing.assert_array_equal(engine.logits(prompt, tolerance=0.0), engine.logits(prompt, "exact"))
    resident = engine.logits(prompt, "resident")
    between = engine.logits(prompt, tolerance=0.3)
    assert np.abs(between - resident).max() > 1e-3
    assert np.abs(between - engine.logits(prompt, "exact")).max() > 1e-3


def test_rows_of_one_batch_keep_their_own_contracts(engine_of: EngineFactory, full: Engine, way: str) -> None:
    engine = engine_of(expert_memory="3 slots", policy="lru", max_num_seqs=8, max_num_batched_tokens=96)
    contracts: list[RoutingContract] = ["resident", "exact", "bounded", "exact", "bounded"]
    for index, (prompt, routing) in enumerate(zip(PROMPTS, contracts, strict=True)):
        tolerance = 0.3 if routing == "bounded" else None
        engine.add_request(str(index), prompt, GREEDY, routing=routing, tolerance=tolerance)
    while engine.has_work():
        engine.step()
    outputs = [engine.pop(str(index)) for index in range(len(PROMPTS))]
    for index in (1, 3):
        assert outputs[index].token_ids == full.generate(PROMPTS[index], GREEDY)[0].token_ids
        assert outputs[index].substituted == 0
    assert outputs[0].substituted > 0
    for index in (2, 4):
        assert outputs[index].substituted_weight < 0.3 / 2 + 1e-6
    assert [output.tolerance for output in outputs] == [None, None, 0.3, None, 0.3]


def test_a_step_that_misses_nothing_is_one_forward_and_one_wait(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ways, "peek", lambda ways, shape: "whole")
    engine = engine_of(expert_memory="7 slots", policy="lru", host_memory="0")
    engine.generate(PROMPTS[0], GREEDY, routing="exact")  # now the experts of this text are there
    dispatcher, steps = engine.loop.dispatcher, engine.loop.steps
    before = dict(dispatcher.forwards)
    reads: list[object] = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: reads.append(tree) or get(tree))
    engine.generate(PROMPTS[0], GREEDY, routing="exact")
    steps = engine.loop.steps - steps
    assert len(reads) == steps
    assert dispatcher.forwards["again"] == before["again"]
    assert dispatcher.forwards["whole"] - before["whole"] == steps


def test_a_forward_that_missed_goes_on_where_it_did(engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer before that is computed again, and behind it one call leads from router to router."""
    monkeypatch.setattr(Ways, "peek", lambda ways, shape: "whole")
    monkeypatch.setattr(Ways, "overlaps", False)
    engine = engine_of(expert_memory="4 slots", policy="lru", host_memory="0")
    missed: list[int] = []
    go_on, called = Runner.go_on, Counter[str]()
    call = Executables.call

    def noting(runner: Runner, run: BatchRun, layer: int) -> Any:
        missed.append(layer)
        return go_on(runner, run, layer)

    def counting(executables: Executables, function: Any, *arguments: Any, **statics: Any) -> Any:
        called[function.__name__] += 1
        return call(executables, function, *arguments, **statics)

    monkeypatch.setattr(Runner, "go_on", noting)
    monkeypatch.setattr(Executables, "call", counting)
    steps = engine.loop.steps
    engine.generate(PROMPTS[2], GREEDY, routing="exact")  # one token: no step has chunks of prompts
    assert len(set(missed)) > 1
    assert called["whole_step"] == engine.loop.steps - steps
    assert called["start_layers"] == 0
    assert called["stop_at"] == called["end_layers"] == len(missed)
    assert called["go_on"] == sum(LAYERS - 1 - layer for layer in missed)


def test_where_forwards_are_repeated_often_a_step_stands_before_the_next_one_begins(
    engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that one begins before it is booked, so that the host works beside the device."""
    monkeypatch.setattr(Ways, "peek", lambda ways, shape: "whole")
    monkeypatch.setattr(Ways, "overlaps", False)
    engine = engine_of(expert_memory="4 slots", policy="lru", host_memory="0")
    stood: list[bool] = []
    dispatch = Dispatcher.dispatch

    def looking(dispatcher: Dispatcher, plan: StepPlan) -> Dispatched:
        stood.extend(run.read is not None for before in dispatcher.in_flight for run in before.runs)
        return dispatch(dispatcher, plan)

    monkeypatch.setattr(Dispatcher, "dispatch", looking)
    engine.generate(PROMPTS[2], GREEDY, routing="exact")
    assert len(stood) > GREEDY.max_tokens // 2
    assert all(stood)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"routing": "greedy"}, "routing is 'greedy'; expected 'resident', 'bounded' or 'exact'"),
        ({"tolerance": 1.5}, r"tolerance is 1.5; expected a number in \[0, 1\]"),
        ({"tolerance": "much"}, r"tolerance is 'much'; expected a number in \[0, 1\]"),
        ({"tolerance": 0.1, "routing": "exact"}, "a tolerance is given with routing 'exact'; it belongs to 'bounded'"),
    ],
)
def test_what_is_no_contract_is_refused(engine_of: EngineFactory, wrong: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine_of(expert_memory="3 slots").generate(PROMPTS[0], GREEDY, **wrong)
