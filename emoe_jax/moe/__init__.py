"""The MoE op: the chosen experts' FFNs of a batch of rows, computed from a slab of slots."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.moe.operands import Operands
from emoe_jax.moe.registry import BACKENDS, Backend, MoEBackend, check_backend
from emoe_jax.platforms import default_platform

__all__ = ["BACKENDS", "Backend", "MoEBackend", "moe_ffn", "multiplies_alone"]

_LOOP_ROWS_PER_EXPERT = 12
"""Mean rows per expert, padding counted, up to which `loop` is at least as fast as `blocks` on CPU (measured)."""


@jax.named_scope("experts")
def moe_ffn(
    rows: Float[Array, "R D"],
    ids: Int[Array, "R k"],
    weights: Float[Array, "R k"],
    slot_of_expert: Int[Array, " E"],
    experts: ExpertWeights,
    config: ModelConfig,
    *,
    backend: str = "auto",
    platform: str | None = None,
    accumulator: Float[Array, "R D"] | None = None,
) -> Float[Array, "R D"]:
    """`accumulator` (default zero) plus, per row, the weighted FFN outputs of its `k` experts, in the rows' dtype.

    An id of `E` is no assignment; an expert whose slot is the capacity is absent and contributes nothing. A row with a
    weight of NaN becomes NaN, whatever its ids are, and reaches no other row; nor does a slot that holds NaN reach a
    row that does not ask for its expert. Each row's
    contributions are added in ascending expert id, whatever the slots are. So with a wave-exact backend (`BACKENDS`),
    calling once per chunk of the experts in ascending id, each call adding to the one before, gives bit for bit the
    result of one call with all experts resident, for the same number of rows. Sums are float32, rounded to the rows'
    dtype after each expert. No backend but the oracles copies expert weights.

    `auto` is wave-exact and goes by `platform` (`cpu`, `cuda`, ...; by default that of JAX's default device). On CPU it
    is `loop` while experts have few rows on average, else `blocks`, as measured. On CUDA it is `triton`: no card has
    been measured, but `ragged_dot` is dense over its groups there up to jaxlib 0.10.2. Elsewhere it is `gather`.

    Raises `ValueError` for a backend that is unknown, or not made for `platform`.
    """
    if accumulator is None:
        accumulator = jnp.zeros_like(rows)
    platform = platform or default_platform()
    if backend == "auto":
        backend = _best(config, platform, ids.size)
    check_backend(backend, platform)
    operands = Operands(rows, ids, weights, slot_of_expert, experts, accumulator)
    return _moe_ffn(operands, config=config, backend=backend)


def _best(config: ModelConfig, platform: str, assignments: int) -> str:
    if platform == "cpu":
        return "loop" if multiplies_alone(config, assignments) else "blocks"
    return "triton" if platform == "cuda" else "gather"


def multiplies_alone(config: ModelConfig, assignments: int) -> bool:
    """Whether on a CPU each of so many rows of experts is a product of its own, not one of a block of rows."""
    return assignments <= _LOOP_ROWS_PER_EXPERT * config.num_experts


@partial(jax.jit, static_argnames=("config", "backend"))  # traced once for all layers of a model
def _moe_ffn(operands: Operands, *, config: ModelConfig, backend: str) -> Float[Array, "R D"]:
    lost = jnp.any(jnp.isnan(operands.weights), axis=-1, keepdims=True)
    operands = operands._replace(accumulator=jnp.where(lost, jnp.nan, operands.accumulator))
    return BACKENDS[backend].run(operands, config)
