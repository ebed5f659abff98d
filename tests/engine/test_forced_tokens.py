"""Answers that are given: each step decodes one of their tokens, and says how probable the model found it."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.errors import RequestError
from tests.engines import EngineFactory

TEXTS = [[7, 3, 3, 60, 12, 9, 41], [5, 60, 0, 2, 8, 8, 9], [1, 2, 30, 31, 32, 33, 34, 35, 36, 37]]  # 60 ends texts


def forced(ids: list[int], given: int = 1) -> SamplingParams:
    return SamplingParams(forced_token_ids=tuple(ids[given:]), logprobs=0)


def logprobs(engine: Engine, ids: list[int], given: int, routing: Any = None) -> np.ndarray:
    """Of every token after the first `given`, by one forward over all of them."""
    rows = jax.nn.log_softmax(engine.logits(ids, routing), axis=-1)
    return np.asarray(rows)[np.arange(given - 1, len(ids) - 1), ids[given:]]


def run(engine: Engine, texts: list[list[int]], given: int) -> list[tuple[list[int], list[float]]]:
    """Tokens and log probabilities of each text, all of them side by side."""
    for number, ids in enumerate(texts):
        engine.add_request(str(number), ids[:given], forced(ids, given))
    while engine.has_work():
        engine.step()
    outputs = [engine.pop(str(number)) for number in range(len(texts))]
    assert [output.completions[0].finish_reason for output in outputs] == ["length"] * len(texts)
    return [(output.token_ids, [token.logprob for token in output.logprobs or []]) for output in outputs]


@pytest.mark.parametrize("given", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"expert_memory": "100%"},
        {"expert_memory": "100%", "overlap": False},
        {"expert_memory": "3 slots"},
        {"expert_memory": "3 slots", "routing": "exact"},
    ],
)
def test_forced_tokens_are_scored_as_one_forward_scores_them(
    engine_of: EngineFactory, options: dict[str, Any], given: int
) -> None:
    engine = engine_of(**options)
    for ids, (tokens, found) in zip(TEXTS, run(engine, TEXTS, given), strict=True):
        assert tokens == ids[given:]
        np.testing.assert_allclose(found, logprobs(engine, ids, given), atol=2e-5)


def test_a_step_feeds_one_token_of_each_text(engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plans = engine_of(expert_memory="100%"), []
    dispatch = engine.loop.dispatcher.dispatch
    monkeypatch.setattr(engine.loop.dispatcher, "dispatch", lambda plan: plans.append(plan) or dispatch(plan))
    run(engine, TEXTS, 1)
    assert all(plan.num_tokens == len(plan.sequences) for plan in plans)
    assert sum(plan.num_tokens for plan in plans) == sum(len(ids) - 1 for ids in TEXTS)
    assert any(len(plan.decodes) == len(TEXTS) for plan in plans)


def test_steps_overlap_although_tokens_are_forced(engine_of: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(expert_memory="100%")
    deepest, collect = 0, engine.loop._collect

    def counted() -> Any:
        nonlocal deepest
        deepest = max(deepest, len(engine.loop.in_flight))
        return collect()

    monkeypatch.setattr(engine.loop, "_collect", counted)
    run(engine, TEXTS, 1)
    assert deepest == 2


def test_forced_and_free_answers_side_by_side(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="100%")
    free = SamplingParams(max_tokens=6, temperature=0)
    alone = engine.generate([[4, 4]], free)[0].token_ids
    engine.add_request("free", [4, 4], free)
    engine.add_request("forced", TEXTS[0][:1], dataclasses.replace(forced(TEXTS[0]), temperature=0.7))
    while engine.has_work():
        engine.step()
    assert engine.pop("free").token_ids == alone
    assert engine.pop("forced").token_ids == TEXTS[0][1:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": "x"}, "forced_token_ids say the whole answer; stop would end or change it"),
        ({"stop_token_ids": (3,)}, "forced_token_ids say the whole answer; stop_token_ids would end or change it"),
        ({"forced_token_ids": (1, -1)}, "forced_token_ids is -1"),
    ],
)
def test_what_contradicts_a_forced_answer(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**{"forced_token_ids": (1, 2), **fields})


def test_tokens_outside_the_vocabulary(engine_of: EngineFactory) -> None:
    with pytest.raises(RequestError, match="forced_token_ids names token 61; the vocabulary has 61"):
        engine_of(expert_memory="100%").generate([[1]], SamplingParams(forced_token_ids=(2, 61)))


def test_the_weight_of_what_was_substituted(engine_of: EngineFactory) -> None:
    all_there, few = engine_of(expert_memory="100%"), engine_of(expert_memory="2 slots")
    assert all_there.generate([TEXTS[0]], SamplingParams(max_tokens=4))[0].substituted_weight == 0
    before = few.state()["tasks"]
    output = few.generate([TEXTS[0]], SamplingParams(max_tokens=4, temperature=0), task="weighed")[0]
    booked = few.state()["tasks"]["weighed"]
    assert "weighed" not in before
    assert output.substituted == pytest.approx(booked["substituted"], abs=1e-6)
    assert output.substituted_weight == pytest.approx(booked["substituted_weight"], abs=1e-6)
    assert 0 < output.substituted_weight < 1
