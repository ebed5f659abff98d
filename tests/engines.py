"""A tiny random Mixtral on disk, and engines over it that tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

from emoe_jax import Engine
from emoe_jax.models import config_from_hf, save_checkpoint
from emoe_jax.models.decoder import Decoder, init_experts

TINY: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "eos_token_id": 60,
}

RESIDENT: dict[str, Any] = {"routing": "resident", "audit_rate": 0.0}
"""Options under which nothing but what a test does changes which experts are resident."""

EngineFactory = Callable[..., Engine]


def random_model(raw: dict[str, Any], seed: int = 0) -> tuple[Decoder, tuple]:
    """A decoder and its experts with weights large enough that logits and routers have clear winners."""
    config = config_from_hf(raw)
    model = Decoder(config, rngs=nnx.Rngs(seed))
    state = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, nnx.state(model))
    nnx.update(model, state)
    experts = jax.tree.map(lambda x: x * 8, init_experts(config, jax.random.key(seed)))
    return model, experts


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, experts = random_model(TINY)
    directory = tmp_path_factory.mktemp("tiny") / "tiny-mixtral"
    save_checkpoint(directory, TINY, nnx.state(model), experts)
    return directory


@pytest.fixture(scope="session")
def engine_of(tiny_checkpoint: Path) -> Iterator[EngineFactory]:
    """`engine_of(expert_memory="2 slots", ...)`: one engine per set of options for the whole session.

    Without prefix caching, so that no test rests on what another one has computed, and `RESIDENT` unless a test says
    otherwise.
    """
    engines: dict[tuple, Engine] = {}

    def make(**options: Any) -> Engine:
        defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "policy": "static", "prefix_caching": False}
        options = defaults | RESIDENT | options
        key = tuple(sorted(options.items()))
        if key not in engines:
            engines[key] = Engine.load(tiny_checkpoint, **options)
        return engines[key]

    yield make
    for engine in engines.values():
        engine.close()


def settle(engine: Engine) -> None:
    """Have every load that was asked for committed."""
    engine.parts.residency.settle(10)
    assert engine.state()["residency"]["loading"] == []


def answered(engine: Engine) -> dict[str, Any]:
    """The planner's state once the predictor has answered every question."""
    planner = engine.parts.planner
    assert planner is not None
    assert planner.invocations is not None
    planner.invocations.forecaster.join()
    return engine.state()["planner"]
