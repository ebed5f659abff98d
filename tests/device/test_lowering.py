"""Every jitted function of a step lowers for CUDA on a machine without one, and copies no slab weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax.config import ModelConfig
from emoe_jax.device import step
from emoe_jax.device.batch import Shape, empty_batch
from emoe_jax.device.kv_cache import new_cache
from emoe_jax.experts.weights import ExpertLayout
from emoe_jax.models import config_from_hf
from emoe_jax.models.decoder import Decoder
from tests.engines import TINY
from tests.lowering import export_for_cuda

# Sizes that a GPU kernel can tile, so that lowering takes the path that a GPU would.
CONFIG = config_from_hf(TINY | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2})
Call = tuple[Any, tuple, dict[str, Any]]
"""A jitted function, its array arguments and its static ones."""


class Pieces:
    """Abstract arguments for a batch of a given shape over a slab of `capacity` slots."""

    def __init__(self, shape: Shape, capacity: int, config: ModelConfig = CONFIG):
        self.config = config
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        self.skeleton, self.leaves = step.Skeleton.split(model)
        self.layer_skeleton, self.layer_leaves = step.Skeleton.split(model.layers[0])
        layout = ExpertLayout.of(config, "float32")
        self.experts = jax.eval_shape(lambda: layout.empty_weights(capacity))
        self.cache = jax.eval_shape(lambda: new_cache(config, 16, "float32"))
        self.batch = empty_batch(shape, "resident")
        B, T, _ = shape
        self.x: Any = jax.ShapeDtypeStruct((B, T, config.hidden_size), jnp.float32)
        self.rows: Any = jax.ShapeDtypeStruct((B * T, config.hidden_size), jnp.float32)
        self.slots = np.zeros((len(config.moe_layers), config.num_experts), np.int32)
        self.logits = jax.ShapeDtypeStruct((B, config.vocab_size), jnp.float32)
        choices: Any = jax.ShapeDtypeStruct((B * T, config.top_k), jnp.int32)
        weights: Any = jax.ShapeDtypeStruct((B * T, config.top_k), jnp.float32)
        counts: Any = jax.ShapeDtypeStruct((config.num_experts,), jnp.int32)
        self.last_tokens: Any = jax.ShapeDtypeStruct((16,), jnp.int32)
        self.routed = step.Routed(self.x, self.rows, choices, weights, counts)

    def resident_step(self) -> Call:
        experts = (self.experts,) * len(self.config.moe_layers)
        arguments = (self.leaves, experts, self.slots, self.cache, self.batch.inputs, self.last_tokens)
        return step.resident_step, arguments, {"skeleton": self.skeleton, "config": self.config}

    def embed(self) -> Call:
        return step.embed, (self.leaves, self.batch.inputs.tokens, self.last_tokens), {"skeleton": self.skeleton}

    def attend_and_route(self) -> Call:
        statics = {"skeleton": self.layer_skeleton, "config": self.config, "window": None, "restricted": False}
        resident = np.zeros(self.config.num_experts, bool)
        arguments = (self.layer_leaves, self.x, self.cache[0], self.batch.inputs, resident)
        return step.attend_and_route, arguments, statics

    def next_wishes(self) -> Call:
        statics = {"skeleton": self.layer_skeleton, "config": self.config}
        return step.next_wishes, (self.layer_leaves, self.x, self.batch.inputs.lengths), statics

    def expert_wave(self) -> Call:
        arguments = (self.routed, self.slots[0], self.experts, self.rows)
        return step.expert_wave, arguments, {"config": self.config}

    def close_moe(self) -> Call:
        return step.close_moe, (self.layer_leaves, self.routed, self.rows), {"skeleton": self.layer_skeleton}

    def last_logits(self) -> Call:
        return step.last_logits, (self.leaves, self.x, self.batch.inputs.lengths), {"skeleton": self.skeleton}

    def all_logits(self) -> Call:
        return step.all_logits, (self.leaves, self.x), {"skeleton": self.skeleton}

    def prompt_logprobs(self) -> Call:
        targets = np.zeros(self.batch.shape.tokens, np.int32)
        x: Any = jax.ShapeDtypeStruct((1, *self.x.shape[1:]), jnp.float32)
        return step.prompt_logprobs, (self.leaves, x, targets), {"skeleton": self.skeleton}

    def choose_tokens(self) -> Call:
        places = np.zeros(self.batch.shape.sequences, np.int32)
        arguments = (self.logits, self.batch.sampling, self.batch.want_logprobs, self.last_tokens, places)
        return step.choose_tokens, arguments, {}


FUNCTIONS = [name for name, member in vars(Pieces).items() if callable(member) and not name.startswith("_")]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [Shape(4, 1, 6), Shape(1, 32, 6)], ids=["decode", "prefill"])
def test_lowers_for_cuda(function: str, shape: Shape) -> None:
    jitted, arguments, statics = getattr(Pieces(shape, 3), function)()
    exported = export_for_cuda(jitted, *arguments, **statics)
    assert exported.platforms == ("cuda",)
    if function in ("resident_step", "expert_wave"):
        assert "__gpu$xla.gpu.triton" in exported.mlir_module()


def test_every_jitted_function_of_a_step_is_covered() -> None:
    jitted = {name for name, member in vars(step).items() if isinstance(member, type(step.embed))}
    assert jitted - set(FUNCTIONS) == {"dense_layer", "moe_ffn"} & jitted


def test_a_dense_layer_lowers_for_cuda() -> None:
    raw = TINY | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "mlp_only_layers": [0]}
    del raw["num_local_experts"]
    raw |= {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8}
    pieces = Pieces(Shape(4, 1, 6), 3, config_from_hf(raw))
    statics = {"skeleton": pieces.layer_skeleton, "config": pieces.config, "window": None}
    arguments = (pieces.layer_leaves, pieces.x, pieces.cache[0], pieces.batch.inputs)
    assert export_for_cuda(step.dense_layer, *arguments, **statics).platforms == ("cuda",)


@pytest.mark.parametrize("shape", [Shape(4, 1, 6), Shape(1, 32, 6)], ids=["decode", "prefill"])
def test_a_step_copies_no_slab_weights(shape: Shape) -> None:
    """Temporaries do not grow with the slab, and stay far below it."""
    config = CONFIG.replace(num_experts=64, expert_hidden=512)
    temporaries = []
    for capacity in (8, 64):
        jitted, arguments, statics = Pieces(shape, capacity, config).resident_step()
        memory = jitted.lower(*arguments, **statics).compile().memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
    slab = 64 * ExpertLayout.of(config, "float32").nbytes
    assert temporaries[1] < 0.05 * slab
    assert abs(temporaries[1] - temporaries[0]) < 0.01 * slab


def test_the_parts_of_a_step_have_names_in_a_profile() -> None:
    function, arguments, statics = Pieces(Shape(4, 1, 6), 3, CONFIG).resident_step()
    text = function.lower(*arguments, **statics).as_text(debug_info=True)
    for part in ("embedding", "attention", "router", "experts", "moe_output", "head"):
        assert f"/{part}/" in text
