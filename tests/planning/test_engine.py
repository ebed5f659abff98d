"""The plan of this machine is what an engine does; that of another device comes of the same compiled steps."""

import dataclasses
import math

import pytest

from emoe_jax import Engine
from emoe_jax.config import ModelConfig
from emoe_jax.demo import demo_model
from emoe_jax.engine_config import EngineConfig, StepSize
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.memory.workspace import MARGIN
from emoe_jax.models import config_from_hf
from emoe_jax.planning.compiled import RETURNED_BYTES, in_float32, one_layer_bytes, step_bytes
from emoe_jax.planning.fit import Footprint
from serve.plan import PlanOptions
from serve.planned import make_plan
from tests.engines import TINY


@pytest.mark.parametrize("budget", ["40MB", "200MB"])
def test_the_plan_is_that_of_an_engine_with_the_same_options(budget: str) -> None:
    """With the first budget the KV cache takes what steps leave; with the second there is much to spare."""
    options = {"expert_memory": "40%", "device_memory": budget, "max_num_batched_tokens": 16}
    plan = make_plan(str(demo_model()), PlanOptions(context=1024, batch=2, **options))
    alike = {"max_model_len": 1024, "max_num_seqs": 2, "predictor": "none", "policy": "static"}
    with Engine.load(demo_model(), **options, **alike) as engine:
        memory = engine.state()["memory"]
        tight = engine.memory.is_tight
    found = plan.as_json()
    assert found["memory_bytes"] == {
        "weights": memory["weights"],
        "slab": memory["slab"],
        "kv": memory["kv_cache"],
        "workspace": memory["workspace"],
        "total": sum(memory[part] for part in ("weights", "slab", "kv_cache", "workspace")),
    }
    assert found["device_bytes"] == memory["device"]
    assert found["memory_bytes"]["total"] <= memory["device"]
    assert found["resident_share"] == math.floor(0.4 * 8 * 32) / (8 * 32)
    assert tight == (budget == "40MB")
    assert found["tpot_ms"] > found["tpot_resident_ms"] > 0


def _deep(layers: int) -> ModelConfig:
    return config_from_hf(TINY | {"num_hidden_layers": layers, "torch_dtype": "bfloat16"})


def _plan(config: ModelConfig) -> MemoryPlan:
    return MemoryPlan.of(config, platform="gpu", device_bytes=2**40, expert_memory="50%", max_num_seqs=2)


def test_a_step_of_a_gpu_is_one_layer_and_what_the_others_return() -> None:
    """Compiled on this CPU in float32, whatever the dtype of the plan."""
    size = StepSize(2, 64)
    three, nine = (step_bytes(_deep(layers), _plan(_deep(layers)), size, "gpu") for layers in (3, 9))
    rows = 2 + 2 * 32  # two sequences that decode, and two tiles for a chunk of 64 tokens
    assert nine - three == 2 * RETURNED_BYTES * rows * 2 * 6
    assert three > MARGIN * 4 * rows * 32  # at least what attention hands to the experts
    single = in_float32(_plan(_deep(3)))
    assert (single.dtype, single.expert_format) == ("float32", "float32")
    assert one_layer_bytes(_deep(3), single, size) == three
    eight = dataclasses.replace(_plan(_deep(3)), expert_format="int8")
    assert in_float32(eight).expert_format == "int8"


def test_a_demand_has_compiled_steps() -> None:
    options = EngineConfig(expert_memory="50%", max_num_seqs=2, max_num_batched_tokens=64)
    config = _deep(3)
    assert Footprint.compiled(config, options, "gpu").step_bytes == step_bytes(
        config, _plan(config), StepSize(2, 64), "gpu"
    )
