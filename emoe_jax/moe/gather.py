"""Gather each assignment's expert, then a batched einsum: the oracle that is easiest to trust after the reference."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from emoe_jax.config import ModelConfig
from emoe_jax.models.decoder import gate
from emoe_jax.moe.dispatch import combine, dispatch
from emoe_jax.moe.operands import Operands


def gather(operands: Operands, config: ModelConfig) -> Float[Array, "R D"]:
    """Copies one expert per assignment, `R * k` of them: not for large shapes."""
    rows, ids, weights, slot_of_expert, experts, accumulator = operands
    groups = dispatch(ids, slot_of_expert, experts.capacity)
    slot = jnp.minimum(groups.slot, experts.capacity - 1)  # an absent expert's product is never read
    x = rows[groups.row]
    hidden = jnp.einsum("AD,AFD->AF", x, experts.w_in[slot], preferred_element_type=jnp.float32)
    gated = gate(hidden, config).astype(rows.dtype)
    products = jnp.einsum("AF,ADF->AD", gated, experts.w_out[slot], preferred_element_type=jnp.float32)
    return combine(products, groups, weights, accumulator)
