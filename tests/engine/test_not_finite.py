"""A request for which the model computes NaN ends with `error`, and no other request can tell."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import Engine, RequestError, SamplingParams
from emoe_jax.models import save_checkpoint
from emoe_jax.models.decoder import Decoder
from emoe_jax.requests.request import RequestOutput
from emoe_jax.traces import RoutingTrace
from tests.engines import RESIDENT, TINY, random_model

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
LOST = 59
"""The token whose embedding is NaN."""
RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(0, 50, size=length).tolist() for length in (3, 40, 17, 33)]
SPOILT = [  # the token at the beginning, in the middle, at the end; within a chunk of 32 and in the second one
    [LOST, *PROMPTS[1]],
    [*PROMPTS[1][:20], LOST, *PROMPTS[1][20:]],
    [*PROMPTS[1], LOST],
    [LOST],
]

Edit = Callable[[Decoder], None]


def checkpoint(directory: Path, edit: Edit | None = None, **options: Any) -> Path:
    raw = TINY | options
    model, experts = random_model(raw)
    if edit is not None:
        edit(model)
    save_checkpoint(directory, raw, nnx.state(model), experts)
    return directory


def lose_embedding(token: int) -> Edit:
    def edit(model: Decoder) -> None:
        model.embedding[...] = model.embedding[...].at[token].set(jnp.nan)

    return edit


def load(path: Path, **options) -> Engine:
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "policy": "static", "expert_memory": "3 slots"}
    return Engine.load(path, **defaults | RESIDENT | options)


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("lossy") / "lossy", lose_embedding(LOST))


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams, routing: str) -> list[RequestOutput]:
    """All prompts at once, so that they share steps."""
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params, routing=routing)  # pyright: ignore[reportArgumentType]
    while engine.has_work():
        engine.step()
    return [engine.pop(str(index)) for index in range(len(prompts))]


@pytest.mark.parametrize(
    ("routing", "params", "overlap"),
    [("resident", SAMPLED, True), ("exact", GREEDY, True), ("resident", GREEDY, False)],
)
def test_others_get_the_same_tokens(lossy: Path, routing: str, params: SamplingParams, overlap: bool) -> None:
    """Beside it, and after it on pages that it has used."""
    with load(lossy, overlap=overlap) as engine:
        want = [output.token_ids for output in run(engine, PROMPTS, params, routing)]
    with load(lossy, overlap=overlap) as engine:
        if routing == "exact":  # which experts are resident does not matter to it
            run(engine, SPOILT, GREEDY, "resident")
        for spoilt in SPOILT:
            first, *outputs = run(engine, [spoilt, *PROMPTS], params, routing)
            assert first.completions[0].finish_reason == "error"
            assert first.token_ids == []
            assert [output.token_ids for output in outputs] == want
            assert all(output.completions[0].finish_reason == "length" for output in outputs)
        assert engine.state()["not_finite"] == len(SPOILT) * (1 + (routing == "exact"))
        assert engine.state()["scheduler"]["pages_used"] == 0
        assert np.isfinite(engine.state()["residency"]["coverage"])


def test_a_token_of_the_answer_ends_it(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """What came before stays; siblings and held-back text too. The log has one line, without the text."""
    with load(tiny_checkpoint, expert_memory="100%") as engine:
        expected = engine.generate(PROMPTS[0], GREEDY)[0].token_ids
    lost = next(token for token in expected[2:] if token not in PROMPTS[0])
    at = expected.index(lost)
    with load(checkpoint(tmp_path / "answer", lose_embedding(lost)), expert_memory="100%") as engine:
        output = engine.generate(PROMPTS[0], GREEDY)[0]
        assert output.token_ids == expected[: at + 1]
        assert output.completions[0].finish_reason == "error"
        assert output.completions[0].error is not None
        deltas = list(engine.stream(PROMPTS[0], GREEDY))
        assert [token for delta in deltas for token in delta.token_ids] == expected[: at + 1]
        assert (deltas[-1].finish_reason, deltas[-1].token_ids) == ("error", ())


def test_it_is_logged_once_per_request(lossy: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(max_tokens=3, n=3)
    with load(lossy) as engine, caplog.at_level(logging.WARNING, logger="emoe_jax"):
        engine.generate([SPOILT[0], PROMPTS[0], SPOILT[2]], params)
        assert engine.state()["not_finite"] == 6
    lines = [record for record in caplog.records if "not finite" in record.getMessage()]
    assert len(lines) == 2
    assert not any(str(PROMPTS[1][0]) in record.getMessage() for record in lines)


@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_its_pages_are_no_prefix(lossy: Path, routing: str) -> None:
    """The chunk that holds the token, and what follows, is not published; the sound chunk before it is."""
    sound = RNG.integers(0, 50, size=40).tolist()
    prompt = [*sound, LOST, *sound]
    with load(lossy, routing=routing) as engine:
        for cached in (0, 32):  # the first chunk of the prompt
            output = engine.generate(prompt, GREEDY)[0]
            assert output.completions[0].finish_reason == "error"
            assert output.num_cached_tokens == cached
        assert engine.generate(sound, GREEDY)[0].num_cached_tokens == 32


@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_a_token_that_the_last_one_does_not_see_is_noticed(tmp_path: Path, routing: str) -> None:
    """Three layers with a window of 4 see 9 tokens back: logits at the end of a chunk of 32 are finite."""
    path = checkpoint(tmp_path / "window", lose_embedding(LOST), sliding_window=4)
    sound = RNG.integers(0, 50, size=45).tolist()
    with load(path, routing=routing) as engine:
        for at in (0, 3, 20, 33):
            output = engine.generate([*sound[:at], LOST, *sound[at:]], GREEDY)[0]
            assert (output.completions[0].finish_reason, output.token_ids) == ("error", [])
        assert engine.generate(sound, GREEDY)[0].completions[0].finish_reason == "length"
        assert engine.state()["not_finite"] == 4


@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_its_routing_counts_for_nothing(lossy: Path, routing: str) -> None:
    with load(lossy, routing=routing) as engine:
        for prompt in ([LOST], [LOST, *PROMPTS[2]], [LOST] * 20):  # no token before it has a wish
            engine.generate(prompt, GREEDY)
        assert not np.any(engine.state()["residency"]["wishes"])
        engine.generate([*PROMPTS[0], LOST, *PROMPTS[2]], GREEDY)  # the tokens before it do
        wishes = np.sum(engine.state()["residency"]["wishes"], axis=1)
        assert wishes.tolist() == [len(PROMPTS[0]) * TINY["num_experts_per_tok"]] * TINY["num_hidden_layers"]


@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_scoring_a_prompt(lossy: Path, routing: str) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=2)
    with load(lossy, routing=routing) as engine:
        spoilt, sound = run(engine, [SPOILT[1], PROMPTS[1]], params, routing)
    assert spoilt.completions[0].finish_reason == "error"
    assert sound.prompt_logprobs is not None
    assert np.isfinite([item.logprob for item in sound.prompt_logprobs]).all()
    assert len(sound.prompt_logprobs) == len(PROMPTS[1]) - 1


@pytest.mark.parametrize("routing", ["resident", "exact"])
@pytest.mark.parametrize("at", [0, 7, 30])
def test_logits_before_the_token_are_as_without_it(lossy: Path, routing: str, at: int) -> None:
    tokens = RNG.integers(0, 50, size=31).tolist()
    with load(lossy) as engine:
        want = engine.logits(tokens, routing)  # pyright: ignore[reportArgumentType]
        tokens[at] = LOST
        got = engine.logits(tokens, routing)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(got[:at], want[:at])
        assert np.isnan(got[at:]).all()
        with pytest.raises(RequestError, match="not finite from token 0 on"):
            engine.quality([LOST, 3, 4])


def test_a_trace_holds_none_of_it(lossy: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with load(lossy, record_traces=path) as engine:
        for prompt in (SPOILT[2], PROMPTS[1], SPOILT[0]):
            run(engine, [prompt], GREEDY, "resident")
    trace = RoutingTrace.load(path)
    assert np.isfinite(trace.probs).all()
    assert trace.prompt_embedding is not None
    assert np.isfinite(trace.prompt_embedding).all()
    sizes = np.bincount(trace.sample, minlength=3)
    assert sizes.tolist() == [32, len(PROMPTS[1]) + GREEDY.max_tokens - 1, 0]  # the first has one sound chunk


def test_a_head_of_nan_ends_every_request(tmp_path: Path) -> None:
    def edit(model: Decoder) -> None:
        model.head[...] = model.head[...].at[5].set(jnp.inf)

    with load(checkpoint(tmp_path / "head", edit)) as engine:
        for output in run(engine, PROMPTS, SAMPLED, "exact"):
            assert (output.completions[0].finish_reason, output.token_ids) == ("error", [])


@pytest.mark.parametrize("scale", [100.0, 1e4])
@pytest.mark.parametrize("slots", ["2 slots", "5 slots"])
def test_a_router_that_is_sure_of_absent_experts_is_no_error(tmp_path: Path, scale: float, slots: str) -> None:
    """Under `resident`; `exact` requests afterwards get what a fresh engine gives."""

    def edit(model: Decoder) -> None:
        for layer in model.layers:
            layer.router.weight[...] = layer.router.weight[...] * scale

    path = checkpoint(tmp_path / "sure", edit)
    with load(path, expert_memory=slots) as engine:
        want = [output.token_ids for output in run(engine, PROMPTS, GREEDY, "exact")]
    with load(path, expert_memory=slots) as engine:
        for output in run(engine, PROMPTS, GREEDY, "resident"):
            assert output.completions[0].finish_reason == "length"
            assert 0 <= output.substituted <= 1
        assert [output.token_ids for output in run(engine, PROMPTS, GREEDY, "exact")] == want
        assert np.isfinite(engine.logits(PROMPTS[1], "resident")).all()
