import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.device.sampler import SamplingArrays, kept, sample, seed_words
from emoe_jax.requests.request import MAX_LOGPROBS, SamplingParams
from emoe_jax.requests.sequence import Sequence
from tests.lowering import export_for_cuda

jitted = jax.jit(sample, static_argnames="num_top")
kept_jitted = jax.jit(kept)
YES, NO = np.asarray(True), np.asarray(False)
SHAPE = (8, 100)  # most tests share it: compiling is what they would spend their time on


def rows(*params: SamplingParams, seeds: list[int] | None = None, size: int | None = None) -> SamplingArrays:
    seeds = seeds if seeds is not None else list(range(len(params)))
    sequences = [Sequence(str(i), [1], p, seed=seed) for i, (p, seed) in enumerate(zip(params, seeds, strict=True))]
    return SamplingArrays.of(sequences, len(sequences) if size is None else size)


def many(params: SamplingParams, count: int) -> SamplingArrays:
    return rows(*[params] * count, seeds=list(range(count)))


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
    out = jitted(logits, many(SamplingParams(temperature=0), 8), NO)
    assert out.tokens.dtype == jnp.int32
    np.testing.assert_array_equal(out.tokens, np.argmax(logits, axis=-1))
    assert not out.logprob.any()
    assert not out.top_ids.any()


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6, 1e-5, 1e-3])
def test_tiny_temperatures_choose_the_best(temperature: float):
    logits = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    out = jitted(logits, many(SamplingParams(temperature=temperature), 8), NO)
    np.testing.assert_array_equal(out.tokens, np.argmax(logits, axis=-1))


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-6), SamplingParams(min_p=1.0)])
def test_the_strictest_filters_are_greedy(params: SamplingParams):
    logits = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    out = jitted(logits, many(params, 8), NO)
    np.testing.assert_array_equal(out.tokens, np.argmax(logits, axis=-1))


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
    np.testing.assert_array_equal(jitted(logits, arrays, NO).tokens, np.argmax(logits, axis=-1))


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
    temperature = np.array([p.temperature for p in chosen], np.float32)
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]
    sampling = rows(*chosen)
    keep = np.asarray(kept_jitted(scaled, sampling.top_k, sampling.top_p, sampling.min_p))
    for row, p in enumerate(chosen):
        if not is_ambiguous(logits[row], p):
            np.testing.assert_array_equal(keep[row], reference_probs(logits[row], p) > 0, err_msg=repr(p))


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
    tokens = np.asarray(jitted(np.tile(logits, (count, 1)), many(params, count), NO).tokens)
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
    by_step = np.asarray(jitted(logits, SamplingArrays.of(sequences, count), NO).tokens)
    sequences = [Sequence("a", [1], SamplingParams(), seed=5, index=index) for index in range(count)]
    by_index = np.asarray(jitted(logits, SamplingArrays.of(sequences, count), NO).tokens)
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
    together = np.asarray(jitted(logits, rows(*params, seeds=seeds), YES).tokens)
    order = rng.permutation(8)
    shuffled = rows(*[params[i] for i in order], seeds=[seeds[i] for i in order])
    np.testing.assert_array_equal(jitted(logits[order], shuffled, NO).tokens, together[order])
    for i in range(8):
        alone = jitted(logits[i : i + 1], rows(params[i], seeds=seeds[i : i + 1]), NO)
        padded = jitted(
            np.concatenate([logits[i : i + 1], np.zeros((3, V), np.float32)]),
            rows(params[i], seeds=seeds[i : i + 1], size=4),
            NO,
        )
        assert alone.tokens[0] == padded.tokens[0] == together[i]


def test_logprobs_are_of_the_raw_distribution():
    logits = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32) * 3
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0.3, top_k=3), SamplingParams(temperature=2)]
    sampling = rows(*params, size=8)
    out = jitted(logits, sampling, YES)
    expected = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    np.testing.assert_allclose(out.logprob, expected[np.arange(8), out.tokens], atol=1e-5)
    assert out.top_ids.shape == out.top_logprobs.shape == (8, MAX_LOGPROBS)
    np.testing.assert_array_equal(out.top_ids, np.argsort(-logits, kind="stable", axis=-1)[:, :MAX_LOGPROBS])
    np.testing.assert_allclose(out.top_logprobs, -np.sort(-expected, axis=-1)[:, :MAX_LOGPROBS], atol=1e-5)
    assert out.logprob[0] == out.top_logprobs[0, 0]


def test_a_vocabulary_smaller_than_the_alternatives():
    out = jitted(np.zeros((2, 5), np.float32), many(SamplingParams(top_k=100), 2), YES)
    assert out.top_ids.shape == (2, 5)
    assert np.all(np.asarray(out.tokens) < 5)


def test_one_compilation_serves_all_parameters():
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return sample(*args)

    function = jax.jit(counted)
    logits = np.random.default_rng(6).normal(size=(2, 40)).astype(np.float32)
    for params in (
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=3, min_p=0.2),
    ):
        for want in (YES, NO):
            function(logits, many(params, 2), want)
    assert traces == 1


def test_host_arrays():
    sequence = Sequence("a", [1, 2], SamplingParams(temperature=0.5, top_p=0.9, top_k=4, min_p=0.1), seed=-1, index=2)
    sequence.generated += [5, 6, 7]
    sampling = SamplingArrays.of([sequence], 3)
    np.testing.assert_array_equal(sampling.temperature, np.array([0.5, 0, 0], np.float32))
    np.testing.assert_array_equal(sampling.step, [3, 0, 0])
    np.testing.assert_array_equal(sampling.seed[0], [1, 0xFFFFFFFF])
    assert seed_words(2**32 + 5, 0) == (1, 5)
    assert len(jax.tree.leaves(sampling)) == 6
    with pytest.raises(ValueError, match="2 sequences do not fit a batch of 1"):
        SamplingArrays.of([sequence, sequence], 1)


def test_lowers_for_cuda():
    B, V = 4, 32000
    exported = export_for_cuda(
        jax.jit(sample), jax.ShapeDtypeStruct((B, V), jnp.float32), SamplingArrays.of([], B), YES
    )
    assert exported.platforms == ("cuda",)
