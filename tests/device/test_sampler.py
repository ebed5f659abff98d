import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jaxtyping import Array, Float, Int32

from emoe_jax.device import step
from emoe_jax.device.sampler import (
    FILTERS,
    Choice,
    SamplingArrays,
    most_probable,
    sample,
    seed_words,
    token_logprobs,
)
from emoe_jax.requests.request import MAX_LOGPROBS, SamplingParams
from emoe_jax.requests.sequence import Sequence
from tests.lowering import Counts, export_for_cuda

SHAPE = (8, 100)  # most tests share it: compiling is what they would spend their time on
ALL = Choice(random=True, top_k=True, top_p=True)
"""What covers every row."""


@partial(jax.jit, static_argnames="choice")
def jitted(logits: Float[Array, "B V"], sampling: SamplingArrays, choice: Choice) -> Int32[Array, " B"]:
    if not choice.random:
        return most_probable(logits)
    return sample(filtered(logits, sampling, choice), sampling)


@partial(jax.jit, static_argnames="choice")
def filtered(logits: Float[Array, "B V"], sampling: SamplingArrays, choice: Choice) -> Float[Array, "B V"]:
    for by in choice.filters:
        logits = FILTERS[by](logits, sampling)
    return logits


def arrays_of(sequences: list[Sequence], size: int) -> SamplingArrays:
    return SamplingArrays(**SamplingArrays.packing(size).views(SamplingArrays.pack(sequences, size)))


def sequences_of(*params: SamplingParams, seeds: list[int] | None = None) -> list[Sequence]:
    seeds = seeds if seeds is not None else list(range(len(params)))
    return [Sequence(str(i), [1], p, seed=seed) for i, (p, seed) in enumerate(zip(params, seeds, strict=True))]


def rows(*params: SamplingParams, seeds: list[int] | None = None, size: int | None = None) -> SamplingArrays:
    return arrays_of(sequences_of(*params, seeds=seeds), len(params) if size is None else size)


def many(params: SamplingParams, count: int) -> SamplingArrays:
    return rows(*[params] * count, seeds=list(range(count)))


def least(*params: SamplingParams) -> Choice:
    return Choice.of(sequences_of(*params))


def reference_probs(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """One row, float64, by sorting: the plain reading of the filters' definitions."""
    scaled = logits.astype(np.float64) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    if 0 < params.top_k < len(probs):
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    if params.top_p < 1:
        reached_before = np.cumsum(probs[order]) - probs[order]
        probs[order[reached_before >= params.top_p]] = 0
        probs /= probs.sum()
    probs[probs < params.min_p * probs.max()] = 0
    return probs / probs.sum()


def is_ambiguous(logits: np.ndarray, params: SamplingParams) -> bool:
    """Whether rounding to float32 may decide where top-p or min-p cuts."""
    no_cut = SamplingParams(temperature=params.temperature, top_k=params.top_k)
    probs = np.sort(reference_probs(logits, no_cut))[::-1]
    near_p = np.abs(np.cumsum(probs) - params.top_p).min() < 1e-5 and params.top_p < 1
    near_min = params.min_p > 0 and np.abs(probs / probs.max() - params.min_p).min() < 1e-5
    return bool(near_p or near_min)


def test_greedy_is_argmax():
    logits = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    logits[0, [7, 3, 90]] = 9.0  # of equals the lowest id
    logits[1, :] = 0.0
    logits[2, 10:] = -np.inf
    params = SamplingParams(temperature=0)
    for choice in (least(params), ALL):
        tokens = jitted(logits, many(params, 8), choice)
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6, 1e-5, 1e-3])
def test_tiny_temperatures_choose_the_best(temperature: float):
    logits = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    params = SamplingParams(temperature=temperature)
    np.testing.assert_array_equal(jitted(logits, many(params, 8), least(params)), np.argmax(logits, axis=-1))


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-6), SamplingParams(min_p=1.0)])
def test_the_strictest_filters_are_greedy(params: SamplingParams):
    logits = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    np.testing.assert_array_equal(jitted(logits, many(params, 8), least(params)), np.argmax(logits, axis=-1))


@pytest.mark.parametrize(
    "params",
    [SamplingParams(top_p=0), SamplingParams(top_p=0.0, temperature=100.0, top_k=5), SamplingParams(top_p=-0.0)],
)
@pytest.mark.parametrize("ties", [False, True])
def test_no_probability_at_all_is_greedy(params: SamplingParams, ties: bool):
    """Of equally probable tokens the first, as at temperature 0."""
    logits = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    if ties:
        logits = np.round(np.clip(logits, -1, 1))
    arrays = many(params, 8)
    assert not arrays.temperature.any()  # no row draws, so no filter runs
    assert least(params) == Choice()
    np.testing.assert_array_equal(jitted(logits, arrays, ALL), np.argmax(logits, axis=-1))


filters = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.1, 3),
        "top_k": st.integers(-1, 30),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 1)),
        "min_p": st.one_of(st.just(0.0), st.floats(0, 1)),
    }
)


@given(
    params=st.lists(filters, min_size=8, max_size=8),
    seed=st.integers(0, 2**32 - 1),
    ties=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_filters_equal_the_sorting_reference(params: list[dict], seed: int, ties: bool):
    V = 24
    logits = np.random.default_rng(seed).normal(size=(8, V)).astype(np.float32) * 2
    if ties:
        logits = np.round(logits)
    chosen = [SamplingParams(**p) for p in params]
    keep = np.isfinite(filtered(logits, rows(*chosen), ALL))
    for row, p in enumerate(chosen):
        if not is_ambiguous(logits[row], p):
            expected = reference_probs(logits[row], dataclasses.replace(p, min_p=0)) > 0
            np.testing.assert_array_equal(keep[row], expected, err_msg=repr(p))


@given(
    logits=arrays(np.float32, (8, 24), elements=st.floats(-8, 8, width=32)),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_min_p_draws_no_token_below(logits: np.ndarray, min_p: float, seed: int):
    params = SamplingParams(min_p=min_p)
    tokens = np.asarray(jitted(logits, rows(*[params] * 8, seeds=list(range(seed, seed + 8))), least(params)))
    drawn = np.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0].astype(np.float64)
    assert np.all(np.exp(drawn - logits.max(axis=-1)) >= min_p * (1 - 1e-5))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.3, top_k=8, top_p=0.9, min_p=0.05),
    ],
)
def test_the_distribution_is_right(params: SamplingParams):
    """Chi-square of 8,192 draws with fixed seeds against the reference, with a false alarm in 10,000."""
    count, V = 8192, 12
    logits = np.random.default_rng(3).normal(size=V).astype(np.float32)
    tokens = np.asarray(jitted(np.tile(logits, (count, 1)), many(params, count), least(params)))
    probs = reference_probs(logits, params)
    counts = np.bincount(tokens, minlength=V)
    assert counts[probs == 0].sum() == 0
    support = probs > 0
    chi2 = np.sum((counts[support] - count * probs[support]) ** 2 / (count * probs[support]))
    freedom = support.sum() - 1
    assert freedom > 0
    # Wilson-Hilferty: the cube root of chi2 / freedom is close to normal; 3.72 standard deviations.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < bound


def test_steps_and_completions_draw_independently():
    """The same seed at other steps, and other completions of one request, do not repeat each other."""
    count = SHAPE[0]
    logits = np.zeros(SHAPE, np.float32)
    sequences = [Sequence("a", [1], SamplingParams(), seed=5, generated=[0] * step) for step in range(count)]
    by_step = np.asarray(jitted(logits, arrays_of(sequences, count), Choice(random=True)))
    sequences = [Sequence("a", [1], SamplingParams(), seed=5, index=index) for index in range(count)]
    by_index = np.asarray(jitted(logits, arrays_of(sequences, count), Choice(random=True)))
    assert len(set(by_step)) > 5
    assert len(set(by_index)) > 5
    assert by_step[0] == by_index[0]


def test_a_row_does_not_depend_on_its_batch():
    """Alone, among others, in another place, beside rows that switch every filter on: the same token."""
    V = SHAPE[1]
    rng = np.random.default_rng(4)
    logits = rng.normal(size=SHAPE).astype(np.float32) * 2
    params = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=7),
        SamplingParams(min_p=0.1, temperature=1.5),
        SamplingParams(top_p=0.5, top_k=40, temperature=0.7),
        SamplingParams(temperature=2.0),
        SamplingParams(top_p=0.99),
    ]
    seeds = [int(seed) for seed in rng.integers(-(2**63), 2**63 - 1, 8)]
    together = np.asarray(jitted(logits, rows(*params, seeds=seeds), ALL))
    order = rng.permutation(8)
    shuffled = rows(*[params[i] for i in order], seeds=[seeds[i] for i in order])
    np.testing.assert_array_equal(jitted(logits[order], shuffled, ALL), together[order])
    for i in range(8):
        alone = jitted(logits[i : i + 1], rows(params[i], seeds=seeds[i : i + 1]), least(params[i]))
        among = np.concatenate([logits[i : i + 1], np.zeros((3, V), np.float32)])
        padded = jitted(among, rows(params[i], seeds=seeds[i : i + 1], size=4), least(params[i]))
        assert alone[0] == padded[0] == together[i]


def test_the_choice_covers_all_rows_and_no_more():
    greedy, plain = SamplingParams(temperature=0, top_k=5, top_p=0.5), SamplingParams(min_p=0.1)
    assert least(greedy) == Choice()
    assert least(greedy, plain) == Choice(random=True)
    assert least(plain, SamplingParams(top_k=3)) == Choice(random=True, top_k=True)
    assert least(SamplingParams(top_k=3), SamplingParams(top_p=0.5)) == ALL == Choice(True, True, True)
    assert [least(params).filters for params in (greedy, plain)] == [[], []]
    assert ALL.filters == ["top_k", "top_p"]


def test_logprobs_are_of_the_raw_distribution():
    logits = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32) * 3
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0.3, top_k=3), SamplingParams(temperature=2)]
    tokens = jitted(logits, rows(*params, size=8), ALL)
    out = jax.jit(token_logprobs)(logits, tokens)
    expected = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    np.testing.assert_allclose(out.logprob, expected[np.arange(8), tokens], atol=1e-5)
    assert out.top_ids.shape == out.top_logprobs.shape == (8, MAX_LOGPROBS)
    np.testing.assert_array_equal(out.top_ids, np.argsort(-logits, kind="stable", axis=-1)[:, :MAX_LOGPROBS])
    np.testing.assert_allclose(out.top_logprobs, -np.sort(-expected, axis=-1)[:, :MAX_LOGPROBS], atol=1e-5)
    assert out.logprob[0] == out.top_logprobs[0, 0]


def test_a_vocabulary_smaller_than_the_alternatives():
    logits, params = np.zeros((2, 5), np.float32), SamplingParams(top_k=100)
    tokens = jitted(logits, many(params, 2), least(params))
    assert token_logprobs(jnp.asarray(logits), tokens).top_ids.shape == (2, 5)
    assert np.all(np.asarray(tokens) < 5)


def test_host_arrays():
    sequence = Sequence("a", [1, 2], SamplingParams(temperature=0.5, top_p=0.9, top_k=4, min_p=0.1), seed=-1, index=2)
    sequence.generated += [5, 6, 7]
    sampling = arrays_of([sequence], 3)
    np.testing.assert_array_equal(sampling.temperature, np.array([0.5, 0, 0], np.float32))
    np.testing.assert_array_equal(sampling.step, [3, 0, 0])
    np.testing.assert_array_equal(sampling.seed[0], [1, 0xFFFFFFFF])
    assert seed_words(2**32 + 5, 0) == (1, 5)
    with pytest.raises(ValueError, match="2 sequences do not fit a batch of 1"):
        SamplingArrays.pack([sequence, sequence], 1)


def test_nothing_stalls_a_gpu():
    B, V = 4, 32000
    logits, sampling = jax.ShapeDtypeStruct((B, V), jnp.float32), SamplingArrays.pack([], B)
    for by in FILTERS:
        assert Counts.of(export_for_cuda(step.filter_logits, logits, sampling, by=by)).stalls == 0
    for random in (False, True):
        arguments = logits, sampling, np.zeros(B, np.int32), np.zeros(8, np.int32)
        assert Counts.of(export_for_cuda(step.choose_tokens, *arguments, random=random)).stalls == 0


def test_the_best_of_a_row_of_nan_is_a_token():
    assert int(most_probable(jnp.full((1, 7), jnp.nan))[0]) == 6
