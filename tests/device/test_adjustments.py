"""Penalties and biases: what they do to logits, and that they follow the tokens of a request."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax import RequestError, SamplingParams
from emoe_jax.device import adjustments, step
from emoe_jax.device.adjustments import ROOMS, TokenEdits, adjustments_of, room_for, usual_rooms
from emoe_jax.device.sampler import most_probable
from emoe_jax.requests.adjustment import LogitAdjustment
from emoe_jax.requests.sequence import Sequence
from tests.engines import EngineFactory

V = 61
PROMPT = [3, 17, 5]


def reference(logits: np.ndarray, params: SamplingParams, prompt: list[int], generated: list[int]) -> np.ndarray:
    """One row, as vLLM documents it."""
    result = logits.astype(np.float64)
    for token in {*prompt, *generated}:
        r = params.repetition_penalty
        result[token] = result[token] / r if result[token] > 0 else result[token] * r
    for token in range(len(result)):
        count = generated.count(token)
        result[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        result[token] += params.logit_bias.get(token, 0.0)
    return result


PENALTIES: list[dict[str, Any]] = [
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5, "frequency_penalty": -0.2, "presence_penalty": 2, "logit_bias": {4: -100, 5: 3.5}},
    {"logit_bias": {60: 100}},
]


@pytest.mark.parametrize("given", PENALTIES)
def test_logits_follow_the_definition(given: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32) * 3
    params, generated = SamplingParams(**given), [5, 9, 5, 5, 30]
    adjustment = LogitAdjustment.of(params, PROMPT, V)
    assert adjustment is not None
    for length in (2, 5):  # token by token, several at a time
        adjustment.update(generated[:length])
        adjustment.update(generated[:length])
    [(edits, room)] = TokenEdits.pack([None, adjustment], 2, V)
    adjusted = np.asarray(step.edit_logits(logits, edits, room=room))
    np.testing.assert_array_equal(adjusted[0], logits[0])
    np.testing.assert_allclose(adjusted[1], reference(logits[1], params, PROMPT, generated), atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, V - 1), max_size=80),
    st.lists(st.integers(0, V - 1), max_size=80),
    st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=70),
    st.sampled_from([1.0, 1.7]),
    st.sampled_from([0.0, 0.5]),
)
def test_every_token_changes_once(
    prompt: list[int], generated: list[int], bias: dict[int, float], repetition: float, frequency: float
) -> None:
    params = SamplingParams(repetition_penalty=repetition, frequency_penalty=frequency, logit_bias=bias)
    adjustment = LogitAdjustment(params, prompt, V)
    adjustment.update(generated)
    tokens, biases, repeated = adjustment.changes
    assert len(set(tokens.tolist())) == len(tokens)
    held_back = {*prompt, *generated} if repetition != 1 else set()
    assert set(tokens[repeated].tolist()) == held_back
    wanted = {token: bias.get(token, 0) - frequency * generated.count(token) for token in range(V)}
    found = dict(zip(tokens.tolist(), biases.tolist(), strict=True))
    assert all(found.get(token, 0) == pytest.approx(value, abs=1e-4) for token, value in wanted.items())


def test_what_is_sent_goes_by_what_changes() -> None:
    """Not by the vocabulary, where that is large."""
    rooms = {1: ROOMS[0], ROOMS[0]: ROOMS[0], ROOMS[0] + 1: ROOMS[1], ROOMS[-1] + 1: ROOMS[-1]}
    assert {count: room_for(count, 2**30) for count in rooms} == rooms
    assert usual_rooms(2**30) == list(ROOMS)
    assert usual_rooms(700) == [512, 700]
    assert usual_rooms(V) == [V]
    for vocab_size in (2000, 200_000):
        adjustment = LogitAdjustment(SamplingParams(repetition_penalty=1.1), PROMPT, vocab_size)
        [(edits, room)] = TokenEdits.pack([adjustment] * 4, 4, vocab_size)
        assert (room, edits.nbytes) == (ROOMS[0], 4 * (3 * ROOMS[0] + 4) + ROOMS[0])


def test_more_changes_than_are_sent_at_once_are_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many prompts as run may be penalised, each with thousands of tokens: no buffer grows with them."""
    monkeypatch.setattr(adjustments, "ROOMS", (4, 16))
    logits = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32)
    params = [SamplingParams(repetition_penalty=2.0), SamplingParams(repetition_penalty=1.5, logit_bias={60: 3.0})]
    prompts = [list(range(30)), list(range(20, 45))]
    rows = [LogitAdjustment(*each, V) for each in zip(params, prompts, strict=True)]
    packed = TokenEdits.pack([rows[0], None, rows[1]], 3, V)
    assert [room for _, room in packed] == [16] * 4  # 30 tokens and 26
    adjusted = logits
    for edits, room in packed:
        adjusted = np.asarray(step.edit_logits(adjusted, edits, room=room))
    expected = [*map(reference, logits[[0, 2]], params, prompts, [[], []])]
    expected.insert(1, logits[1])
    np.testing.assert_allclose(adjusted, expected, atol=1e-5)


def test_neutral_parameters_adjust_nothing() -> None:
    params = SamplingParams(frequency_penalty=0.0, presence_penalty=0, repetition_penalty=1, logit_bias={})
    assert LogitAdjustment.of(params, PROMPT, V) is None
    assert adjustments_of([Sequence("a", PROMPT)], 2, V) is None


def test_log_probabilities_stay_raw() -> None:
    logits = np.random.default_rng(1).normal(size=(1, V)).astype(np.float32)
    params = SamplingParams(temperature=0, logit_bias={7: 100})
    sequence = Sequence("a", PROMPT, params, adjustment=LogitAdjustment.of(params, PROMPT, V))
    found = adjustments_of([sequence], 1, V)
    assert found is not None
    [(edits, room)] = found.edits
    assert found.allowed is None
    tokens = most_probable(step.edit_logits(logits, edits, room=room))
    assert tokens[0] == 7
    chosen = step.chosen_logprobs(logits, tokens)
    raw = jax.nn.log_softmax(logits[0])
    assert float(chosen.logprob[0]) == pytest.approx(float(raw[7]), abs=1e-5)
    assert int(chosen.top_ids[0, 0]) == int(np.argmax(raw))


def test_answers_repeat_less_alone_and_beside_others(engine_of: EngineFactory) -> None:
    engine = engine_of(expert_memory="100%")
    plain = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    once = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, logit_bias={9: -100}, presence_penalty=2)
    once = SamplingParams(**{**vars(once), "repetition_penalty": 100})
    expected = engine.generate(PROMPT, plain)[0].token_ids
    alone = engine.generate(PROMPT, once)[0].token_ids
    assert len(set(expected)) < 30
    assert len({*alone, *PROMPT}) > len({*expected, *PROMPT})
    assert 9 not in alone
    engine.add_request("plain", PROMPT, plain)
    engine.add_request("once", PROMPT, once)
    while engine.has_work():
        engine.step()
    assert engine.pop("plain").token_ids == expected
    assert engine.pop("once").token_ids == alone


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(2000), 1)}, "logit_bias"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_absurd_values_are_refused(given: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**given)
    assert error.value.param == param


@pytest.mark.parametrize("given", [{"logit_bias": {61: 1}}, {"stop_token_ids": [60, 61]}])
def test_tokens_beyond_the_vocabulary_are_refused(engine_of: EngineFactory, given: dict[str, Any]) -> None:
    (param,) = given
    with pytest.raises(RequestError, match=f"{param} names token 61; the vocabulary has 61") as error:
        engine_of(expert_memory="100%").add_request("a", PROMPT, SamplingParams(**given))
    assert error.value.param == param
