"""Every jitted function of a step, lowered for CUDA on a machine without one: nothing in it makes the host wait."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emoe_jax.config import ModelConfig
from emoe_jax.device import layer_steps, step, stops
from emoe_jax.device.adjustments import ROOMS, TokenEdits, all_allowed
from emoe_jax.device.batch import empty_batch
from emoe_jax.device.block_tables import WRITTEN_AT_ONCE, NewPages, TableUpdate
from emoe_jax.device.inputs import StepInputs
from emoe_jax.device.kv_cache import new_cache
from emoe_jax.device.sampler import SamplingArrays
from emoe_jax.device.shapes import Shape
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.models import config_from_hf
from emoe_jax.models.decoder import Decoder
from tests.engines import TINY
from tests.lowering import Counts, export_for_cuda
from tests.models.test_hf_config import FAMILIES

CONFIG = config_from_hf(TINY | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2})
DECODE, MIXED = Shape(4, 4, 0, 32, 6), Shape(4, 4, 2, 32, 6)
SHAPES = pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
Call = tuple[Any, tuple, dict[str, Any]]
"""A jitted function, its array arguments and its static ones."""


class Pieces:
    """Abstract arguments for a batch of a given shape over a slab of `capacity` slots."""

    def __init__(
        self,
        shape: Shape,
        capacity: int,
        config: ModelConfig = CONFIG,
        platform: str = "cuda",
        dtype: str = "float32",
        pages: int = 16,
        expert_format: str | None = None,
    ):
        self.config, self.platform, self.shape = config, platform, shape
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        nnx.update(model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.state(model)))
        self.skeleton, self.leaves = step.Skeleton.split(model)
        self.layers = [step.Skeleton.split(layer) for layer in model.layers]
        record_format = RecordFormat.of(config, expert_format or dtype)
        self.experts = jax.eval_shape(lambda: record_format.empty_weights(capacity))
        self.cache = jax.eval_shape(lambda: new_cache(config, pages, dtype))
        self.words = empty_batch(shape).words
        B, R, E, k = shape.sequences, shape.rows, config.num_experts, config.top_k
        self.x: Any = jax.ShapeDtypeStruct((1, R, config.hidden_size), dtype)
        self.rows: Any = jax.ShapeDtypeStruct((R, config.hidden_size), dtype)
        self.taken: Any = jax.ShapeDtypeStruct((step.ROWS_TAKEN, config.hidden_size), dtype)
        self.slots = np.zeros((len(config.moe_layers), E), np.int32)
        self.logits: Any = jax.ShapeDtypeStruct((B, config.vocab_size), jnp.float32)
        self.places = np.zeros(B, np.int32)
        choices: Any = jax.ShapeDtypeStruct((R, k), jnp.int32)
        weights: Any = jax.ShapeDtypeStruct((R, k), jnp.float32)
        probs: Any = jax.ShapeDtypeStruct((R, k), jnp.float16)
        counts: Any = jax.ShapeDtypeStruct((E,), jnp.int32)
        needed: Any = jax.ShapeDtypeStruct((E,), jnp.bool_)
        missed: Any = jax.ShapeDtypeStruct((R,), jnp.int32)
        self.tables: Any = jax.ShapeDtypeStruct((2 * B, shape.pages), jnp.int32)
        self.budget: Any = jax.ShapeDtypeStruct((R,), jnp.float32)
        self.last_tokens: Any = jax.ShapeDtypeStruct((8,), jnp.int32)
        self.routed = stops.Routed(choices, probs, counts, needed, missed, self.budget)
        self.stopped = stops.Stopped(self.x, self.rows, choices, weights, self.budget)
        self.every = self._of_layers(self.routed)

    def _of_layers(self, part: Any) -> Any:
        count = len(self.config.moe_layers)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), part)

    def _statics(self, layer: int | None = None) -> dict[str, Any]:
        skeleton = self.skeleton if layer is None else self.layers[layer][0]
        return {"skeleton": skeleton, "config": self.config, "shape": self.shape}

    def whole_step(self) -> Call:
        experts = (self.experts,) * len(self.config.moe_layers)
        arguments = (self.leaves, experts, self.slots, self.cache, self.words, self.last_tokens)
        return step.whole_step, arguments, self._statics() | {"platform": self.platform}

    def embed(self) -> Call:
        statics = {"skeleton": self.skeleton, "shape": self.shape}
        return layer_steps.embed, (self.leaves, self.words, self.last_tokens), statics

    def attend_and_route(self, layer: int = 0) -> Call:
        statics = self._statics(layer) | {"platform": self.platform}
        statics["window"] = self.config.sliding_window(layer)
        resident = np.zeros(self.config.num_experts, bool)
        arguments = (self.layers[layer][1], self.x, self.cache[layer], self.words, resident, self.budget)
        return layer_steps.attend_and_route, arguments, statics

    def next_wishes(self) -> Call:
        layer = self.config.moe_layers[0]
        return layer_steps.next_wishes, (self.layers[layer][1], self.x, self.words), self._statics(layer)

    def expert_wave(self) -> Call:
        arguments = (self.stopped, self.slots[0], self.experts, self.rows)
        return layer_steps.expert_wave, arguments, {"config": self.config, "platform": self.platform}

    def close_moe(self) -> Call:
        skeleton, leaves = self.layers[self.config.moe_layers[0]]
        return (
            layer_steps.close_moe,
            (leaves, self.stopped, self.rows),
            {"skeleton": skeleton, "platform": self.platform},
        )

    def dense_layer(self, layer: int) -> Call:
        statics = self._statics(layer) | {"platform": self.platform, "window": self.config.sliding_window(layer)}
        return layer_steps.dense_layer, (self.layers[layer][1], self.x, self.cache[layer], self.words), statics

    def start_layers(self) -> Call:
        return layer_steps.start_layers, (self.leaves, self.words, self.last_tokens), self._statics()

    def go_on(self, m: int = 1) -> Call:
        before, last = self.config.moe_layers[max(0, m - 1)], self.config.moe_layers[m]
        behind = range(before + 1 if m else 0, last + 1)
        parts = [self.layers[index] for index in (before, *behind)]
        statics = {"skeletons": tuple(skeleton for skeleton, _ in parts), "config": self.config, "shape": self.shape}
        statics |= {"windows": tuple(map(self.config.sliding_window, behind)), "platform": self.platform}
        leaves, cache = tuple(leaves for _, leaves in parts), self.cache[behind.start : behind.stop]
        resident = np.zeros(self.config.num_experts, bool)
        arguments = (leaves, self.stopped, self.rows, cache, self.words, resident, self.every, np.int32(m))
        return layer_steps.go_on, arguments, statics

    def end_layers(self) -> Call:
        cache = self.cache[self.config.moe_layers[-1] + 1 :]
        arguments = (self.leaves, self.stopped, self.rows, cache, self.words, self.every, self.last_tokens)
        return layer_steps.end_layers, arguments, self._statics() | {"platform": self.platform}

    def stop_at(self) -> Call:
        return layer_steps.stop_at, (stops.Stops(self._of_layers(self.stopped), self.every), np.int32(1)), {}

    def all_logits(self) -> Call:
        return layer_steps.all_logits, (self.leaves, self.x), {"skeleton": self.skeleton, "platform": self.platform}

    def prompt_logprobs(self) -> Call:
        arguments = (self.leaves, self.taken, np.zeros(step.ROWS_TAKEN, np.int32))
        return step.prompt_logprobs, arguments, {"skeleton": self.skeleton, "platform": self.platform}

    def add_embeddings(self) -> Call:
        total: Any = jax.ShapeDtypeStruct((self.config.hidden_size,), jnp.float32)
        table: Any = jax.ShapeDtypeStruct((self.config.vocab_size, self.config.hidden_size), jnp.bfloat16)
        return step.add_embeddings, (total, table, np.zeros(64, np.int32), np.int32(3), np.float32(3)), {}

    def edit_logits(self) -> Call:
        edits, _ = TokenEdits.empty(self.logits.shape[0], ROOMS[0])
        return step.edit_logits, (self.logits, edits), {"room": ROOMS[0]}

    def write_pages(self) -> Call:
        return step.write_pages, (self.tables, NewPages.pack([], WRITTEN_AT_ONCE)), {}

    def with_tables(self) -> Call:
        rows, lengths, new, _ = TableUpdate.of([], [], [], self.shape)
        head = self.words[: StepInputs.packing(self.shape).words_before("block_tables")]
        return step.with_tables, (head, rows, lengths, new, self.tables), {"shape": self.shape}

    def mask_logits(self) -> Call:
        return step.mask_logits, (self.logits, all_allowed(*self.logits.shape)), {}

    def filter_logits(self) -> Call:
        return step.filter_logits, (self.logits, SamplingArrays.pack([], len(self.places))), {"by": "top_p"}

    def choose_tokens(self) -> Call:
        arguments = (self.logits, SamplingArrays.pack([], len(self.places)), self.places, self.last_tokens)
        return step.choose_tokens, arguments, {"random": True}

    def chosen_logprobs(self) -> Call:
        return step.chosen_logprobs, (self.logits, self.places), {}

    def take_rows(self) -> Call:
        return step.take_rows, (self.x, np.zeros(step.ROWS_TAKEN, np.int32)), {}

    def compare_logits(self) -> Call:
        arguments = (self.leaves, self.taken, np.zeros((step.ROWS_TAKEN, self.config.vocab_size), np.float32))
        return step.compare_logits, arguments, {"skeleton": self.skeleton, "platform": self.platform}


WITH_KERNELS = ("attend_and_route", "expert_wave", "go_on")
FUNCTIONS = [name for name, member in vars(Pieces).items() if callable(member) and not name.startswith("_")]


def counts(call: Call) -> Counts:
    jitted, arguments, statics = call
    return Counts.of(export_for_cuda(jitted, *arguments, **statics))


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name not in ("whole_step", "dense_layer")])
@SHAPES
def test_no_function_makes_the_host_wait(function: str, shape: Shape) -> None:
    jitted, arguments, statics = getattr(Pieces(shape, 3), function)()
    exported = export_for_cuda(jitted, *arguments, **statics)
    found = Counts.of(exported)
    assert found.stalls == 0
    assert "optimization_barrier" not in exported.mlir_module()  # what XLA:CPU needs is not there
    assert (found.kernels > 0) == (function in WITH_KERNELS)


@pytest.mark.parametrize("family", FAMILIES)
@SHAPES
def test_no_step_of_a_family_makes_the_host_wait(family: str, shape: Shape) -> None:
    config = config_from_hf(FAMILIES[family])
    pieces = Pieces(shape, config.top_k + 1, config, dtype="bfloat16")
    found = counts(pieces.whole_step())
    assert found.stalls == 0
    assert found.kernels > 0
    # Matrices, slab and pages of each layer; all vectors are few arguments however many layers there are.
    of_layer = 9 + 2 * config.expert_bias + 2 * (config.latent is not None)
    assert found.arguments <= 8 + of_layer * config.num_layers
    dense = [layer for layer in range(config.num_layers) if not config.is_moe(layer)]
    if dense:
        assert counts(pieces.dense_layer(dense[0])).stalls == 0
        assert counts(pieces.go_on(0)).stalls == 0


@pytest.mark.parametrize(
    ("family", "expert_format"),
    [("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8"), ("deepseek_v3", "fp8"), ("mixtral", "int8")],
)
@SHAPES
def test_no_step_over_quantised_experts_makes_the_host_wait(family: str, expert_format: str, shape: Shape) -> None:
    """Nor are there floats of more experts than a kernel has at once: its arguments are the bytes of the slab."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
    raw = FAMILIES[family]
    config = config_from_hf(raw | {name: size for name, size in sizes.items() if name in raw})
    pieces = Pieces(shape, config.top_k + 1, config, dtype="bfloat16", expert_format=expert_format)
    plain = counts(Pieces(shape, config.top_k + 1, config, dtype="bfloat16").whole_step())
    found = counts(pieces.whole_step())
    assert found.stalls == 0
    assert found.kernels == plain.kernels > 0


def test_a_split_module_is_the_one_that_is_joined() -> None:
    model = Decoder(config_from_hf(FAMILIES["qwen2_moe"]), rngs=nnx.Rngs(0))
    skeleton, leaves = step.Skeleton.split(model)
    weights = jax.tree.leaves(nnx.state(model))
    assert len(leaves) < len(weights)
    for joined, weight in zip(jax.tree.leaves(nnx.state(skeleton.join(leaves))), weights, strict=True):
        np.testing.assert_array_equal(joined, weight)


def test_every_jitted_function_of_a_step_is_covered() -> None:
    jitted = {
        name
        for module in (step, layer_steps)
        for name, member in vars(module).items()
        if isinstance(member, type(step.whole_step)) and member.__module__ == module.__name__
    }
    assert jitted == set(FUNCTIONS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_float32_are_not_rounded_to_tf32(dtype: str) -> None:
    """Nor are those of a router, which is float32 in every model."""
    jitted, arguments, statics = Pieces(MIXED, 3, dtype=dtype).whole_step()
    text = export_for_cuda(jitted, *arguments, **statics).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    of_float32 = [line for line in products if re.search(r": \(tensor<\S*xf32>, tensor<\S*xf32>\)", line)]
    assert of_float32
    assert all("HIGHEST" in line for line in of_float32)
    assert len(of_float32) < len(products) or dtype == "float32"


@SHAPES
def test_a_step_copies_no_slab_weights_and_no_pages(shape: Shape) -> None:
    """Temporaries do not grow with the slab or with the KV cache, and stay far below both."""
    config = CONFIG.replace(num_experts=64, expert_hidden=512)
    temporaries = []
    for capacity, pages in ((8, 16), (64, 16), (8, 4096)):
        jitted, arguments, statics = Pieces(shape, capacity, config, "cpu", pages=pages).whole_step()
        memory = jitted.lower(*arguments, **statics).compile().memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
    slab = 64 * RecordFormat.of(config, "float32").nbytes
    assert max(temporaries) < 0.05 * slab
    assert max(temporaries) - min(temporaries) < 0.01 * slab


def test_the_parts_of_a_step_have_names_in_a_profile() -> None:
    function, arguments, statics = Pieces(DECODE, 3, CONFIG, "cpu").whole_step()
    text = function.lower(*arguments, **statics).as_text(debug_info=True)
    for part in ("embedding", "attention", "router", "experts", "moe_output", "head"):
        assert re.search(f'["/]{part}/', text)
