"""Reading, checking and counting routing traces."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from emoe_jax.traces import RoutingTrace, TraceError
from tests.traces.synthetic import make_trace

F, P = "further_experts", "further_probs"
REAL = Path("../shared/data/gptoss20b_routing/train.npz")


@pytest.fixture
def trace() -> RoutingTrace:
    return make_trace(prompts=5, tokens=7)


def arrays_of(trace: RoutingTrace, tmp_path: Path) -> dict[str, np.ndarray]:
    trace.save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as archive:
        return dict(archive)


def test_a_saved_trace_loads_as_it_was(trace, tmp_path):
    trace.save(tmp_path / "trace.npz")
    loaded = RoutingTrace.load(tmp_path / "trace.npz")
    for field in dataclasses.fields(RoutingTrace):
        if field.name != "source":
            np.testing.assert_array_equal(getattr(loaded, field.name), getattr(trace, field.name))
    assert (loaded.num_prompts, loaded.num_layers, loaded.num_experts, loaded.top_k) == (5, 3, 8, 2)


def test_counts_are_the_choices_of_each_prompt(trace):
    counts = trace.counts()
    assert counts.shape == (5, 3, 8)
    assert (counts.sum(-1) == 7 * 2).all()
    chosen = trace.experts[trace.sample == 2][:, 1]
    np.testing.assert_array_equal(counts[2, 1], np.bincount(chosen.ravel(), minlength=8))


def test_first_tokens_are_those_of_lowest_position_however_tokens_are_ordered(trace):
    order = np.random.default_rng(0).permutation(trace.num_tokens)
    fields = {name: getattr(trace, name)[order] for name in ("experts", "probs", "sample", "token_pos")}
    mixed = dataclasses.replace(trace, **fields)
    np.testing.assert_array_equal(mixed.counts(first=3), trace.counts(first=3))
    assert (trace.counts(first=3).sum(-1) == 3 * 2).all()
    np.testing.assert_array_equal(trace.counts(first=100), trace.counts())


def test_first_tokens_of_an_engines_trace_are_those_of_the_answer(trace, tmp_path):
    """Positions 0 to 6 of each prompt are recorded; the answers begin at 0, 2, 5, 7 (none) and 6."""
    recorded = dataclasses.replace(trace, prompt_length=np.array([0, 2, 5, 7, 6], np.int32))
    counts = recorded.counts(first=3)
    assert (counts.sum(-1) == 2 * np.array([3, 3, 2, 0, 1])[:, None]).all()
    of_answer = trace.experts[(trace.sample == 1) & (trace.token_pos >= 2) & (trace.token_pos < 5)][:, 0]
    np.testing.assert_array_equal(counts[1, 0], np.bincount(of_answer.ravel(), minlength=8))
    np.testing.assert_array_equal(recorded.counts(), trace.counts())
    np.testing.assert_array_equal(recorded.select([2, 1]).counts(first=3), counts[[2, 1]])
    recorded.save(tmp_path / "recorded.npz")
    np.testing.assert_array_equal(RoutingTrace.load(tmp_path / "recorded.npz").counts(first=3), counts)


@pytest.mark.parametrize(
    ("lengths", "message"), [([1, 2], "prompt_length has 2 entries for 5 prompts"), ([1, 1, 1, 1, -1], "is -1")]
)
def test_prompt_lengths_are_checked(trace, lengths, message):
    with pytest.raises(TraceError, match=message):
        dataclasses.replace(trace, prompt_length=np.array(lengths)).validate()


def test_selecting_renumbers_prompts_in_the_order_given(trace):
    part = trace.select([3, 1])
    np.testing.assert_array_equal(part.counts(), trace.counts()[[3, 1]])
    assert part.tasks == [trace.tasks[3], trace.tasks[1]]
    assert part.prompt_embedding is not None
    assert trace.prompt_embedding is not None
    np.testing.assert_array_equal(part.prompt_embedding, trace.prompt_embedding[[3, 1]])
    part.validate()


@pytest.mark.parametrize("prompts", [[], [5], [-1], [1, 1]])
def test_selecting_what_is_not_there_is_refused(trace, prompts):
    with pytest.raises(TraceError):
        trace.select(prompts)


def test_a_prompt_without_tokens_counts_nothing(trace):
    kept = trace.sample != 4
    fields = {name: getattr(trace, name)[kept] for name in ("experts", "probs", "sample", "token_pos")}
    shorter = dataclasses.replace(trace, **fields)
    shorter.validate()
    assert shorter.counts()[4].sum() == 0


CHANGES = {
    "experts reach 8": ("experts", lambda a: np.where(a == 0, 8, a).astype(np.uint8)),
    "experts has dtype float32": ("experts", lambda a: a.astype(np.float32)),
    "experts has dtype int32": ("experts", lambda a: a.astype(np.int32)),
    "experts has 2 dimensions": ("experts", lambda a: a[:, 0]),
    "same expert twice": ("experts", lambda a: np.repeat(a[..., :1], 2, axis=-1)),
    "experts has 34 tokens": ("experts", lambda a: a[:-1]),
    "probs has shape": ("probs", lambda a: a[:, :1]),
    "probs holds values that are not finite": ("probs", lambda a: a * np.float16("nan")),
    "probs has dtype float64": ("probs", lambda a: a.astype(np.float64)),
    "sample reaches from 0 to 5": ("sample", lambda a: np.where(a == 4, 5, a).astype(np.int32)),
    "sample reaches from -1": ("sample", lambda a: a - 1),
    "sample has dtype float64": ("sample", lambda a: a.astype(np.float64)),
    "token_pos is -1": ("token_pos", lambda a: a - 1),
    "task reaches from": ("task", lambda a: a + np.int16(2)),
    "task_names is empty": ("task_names", lambda a: a[:0]),
    "task_names is empty or holds an empty name": ("task_names", lambda a: np.array(["a", " ", "b"])),
    "task_names holds a name twice": ("task_names", lambda a: np.array(["a", "a", "b"])),
    "task_names has dtype int64": ("task_names", lambda a: np.arange(3)),
    "0 tokens of": ("sample", None),
    "prompt_embedding has 4 rows": ("prompt_embedding", lambda a: a[:-1]),
    "prompt_embedding is empty or holds": ("prompt_embedding", lambda a: a * np.float16("inf")),
    "top_k is 3": ("top_k", lambda a: np.int32(3)),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_the_format_does_not_allow_is_one_clear_line(trace, tmp_path, message):
    arrays = arrays_of(trace, tmp_path)
    name, change = CHANGES[message]
    if change is None:
        for tokens in ("experts", "probs", "sample", "token_pos"):
            arrays[tokens] = arrays[tokens][:0]
    else:
        arrays[name] = np.asarray(change(arrays[name]))
    np.savez(tmp_path / "bad.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TraceError, match=message) as caught:
        RoutingTrace.load(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


def with_further(trace: RoutingTrace, ranks: int) -> RoutingTrace:
    """The trace with the experts that no token chose behind those that it chose, in order of their numbers."""
    chosen = (trace.experts[..., None] == np.arange(8)).any(2)
    further = np.argsort(chosen, axis=-1, kind="stable")[..., : ranks - 2].astype(np.uint8)
    return dataclasses.replace(trace, further_experts=further, further_probs=np.full(further.shape, 0.1, np.float16))


def test_further_ranks_are_there_for_those_who_ask(trace, tmp_path):
    """Whoever reads the choices alone gets what a trace without further ranks gives."""
    more = with_further(trace, 6)
    more.save(tmp_path / "more.npz")
    loaded = RoutingTrace.load(tmp_path / "more.npz")
    assert (loaded.top_k, loaded.ranks, trace.ranks) == (2, 6, 2)
    np.testing.assert_array_equal(loaded.further_experts, more.further_experts)
    np.testing.assert_array_equal(loaded.counts(), trace.counts())
    part, chosen = loaded.select([3, 1]), trace.select([3, 1])
    np.testing.assert_array_equal(part.further_experts, with_further(chosen, 6).further_experts)
    assert with_further(trace, 8).ranks == 8
    with_further(trace, 8).validate()


FURTHER = {
    "experts twice": ("names the same expert twice", lambda t: {F: t.experts}),
    "beyond": ("further_experts reach 9", lambda t: {F: t.further_experts // 8 + np.array([8, 9], np.uint8)}),
    "none": ("2 ranks of 8 experts are told", lambda t: {n: getattr(t, n)[..., :0] for n in (F, P)}),
    "one": ("one of them is missing", lambda t: {P: None}),
    "the other": ("one of them is missing", lambda t: {F: None}),
    "shapes": ("further_experts has shape", lambda t: {P: t.further_probs[..., :1]}),
    "tokens": ("further_experts has shape", lambda t: {F: t.further_experts[1:], P: t.further_probs[1:]}),
    "nan": ("probs holds values that are not finite", lambda t: {P: t.further_probs * np.float16("nan")}),
}


@pytest.mark.parametrize("case", FURTHER)
def test_further_ranks_are_checked(trace, case):
    message, change = FURTHER[case]
    more = with_further(trace, 4)
    spoilt = dataclasses.replace(more, **change(more))
    with pytest.raises(TraceError, match=message):
        spoilt.validate()


def test_missing_files_and_arrays_are_named(trace, tmp_path):
    with pytest.raises(TraceError, match="no such trace file"):
        RoutingTrace.load(tmp_path / "none.npz")
    arrays = arrays_of(trace, tmp_path)
    del arrays["sample"], arrays["probs"]
    np.savez(tmp_path / "bad.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TraceError, match="has no probs, sample"):
        RoutingTrace.load(tmp_path / "bad.npz")
    np.save(tmp_path / "single.npy", np.arange(3))
    with pytest.raises(TraceError, match=r"no \.npz file"):
        RoutingTrace.load(tmp_path / "single.npy")


def test_truncated_and_corrupt_files_are_refused_at_any_length(trace, tmp_path):
    trace.save(tmp_path / "good.npz")
    whole = (tmp_path / "good.npz").read_bytes()
    for share in (0.0, 0.01, 0.3, 0.7, 0.99):
        (tmp_path / "bad.npz").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(TraceError) as caught:
            RoutingTrace.load(tmp_path / "bad.npz")
        assert "\n" not in str(caught.value)
    corrupt = bytearray(whole)
    corrupt[len(whole) // 3 : len(whole) // 3 + 40] = bytes(40)
    (tmp_path / "bad.npz").write_bytes(bytes(corrupt))
    with pytest.raises(TraceError):
        RoutingTrace.load(tmp_path / "bad.npz")


def test_pickles_are_never_loaded(trace, tmp_path):
    arrays = arrays_of(trace, tmp_path)
    arrays["task_names"] = np.array(["a", None, "b"], dtype=object)
    np.savez(tmp_path / "bad.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TraceError, match="task_names is damaged"):
        RoutingTrace.load(tmp_path / "bad.npz")


@pytest.mark.skipif(not REAL.exists(), reason="the trace of a real model is not here")
def test_the_trace_of_a_real_model_loads():
    trace = RoutingTrace.load(REAL)
    assert (trace.num_prompts, trace.num_layers, trace.num_experts, trace.top_k) == (528, 24, 32, 4)
    assert trace.counts().sum() == trace.num_tokens * 24 * 4
