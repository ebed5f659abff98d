"""An engine of a model with latent attention: chunks, reused pages, contracts and traces are as with any other."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from emoe_jax import Engine, SamplingParams
from emoe_jax.device.kv_cache import move_pages, new_cache, resize_pages
from emoe_jax.models import config_from_hf
from emoe_jax.requests.contract import RoutingContract
from emoe_jax.scheduling.pages import PAGE_SIZE
from emoe_jax.traces import RoutingTrace
from tests.golden.latent import LATENT
from tests.golden.tiny import write_checkpoint
from tests.models.loaded import load

RAW = LATENT["deepseek_v3_groups"] | {"num_hidden_layers": 2}
PAGE = 2 * PAGE_SIZE * (12 + 8) * 4
"""Bytes: layers, tokens, the vector and the shared part of a key, float32."""
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPT = np.random.default_rng(3).integers(3, 96, 41).tolist()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("latent"), RAW)


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[Engine]:
    """Half of the experts resident, and steps of 16 tokens, of which the prompt takes three."""
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64, "audit_rate": 0.0}
    with Engine.load(directory, expert_memory="4 slots", policy="lru", predictor="none", **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[int]:
    """Greedy tokens of the plain model, without a KV cache."""
    return load(directory).greedy(np.asarray(PROMPT), GREEDY.max_tokens, 48)


def test_chunks_and_reused_pages_give_the_plain_models_tokens(engine: Engine, expected: list[int]) -> None:
    first, again = (engine.generate(PROMPT, GREEDY, routing="exact")[0] for _ in range(2))
    assert (first.token_ids, first.num_cached_tokens) == (expected, 0)
    assert (again.token_ids, again.num_cached_tokens) == (expected, 32)


def test_a_page_has_one_vector_per_token(engine: Engine) -> None:
    memory = engine.parts.memory
    assert memory.kv_bytes == memory.num_pages * PAGE == engine.state()["memory"]["kv_cache"]


@pytest.mark.parametrize(("routing", "most"), [("exact", 0.0), ("bounded", 0.3), ("resident", 1.0)])
def test_every_contract_keeps_its_bound_and_is_recorded(
    engine: Engine, tmp_path: Path, routing: RoutingContract, most: float
) -> None:
    engine.record_traces(tmp_path / "trace.npz")
    tolerance = most if routing == "bounded" else None
    (output,) = engine.generate(PROMPT[:20], GREEDY, routing=routing, tolerance=tolerance)
    engine.stop_recording()
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert trace.experts.shape[1:] == (1, 3)
    assert len(output.token_ids) == 6
    assert output.substituted_weight <= most
    assert (output.substituted > 0) == (routing != "exact")


def test_pages_move_and_grow() -> None:
    config = config_from_hf(RAW)
    (layer, *_) = new_cache(config, 4, "float32")
    assert layer.v is None
    numbers = jnp.arange(layer.k.size, dtype=jnp.float32).reshape(layer.k.shape)
    filled = dataclasses.replace(layer, k=numbers)
    grown = resize_pages(filled, num_pages=6)
    assert (grown.k.shape[0], grown.value_dim) == (6, 12)
    moved = move_pages(grown, jnp.asarray([1, 0]), jnp.asarray([5, 0]))
    np.testing.assert_array_equal(moved.k, np.concatenate([numbers, np.zeros_like(numbers[:1]), numbers[1:2]]))
