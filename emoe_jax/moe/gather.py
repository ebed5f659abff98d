"""Gather each assignment's expert, then a batched einsum: the backend that runs everywhere, and an oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import gate
from emoe_jax.moe.dequantise import factor_and_scales, is_blocked
from emoe_jax.moe.dispatch import combine, dispatch, largest_divisor, plus_bias, scaled
from emoe_jax.moe.operands import Operands

_COPY_BYTES = 1 << 30
"""Copies of experts that may exist at once."""


def gather(operands: Operands, config: ModelConfig) -> Float[Array, "R D"]:
    """Copies one expert per assignment, as many at a time as 1 GiB holds (at least one): slow for large shapes."""
    rows, ids, weights, slot_of_expert, experts, accumulator = operands
    groups = dispatch(ids, slot_of_expert, experts.capacity)
    slot = jnp.minimum(groups.slot, experts.capacity - 1)  # an absent expert's product is never read
    itemsize = 4 if is_blocked(experts.in_scales) else rows.dtype.itemsize
    size = largest_divisor(ids.size, _COPY_BYTES // (config.expert_params * itemsize))
    x, slot = rows[groups.row].reshape(-1, size, rows.shape[1]), slot.reshape(-1, size)
    if slot.shape[0] == 1:
        products = _products(x[0], slot[0], experts, config)
    else:
        products = jax.lax.map(lambda part: _products(part[0], part[1], experts, config), (x, slot)).reshape(
            -1, rows.shape[1]
        )
    return combine(products, groups, weights, accumulator)


def _products(
    x: Float[Array, "n D"], slot: Int[Array, " n"], experts: ExpertWeights, config: ModelConfig
) -> Float[Array, "n D"]:
    """Row `i` through the expert at `slot[i]`, in float32."""
    precise = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    w_in, in_scales = factor_and_scales(experts.w_in[slot], _at(experts.in_scales, slot), x.dtype, config.expert_hidden)
    w_out, out_scales = factor_and_scales(experts.w_out[slot], _at(experts.out_scales, slot), x.dtype, x.shape[1])
    hidden = jnp.einsum("nD,nFD->nF", x.astype(w_in.dtype), w_in, **precise)
    hidden = plus_bias(scaled(hidden, in_scales), experts.b_in, slot)
    gated = gate(hidden, config).astype(x.dtype)
    products = jnp.einsum("nF,nDF->nD", gated.astype(w_out.dtype), w_out, **precise)
    return plus_bias(scaled(products, out_scales), experts.b_out, slot)


def _at(scales: Num[Array, "C *O"] | None, slot: Int[Array, " n"]) -> Num[Array, "n *O"] | None:
    return None if scales is None else scales[slot]
