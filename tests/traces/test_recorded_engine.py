"""What an engine records is what its routers chose; without a recorder nothing of it leaves the device."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax import ConfigError, Engine, SamplingParams
from emoe_jax.models import save_checkpoint
from emoe_jax.models.routing import Routing
from emoe_jax.moe import moe_ffn
from emoe_jax.policies.policy import ChunkWishes
from emoe_jax.residency.residency import Residency
from emoe_jax.tasks import TaskProfile
from emoe_jax.traces import RoutingTrace
from tests.engines import RESIDENT, TINY, random_model
from tests.models.plain import plain_forward

RAW = TINY | {"num_hidden_layers": 2}
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 60, size=length).tolist() for length in (3, 17, 1)]
PAGE = 16 * 2 * 2 * 2 * 8 * 4  # bytes: tokens, layers, keys and values, kv heads, head size, float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, experts = random_model(RAW)
    directory = tmp_path_factory.mktemp("recorded") / "tiny"
    save_checkpoint(directory, RAW, nnx.state(model), experts)
    return directory


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    """All experts resident, and a KV cache too small for three sequences, so that some are computed twice."""
    options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 96}
    with Engine.load(checkpoint, expert_memory="100%", policy="static", kv_memory=7 * PAGE, **options) as engine:
        yield engine


def plain_routings(tokens: list[int]) -> list[Routing]:
    """What the plain model's routers say, by MoE layer."""
    model, experts = random_model(RAW)

    def moe(rows: jax.Array, ids: jax.Array, weights: jax.Array, layer_experts) -> jax.Array:
        return moe_ffn(rows, ids, weights, jnp.arange(8), layer_experts, model.config, backend="reference")

    return plain_forward(model, jnp.asarray([tokens]), experts, moe)[1]


def router_logits(tokens: list[int]) -> np.ndarray:
    """Of the plain model, `[tokens, M, E]`."""
    return np.stack([np.asarray(routing.logits) for routing in plain_routings(tokens)], axis=1)


def expected_routing(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Experts and probabilities `[tokens, M, k]` of the plain model's routers."""
    routings = plain_routings(tokens)
    ids, probs = ([np.asarray(field) for field in fields] for fields in zip(*[r[3:5] for r in routings], strict=True))
    return np.stack(ids, axis=1), np.stack(probs, axis=1)


def test_every_token_is_recorded_once_with_its_routers_choices(engine: Engine, tmp_path: Path) -> None:
    engine.record_traces(tmp_path / "trace.npz")
    before = engine.state()["scheduler"]["preemptions"]
    outputs = engine.generate(PROMPTS, dataclasses.replace(GREEDY, max_tokens=60), task="qa")
    engine.stop_recording()
    assert engine.state()["scheduler"]["preemptions"] > before
    engine.generate(PROMPTS[0], GREEDY)  # not recorded
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert trace.tasks == ["qa"] * 3
    assert trace.prompt_embedding is not None
    table = np.asarray(random_model(RAW)[0].embedding[...])
    for sample, output in enumerate(outputs):
        tokens = output.prompt_token_ids + output.token_ids[:-1]  # the last token was sampled and never fed
        mine = trace.sample == sample
        assert trace.token_pos[mine].tolist() == list(range(len(tokens)))
        experts, probs = expected_routing(tokens)
        np.testing.assert_array_equal(trace.experts[mine], experts)
        np.testing.assert_allclose(trace.probs[mine], probs, atol=2e-3)
        np.testing.assert_allclose(
            trace.prompt_embedding[sample], table[output.prompt_token_ids].mean(axis=0), atol=1e-3
        )
    with np.load(tmp_path / "trace.npz") as archive:
        assert archive["prompt_length"].tolist() == [3, 17, 1]


def test_probabilities_stay_on_the_device_without_a_recorder(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []
    device_get = jax.device_get

    def spy(tree: Any) -> Any:
        fetched.append(tree)
        return device_get(tree)

    monkeypatch.setattr(jax, "device_get", spy)
    engine.generate(PROMPTS[0], GREEDY)
    assert len(fetched) == GREEDY.max_tokens  # one wait per step
    assert all(output.ranked_probs is None for output in fetched)
    assert all(len(jax.tree.leaves(output)) == 1 for output in fetched)  # and all that is read is one array


def test_a_recorder_attached_after_warm_up_compiles_nothing(checkpoint: Path, tmp_path: Path) -> None:
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compilations.append(event)

    options: dict[str, Any] = {"policy": "static", "max_num_seqs": 2, "max_num_batched_tokens": 16} | RESIDENT
    with Engine.load(checkpoint, expert_memory="3 slots", max_model_len=64, **options) as engine:
        engine.warm_up()
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            engine.record_traces(tmp_path / "trace.npz")
            resident = engine.generate(PROMPTS[:2], GREEDY)
            exact = engine.generate(PROMPTS[:2], GREEDY, routing="exact")
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []
    trace = RoutingTrace.load(tmp_path / "trace.npz")  # closing the engine finished it
    assert trace.tasks == ["other"] * 4
    assert np.unique(trace.experts).tolist() == list(range(8))  # what routers wished for, resident or not
    for sample, output in enumerate(exact, start=2):
        experts, _ = expected_routing(output.prompt_token_ids + output.token_ids[:-1])
        np.testing.assert_array_equal(trace.experts[trace.sample == sample], experts)
    assert resident[0].substituted > 0


def test_a_profile_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    TaskProfile(num_layers=2, num_experts=9, top_k=2).save(tmp_path / "profile.json")
    with pytest.raises(ConfigError, match="this model has 2 of 8"):
        Engine.load(checkpoint, task_profile=tmp_path / "profile.json")
    (tmp_path / "there.npz").touch()
    with pytest.raises(ConfigError, match="exists; choose another file"):
        Engine.load(checkpoint, record_traces=tmp_path / "there.npz")


def test_without_a_tokenizer_there_is_no_task(engine: Engine) -> None:
    engine.use_task_profile(TaskProfile(2, 8, 2).with_task("qa", keywords={"a": 1.0}))
    try:
        assert engine.generate([5, 6], SamplingParams(max_tokens=1))[0].task is None
    finally:
        engine.use_task_profile(None)


def test_a_trace_holds_as_many_ranks_as_the_engine_was_loaded_with(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other readers see are the choices alone. What ranks behind them is no wish: the policy is not told of it."""
    chunks: list[ChunkWishes] = []
    observe = Residency.observe

    def spy(residency: Residency, counts: Any, resident: Any, of_prompts: Sequence[ChunkWishes]) -> Any:
        chunks.extend(of_prompts)
        return observe(residency, counts, resident, of_prompts)

    monkeypatch.setattr(Residency, "observe", spy)
    path, options = tmp_path / "ranks.npz", RESIDENT | {"routing": "exact", "max_num_seqs": 1}
    with Engine.load(checkpoint, expert_memory="3 slots", record_traces=path, trace_ranks=5, **options) as one:
        [output] = one.generate([PROMPTS[1]], dataclasses.replace(GREEDY, max_tokens=6))
    assert chunks
    assert all((chunk.counts.sum(axis=1) == 2 * chunk.tokens).all() for chunk in chunks)
    trace, tokens = RoutingTrace.load(path), output.prompt_token_ids + output.token_ids[:-1]
    assert (trace.top_k, trace.ranks) == (2, 5)
    assert trace.further_experts is not None
    assert trace.further_probs is not None
    experts, probs = expected_routing(tokens)
    np.testing.assert_array_equal(trace.experts, experts)
    np.testing.assert_allclose(trace.probs, probs, atol=2e-3)
    logits = router_logits(tokens)
    order = np.argsort(-logits, axis=-1)[..., 2:5]
    np.testing.assert_array_equal(trace.further_experts, order)
    scores = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), order, axis=-1)
    np.testing.assert_allclose(trace.further_probs, scores, atol=2e-3)


@pytest.mark.parametrize("ranks", [1, 9])
def test_ranks_that_a_router_does_not_have_are_refused(checkpoint: Path, ranks: int) -> None:
    with pytest.raises(
        ConfigError, match=f"trace_ranks is {ranks}; the routers choose 2 of 8 experts, so expected 2 to 8"
    ):
        Engine.load(checkpoint, trace_ranks=ranks)
