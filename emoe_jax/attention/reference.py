"""The oracle: every page of the block tables is copied, and every row looks at every position."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emoe_jax.attention.operands import Operands
from emoe_jax.attention.sums import attention_mask


def reference(operands: Operands) -> Float[Array, "B T N Hv"]:
    """Softmax attention in float32 by its definition. Its memory grows with rows times positions times `K * H`."""
    q, cache, view, sinks, window, scale = operands
    B, T, _, H = q.shape
    k, v = (x.astype(jnp.float32).transpose(0, 2, 1, 3) for x in cache.gather(view.block_tables))
    grouped = q.astype(jnp.float32).reshape(B, T, cache.kv_heads, -1, H)
    seen = attention_mask(view.positions, jnp.arange(k.shape[1], dtype=jnp.int32), window) & view.valid[..., None]
    products = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, k, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where(seen[:, :, None, None, :], products * scale, -jnp.inf)
    if sinks is not None:
        logits = jnp.broadcast_to(
            sinks.astype(jnp.float32).reshape(1, 1, *grouped.shape[2:4], 1), (*scores.shape[:4], 1)
        )
        scores = jnp.concatenate([scores, logits], axis=-1)
    shares = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    visible = jnp.where(seen[..., None, None], v[:, None], 0)  # per row: 0 times NaN would be NaN
    mean = jnp.einsum("BTKGS,BTSKH->BTKGH", shares, visible, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(view.valid[:, :, None, None], mean.reshape(*q.shape[:3], -1), 0).astype(q.dtype)
