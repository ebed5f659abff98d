"""Cases of the MoE op for tests: rows, routing, experts and the slab that holds some of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.config import ModelConfig
from emoe_jax.experts.blocks import dequantise_fp8_into, dequantise_mxfp4_into
from emoe_jax.experts.quantise import dequantise_into, quantised
from emoe_jax.experts.record_format import RecordArray, RecordFormat
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.moe import BACKENDS, moe_ffn

D, F = 32, 48
OP = jax.jit(moe_ffn, static_argnames=("config", "backend", "platform"))
RUNNABLE = [name for name, backend in BACKENDS.items() if backend.runs_on("cpu")]
DEQUANTISE = {"int8": dequantise_into, "fp8": dequantise_fp8_into, "mxfp4": dequantise_mxfp4_into}
WAVE_EXACT = [name for name in RUNNABLE if BACKENDS[name].wave_exact]


def model(
    E: int, k: int, ffn: str = "glu", hidden: int = D, expert_hidden: int = F, activation: str | None = None
) -> ModelConfig:
    """Experts of a clamped GLU have biases, as in gpt-oss, and a limit that cuts."""
    return ModelConfig(
        family="test",
        vocab_size=8,
        hidden_size=hidden,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position=8,
        num_experts=E,
        top_k=k,
        expert_hidden=expert_hidden,
        moe_layers=(0,),
        activation=activation or ("gelu" if ffn == "double_glu" else "silu"),  # pyright: ignore[reportArgumentType]
        expert_bias=ffn == "clamped_glu",
        glu_limit=0.7,
        ffn=ffn,  # pyright: ignore[reportArgumentType]
    )


@dataclasses.dataclass
class Case:
    """One call of the op: all `E` experts' weights, and which slot of the slab each has (`C` when absent)."""

    config: ModelConfig
    rows: jax.Array
    ids: np.ndarray
    weights: jax.Array
    slots: np.ndarray
    capacity: int
    w_in: np.ndarray
    w_out: np.ndarray
    in_scales: np.ndarray | None = None
    out_scales: np.ndarray | None = None
    b_in: np.ndarray | None = None
    b_out: np.ndarray | None = None

    @classmethod
    def of(cls, config: ModelConfig, ids, slots, capacity: int, seed: int = 0, dtype="float32") -> "Case":
        rng = np.random.default_rng(seed)
        ids, slots = np.asarray(ids, np.int32), np.asarray(slots, np.int32)
        R, E = len(ids), config.num_experts
        arrays = RecordFormat.of(config, dtype).arrays[2:]
        case = cls(
            config,
            jnp.asarray(rng.standard_normal((R, config.hidden_size)), dtype),
            ids,
            jnp.asarray(rng.uniform(0.1, 1.0, ids.shape), jnp.float32),
            slots,
            capacity,
            (rng.standard_normal((E, *config.expert_in_shape)) * 0.2).astype(dtype),
            (rng.standard_normal((E, *config.expert_out_shape)) * 0.2).astype(dtype),
        )
        biases = {array.name: rng.standard_normal((E, *array.shape)).astype(dtype) for array in arrays}
        return dataclasses.replace(case, **biases)

    def slab(self, slots: np.ndarray, capacity: int) -> ExpertWeights:
        """The experts at their slots; unused slots hold NaN, so that reading one cannot go unnoticed.

        Quantised experts have NaN among the scales there: integers have none. Among bytes it is 255.
        """
        held = np.flatnonzero(slots < capacity)

        def placed(experts: np.ndarray | None) -> jax.Array | None:
            if experts is None:
                return None
            unused = {"int8": 77, "uint8": 255}.get(experts.dtype.name, np.nan)
            array = np.full((capacity, *experts.shape[1:]), unused, experts.dtype)
            array[slots[held]] = experts[held]
            return jnp.asarray(array)

        arrays = (self.w_in, self.w_out, self.in_scales, self.out_scales, self.b_in, self.b_out)
        return ExpertWeights(*map(placed, arrays))  # pyright: ignore

    def quantised(self, name: str = "int8") -> "Case":
        """With the same experts in int8, or with other ones in a format of blocks."""
        if name == "int8":
            (w_in, in_scales), (w_out, out_scales) = quantised(self.w_in), quantised(self.w_out)
        else:
            rng = np.random.default_rng(3)
            w_in, w_out, in_scales, out_scales = (
                _random_bits(rng, self.config.num_experts, array)
                for array in RecordFormat.of(self.config, name).arrays[:4]
            )
        return dataclasses.replace(self, w_in=w_in, w_out=w_out, in_scales=in_scales, out_scales=out_scales)

    def dequantised(self, name: str) -> "Case":
        """With experts in float32 that have the same values."""
        assert self.in_scales is not None
        assert self.out_scales is not None
        w_in = _floats(name, self.w_in, self.in_scales, self.config.expert_in_shape, self.config.ffn_in_factor)
        w_out = _floats(name, self.w_out, self.out_scales, self.config.expert_out_shape, 1)
        return dataclasses.replace(self, w_in=w_in, w_out=w_out, in_scales=None, out_scales=None)

    def run(self, backend: str, accumulator: jax.Array | np.ndarray | None = None) -> np.ndarray:
        slab = self.slab(self.slots, self.capacity)
        return np.asarray(
            OP(
                self.rows,
                self.ids,
                self.weights,
                self.slots,
                slab,
                accumulator=None if accumulator is None else jnp.asarray(accumulator),
                config=self.config,
                backend=backend,
            )
        )

    def run_in_waves(self, backend: str, size: int, seed: int) -> np.ndarray:
        """Chunks of `size` experts in ascending id through a slab of `size` slots, at random places."""
        rng = np.random.default_rng(seed)
        out = np.zeros_like(self.rows)
        for first in range(0, self.config.num_experts, size):
            experts = np.arange(first, min(first + size, self.config.num_experts))
            slots = np.full(self.config.num_experts, size, np.int32)
            slots[experts] = rng.permutation(size)[: len(experts)]
            wave = dataclasses.replace(self, slots=slots, capacity=size)
            out = wave.run(backend, accumulator=out)
        return out


def _random_bits(rng: np.random.Generator, E: int, array: RecordArray) -> np.ndarray:
    """Numbers of any value, and scales that keep weights below 1."""
    shape = (E, *array.shape)
    if array.dtype == np.float32:
        return rng.uniform(0.0001, 0.002, shape).astype(np.float32)
    if array.name.endswith("scales"):
        return rng.integers(118, 125, shape).astype(np.uint8)
    bits = rng.integers(0, 256, shape).astype(np.uint8)
    return np.where(bits & 127 == 127, 0, bits)  # of FP8, those are NaN


def _floats(name: str, w: np.ndarray, scales: np.ndarray, shape: tuple[int, int], parts: int) -> np.ndarray:
    """Each expert's parts are matrices of their own."""
    weights = np.empty((len(w), *shape), np.float32)
    for arrays in zip(w, scales, weights, strict=True):
        for numbers, scale, out in zip(*(np.split(array, parts) for array in arrays), strict=True):
            DEQUANTISE[name](numbers, scale, out)
    return weights


def random_ids(rng: np.random.Generator, R: int, E: int, k: int) -> np.ndarray:
    return np.argsort(rng.random((R, E)), axis=1)[:, :k]


def random_slots(rng: np.random.Generator, E: int, C: int) -> np.ndarray:
    """`min(C, E)` experts resident, at random slots."""
    slots = np.full(E, C)
    resident = rng.permutation(E)[:C]
    slots[resident] = rng.permutation(C)[: len(resident)]
    return slots


def abstract_operands(config: ModelConfig, R: int, C: int, dtype: str, experts_as: str | None = None):
    """`experts_as` is the format of the experts; that of the rows' dtype by default."""

    def array(shape, dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    experts = jax.eval_shape(lambda: RecordFormat.of(config, experts_as or dtype).empty_weights(C))
    choice = (R, config.top_k)
    return (
        array((R, config.hidden_size), dtype),
        array(choice, jnp.int32),
        array(choice, jnp.float32),
        array((config.num_experts,), jnp.int32),
        experts,
    )
