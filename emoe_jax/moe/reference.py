"""The definition: every slot's FFN for every row, weighted by a one-hot table of the router's choices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emoe_jax.config import ModelConfig
from emoe_jax.models.decoder import gate
from emoe_jax.moe.dequantise import factor_and_scales
from emoe_jax.moe.dispatch import scaled, slots_of
from emoe_jax.moe.operands import Operands


def reference(operands: Operands, config: ModelConfig) -> Float[Array, "R D"]:
    """Costs `C` experts per row and `R * C * Fi` numbers: for tests and tiny models.

    Integers of eight bits are exact in every dtype of rows. Their scales apply after the product, in float32. Weights
    in blocks become float32, and so do the rows that are multiplied with them.
    """
    rows, ids, weights, slot_of_expert, experts, accumulator = operands
    precise = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    slots = slots_of(ids, slot_of_expert, experts.capacity)
    one_hot = jax.nn.one_hot(slots, experts.capacity, dtype=jnp.float32)  # a slot of C is all zeros
    weight_of_slot = jnp.einsum("Rk,RkC->RC", weights.astype(jnp.float32), one_hot, **precise)
    w_in, in_scales = factor_and_scales(experts.w_in, experts.in_scales, rows.dtype, config.expert_hidden)
    w_out, out_scales = factor_and_scales(experts.w_out, experts.out_scales, rows.dtype, rows.shape[1])
    hidden = scaled(jnp.einsum("RD,CFD->RCF", rows.astype(w_in.dtype), w_in, **precise), in_scales)
    if experts.b_in is not None:
        hidden = hidden + experts.b_in[None, :, :, 0].astype(jnp.float32)
    gated = gate(hidden, config).astype(rows.dtype)
    products = scaled(jnp.einsum("RCF,CDF->RCD", gated.astype(w_out.dtype), w_out, **precise), out_scales)
    if experts.b_out is not None:
        products = products + experts.b_out[None, :, :, 0].astype(jnp.float32)
    asked = jnp.any(one_hot > 0, axis=1)  # a slot that a row does not ask for may hold anything
    products = jnp.where(asked[:, :, None], products, 0)
    out = accumulator.astype(jnp.float32) + jnp.einsum("RC,RCD->RD", weight_of_slot, products, **precise)
    return out.astype(accumulator.dtype)
