"""`jax.lax.ragged_dot` over assignments sorted by slot.

Kept as an oracle and for hardware where XLA lowers it well: on CPU, and on CUDA up to jaxlib 0.10.2, it is dense over
the groups. On CUDA with a newer jaxlib, cuDNN 9.22 or higher multiplies group by group.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.models.decoder import gate
from emoe_jax.moe.dequantise import factor_and_scales
from emoe_jax.moe.dispatch import combine, dispatch, plus_bias, scaled
from emoe_jax.moe.operands import Operands


def ragged(operands: Operands, config: ModelConfig) -> Float[Array, "R D"]:
    """Groups follow the slots, so an assignment's place, and maybe its last bits, depend on the slab's placement."""
    rows, ids, weights, slot_of_expert, experts, accumulator = operands
    groups = dispatch(ids, slot_of_expert, experts.capacity)
    by_slot = jnp.argsort(groups.slot, stable=True).astype(jnp.int32)  # absent ones last, outside every group
    slots = jnp.arange(experts.capacity, dtype=jnp.int32)
    sizes = jnp.sum(groups.slot[:, None] == slots[None, :], axis=0, dtype=jnp.int32)
    x = rows[groups.row[by_slot]]
    slot = jnp.minimum(groups.slot[by_slot], experts.capacity - 1)  # an absent expert's product is never read
    w_in, in_scales = factor_and_scales(experts.w_in, experts.in_scales, rows.dtype, config.expert_hidden)
    w_out, out_scales = factor_and_scales(experts.w_out, experts.out_scales, rows.dtype, rows.shape[1])
    in_scales, out_scales = (None if s is None else s[slot] for s in (in_scales, out_scales))
    hidden = plus_bias(scaled(_ragged_dot(x, w_in, sizes), in_scales), experts.b_in, slot)
    products = scaled(_ragged_dot(gate(hidden, config).astype(rows.dtype), w_out, sizes), out_scales)
    products = plus_bias(products, experts.b_out, slot)
    lost = ~jnp.append(_finite(w_in) & _finite(w_out), True)[groups.slot[by_slot]]
    products = jnp.where(lost[:, None], jnp.nan, products)
    return combine(products[jnp.argsort(by_slot)], groups, weights, accumulator)


def _ragged_dot(x: Float[Array, "A I"], w: Float[Array, "C O I"], sizes: Int[Array, " C"]) -> Float[Array, "A O"]:
    w = jnp.where(_finite(w)[:, None, None], w, 0)  # where it is dense, every row is multiplied by every slot
    x = x.astype(w.dtype)
    precision = jax.lax.Precision.HIGHEST  # float32 is not TF32
    return jax.lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), sizes, precision=precision, preferred_element_type=jnp.float32)


def _finite(w: Float[Array, "C O I"]) -> Bool[Array, " C"]:
    return jnp.all(jnp.isfinite(w), axis=(1, 2))
