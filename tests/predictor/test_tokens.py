"""What prompts' tokens say: told by token and by run, left-out prompts left out, kept in a file, asked for by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from emoe_jax.predictor import Predictor, PredictorConfig, PredictorError, Prompts, network
from emoe_jax.predictor.inputs import History
from emoe_jax.predictor.prompts import frequencies
from emoe_jax.predictor.token_prior import TokenPrior
from emoe_jax.predictor.tokens import MAX_TOKEN, TokenTable, run_keys
from emoe_jax.traces import RoutingTrace
from train.predictor import __main__ as command
from train.predictor.coverage import coverage_at
from train.predictor.examples import closed_forms

M, E, TOP_K, WORDS, ANSWER = 3, 16, 2, 40, 3
MANY = 10**6  # runs of tokens
CONFIG = PredictorConfig(M, E, TOP_K, members=1, width=8, heads=2, blocks=1)


def told_by_tokens(prompts: int, seed: int, by_pairs: bool = False) -> RoutingTrace:
    """A prompt token's experts follow from the token, or from it and the one before; an answer's are chance.

    No two prompts hold the same mixture of tokens, and nothing else tells prompts apart.
    """
    fixed = np.random.default_rng(5)
    of_token = fixed.random((WORDS, WORDS if by_pairs else 1, M, E)).argsort(-1)[..., :TOP_K]
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 30, prompts)
    tokens, experts = [], []
    for length in lengths:
        ids = rng.choice(WORDS, length, p=rng.dirichlet(np.full(WORDS, 0.1)))
        before = np.concatenate([[0], ids[:-1]]) * by_pairs
        tokens.append(ids)
        experts += [of_token[ids, before], rng.random((ANSWER, M, E)).argsort(-1)[..., :TOP_K]]
    sample = np.repeat(np.arange(prompts, dtype=np.int32), lengths + ANSWER)
    return RoutingTrace(
        experts=np.concatenate(experts).astype(np.uint8),
        probs=np.full((len(sample), M, TOP_K), 1 / TOP_K, np.float16),
        sample=sample,
        token_pos=np.concatenate([np.arange(length + ANSWER, dtype=np.int32) for length in lengths]),
        task=np.zeros(prompts, np.int16),
        task_names=("any",),
        num_experts=E,
        prompt_length=lengths.astype(np.int32),
        prompt_tokens=np.concatenate(tokens).astype(np.int32),
    )


def learned(trace: RoutingTrace) -> Predictor:
    prompts = Prompts.of(trace, CONFIG.first_tokens)
    return closed_forms(prompts, np.arange(len(prompts)), CONFIG, trace)[0]


@pytest.mark.parametrize("by_pairs", [False, True])
def test_tokens_tell_prompts_apart_that_nothing_else_does(by_pairs: bool) -> None:
    trace, later = (told_by_tokens(prompts, seed, by_pairs) for prompts, seed in ((300, 0), (60, 1)))
    predictor, asked = learned(trace), Prompts.of(later, CONFIG.first_tokens)
    prior = predictor.prior(with_first=False).predict(asked)
    for with_first in (False, True):
        read = predictor.by_tokens(asked, prior, with_first)
        np.testing.assert_allclose(read.sum(-1), 1, rtol=1e-5)
        best = coverage_at(frequencies(asked.counts), asked.counts, 0.25)
        blind, seen = (coverage_at(of, asked.counts, 0.25) for of in (prior, read))
        assert seen > blind + (0.6 if by_pairs else 0.8) * (best - blind)


def test_prompts_are_left_out_of_what_is_said_of_them() -> None:
    """A prompt learned from is expected to be as one that was not, so that what corrects the table can be learned."""
    trace = told_by_tokens(80, 0, by_pairs=True)
    others = np.arange(80) != 7
    _, said = TokenTable.learn(trace, np.arange(80), MANY)
    _, without = TokenTable.learn(trace, np.flatnonzero(others), MANY)
    # Directions are those of all prompts, and so nearly the same.
    np.testing.assert_allclose(said[7], without[7], atol=0.02)
    assert np.abs(said[7] - said[8]).max() > 0.05


def test_runs_that_occur_too_rarely_are_left_out_where_a_table_would_be_too_large() -> None:
    trace = told_by_tokens(200, 0)
    whole, _ = TokenTable.learn(trace, np.arange(200), MANY)
    small, said = TokenTable.learn(trace, np.arange(200), 25)
    sizes = [[len(table.arrays()[f"keys{n}"]) for n in (1, 2, 3)] for table in (whole, small)]
    assert sizes[0][0] == WORDS
    assert max(sizes[1]) <= 25 < min(sizes[0])
    asked = trace.tokens_by_prompt()
    np.testing.assert_allclose(small.shares(asked).sum(-1), 1, rtol=1e-5)
    assert np.abs(small.shares(asked) - said).mean() < 0.02


def test_a_directory_from_before_tokens_were_read_still_loads(tmp_path: Path) -> None:
    trace = told_by_tokens(40, 0)
    config = PredictorConfig(M, E, TOP_K, members=0)
    predictor, _ = closed_forms(Prompts.of(trace, 16), np.arange(40), config)
    predictor.weights = network.init(predictor.config, predictor.sizes, 0)
    predictor.save(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: value for name, value in values.items() if "token" not in name or "first" in name})
    )
    assert not Predictor.load(tmp_path).reads_tokens


def test_a_run_has_a_number_of_its_own() -> None:
    tokens = np.array([3, 1, 3, 1, 3, MAX_TOKEN, MAX_TOKEN + 5])
    assert [len(set(run_keys(tokens, length).tolist())) for length in (1, 2, 3)] == [3, 5, 6]
    keys = run_keys(tokens, 2)
    assert (keys[1], keys[2]) == (keys[3], keys[4])  # 1 after 3, and 3 after 1, which is not 3 after nothing
    assert keys[0] != keys[2]
    assert (run_keys(tokens, 3) > 0).all()
    assert run_keys(np.zeros(0, int), 3).shape == (0,)
    assert run_keys(np.array([4]), 3).shape == (1,)


def test_a_predictor_that_reads_tokens_survives_a_file(tmp_path) -> None:
    trace = told_by_tokens(60, 0)
    predictor = learned(trace)
    predictor.config = PredictorConfig(M, E, TOP_K, members=0)
    predictor.weights = network.init(predictor.config, predictor.sizes, 0)
    predictor.save(tmp_path)
    loaded = Predictor.load(tmp_path)
    assert (loaded.reads_tokens, loaded.num_parameters) == (True, 0)
    ids = trace.tokens_by_prompt()
    one, other = (each.predict_next([("any", None)] * 3, 4, ids[:3]) for each in (predictor, loaded))
    np.testing.assert_allclose(one, other, atol=2e-3)
    assert np.abs(one[0] - one[1]).max() > 0.02
    np.testing.assert_allclose(loaded.predict("any", tokens=ids[1].tolist()), other[1], atol=1e-5)
    unread = loaded.predict("any")
    asked = Prompts.of(trace, CONFIG.first_tokens).take([0])
    np.testing.assert_allclose(unread, loaded.prior(with_first=False).predict(asked)[0], atol=1e-6)
    np.testing.assert_allclose(loaded.predict_next([("any", None)], 4), unread[None], atol=1e-6)


def test_damaged_files_are_one_line(tmp_path) -> None:
    predictor = learned(told_by_tokens(60, 0))
    assert predictor.tokens is not None
    path = tmp_path / "tokens.npz"
    predictor.tokens.save(path)
    good = path.read_bytes()
    with np.load(path) as archive:
        arrays = dict(archive)
    other = PredictorConfig(M, E // 2, TOP_K)
    with pytest.raises(PredictorError, match=r"is of routing \[3, 16\], it should be \[3, 8\]"):
        TokenPrior.load(path, other)
    path.write_bytes(good[:500])
    with pytest.raises(PredictorError, match="is damaged"):
        TokenPrior.load(path, CONFIG)
    for name, array in (("keys2", arrays["keys2"][:-1]), ("rests", arrays["rests"][:, :-1])):
        np.savez(path, **{**arrays, name: array})
        with pytest.raises(PredictorError, match="belong together"):
            TokenPrior.load(path, CONFIG)
    path.unlink()
    with pytest.raises(PredictorError, match=r"tokens\.npz is missing"):
        TokenPrior.load(path, CONFIG)


def test_training_on_a_trace_with_tokens_reads_them_and_shuffled_labels_do_not(tmp_path) -> None:
    told_by_tokens(120, 0).save(tmp_path / "trace.npz")
    common = ["--traces", str(tmp_path / "trace.npz"), "--steps", "2", "--width", "8", "--members", "1"]
    command.main([*common, "--out", str(tmp_path / "out")])
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = numbers["baselines"]
    assert numbers["coverage"]["0.25"] > rows["prior_alone"]["0.25"] + 0.05
    assert rows["closed_forms"]["0.25"] > rows["prior_alone"]["0.25"] + 0.05
    assert Predictor.load(tmp_path / "out").reads_tokens
    command.main([*common, "--out", str(tmp_path / "dealt"), "--shuffle-labels"])
    assert not Predictor.load(tmp_path / "dealt").reads_tokens
    dealt = json.loads((tmp_path / "dealt" / "metrics.json").read_text())
    assert dealt["coverage"]["0.25"] < rows["prior_alone"]["0.25"] + 0.03


def test_networks_that_do_not_help_are_left_out(tmp_path) -> None:
    """After one step at a rate that moves nothing."""
    told_by_tokens(60, 0).save(tmp_path / "trace.npz")
    argv = ["--traces", str(tmp_path / "trace.npz"), "--out", str(tmp_path / "out"), "--steps", "1", "--rate", "1e-12"]
    command.main([*argv, "--width", "8", "--members", "1"])
    predictor = Predictor.load(tmp_path / "out")
    assert (predictor.config.members, predictor.num_parameters) == (0, 0)
    prompts = Prompts.of(told_by_tokens(9, 3), CONFIG.first_tokens)
    prior = predictor.prior(with_first=False).predict(prompts)
    expected = predictor.by_tokens(prompts, prior, with_first=False)
    asked = predictor.predict_many(prompts, History.of(prompts.counts), with_first=False)
    np.testing.assert_array_equal(asked, expected)


def test_a_prompt_too_long_to_learn_from_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = told_by_tokens(60, 0)
    lengths = np.array([len(ids) for ids in trace.tokens_by_prompt()])
    monkeypatch.setattr("emoe_jax.predictor.tokens.MAX_LEARNED", int(lengths.max()) - 1)
    rows = np.array([int(lengths.argmin()), int(lengths.argmax())])
    table, said = TokenTable.learn(trace, rows, 100)
    alone, _ = TokenTable.learn(trace, rows[:1], 100)
    ids = trace.tokens_by_prompt()
    np.testing.assert_array_equal(table.shares(ids), alone.shares(ids))
    np.testing.assert_array_equal(said[rows[1]], table.shares([ids[rows[1]]])[0])
    with pytest.raises(PredictorError, match="every prompt has more than"):
        TokenTable.learn(trace, rows[1:], 100)
