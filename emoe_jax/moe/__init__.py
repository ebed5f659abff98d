"""The MoE op: the chosen experts' FFNs of a batch of rows, computed from a slab of slots."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.moe.operands import Operands
from emoe_jax.moe.registry import BACKENDS, Backend, MoEBackend
from emoe_jax.moe.triton import supports

__all__ = ["BACKENDS", "Backend", "MoEBackend", "moe_ffn"]

_LOOP_ROWS_PER_EXPERT = 8
"""Mean rows per expert up to which, on CPU, `loop` is at least as fast as `blocks` (measured, d 1024, f 2048)."""


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

    `auto` is wave-exact. On CPU it is `loop` while experts have few rows on average, else `blocks`, as measured. On
    CUDA it is `triton`, or `blocks` for sizes that Triton cannot tile: unmeasured, chosen because `loop` and `blocks`
    leave most of a GPU idle and `ragged_dot` is dense over its groups there. Elsewhere it is `blocks`.
    """
    if accumulator is None:
        accumulator = jnp.zeros_like(rows)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown MoE backend {backend!r}; choose auto or one of {', '.join(BACKENDS)}")
    operands = Operands(rows, ids, weights, slot_of_expert, experts, accumulator)
    return _moe_ffn(operands, config=config, backend=backend)


@partial(jax.jit, static_argnames=("config", "backend"))  # traced once for all layers of a model
def _moe_ffn(operands: Operands, *, config: ModelConfig, backend: str) -> Float[Array, "R D"]:
    lost = jnp.any(jnp.isnan(operands.weights), axis=-1, keepdims=True)
    operands = operands._replace(accumulator=jnp.where(lost, jnp.nan, operands.accumulator))

    def run(name: str) -> Callable[..., Array]:
        return partial(BACKENDS[name].run, config=config)

    if backend != "auto":
        return run(backend)(operands)
    few = operands.ids.size <= _LOOP_ROWS_PER_EXPERT * config.num_experts
    return jax.lax.platform_dependent(
        operands,
        cpu=run("loop" if few else "blocks"),
        cuda=run("triton" if supports(config) else "blocks"),
        default=run("blocks"),
    )
