"""The plain model that everything else is compared with: all experts there, no cache, one layer after the other."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.attention.uncached import causal_attend
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Decoder, MoEFunction
from emoe_jax.models.rope import Rotation
from emoe_jax.models.routing import Routing


def plain_forward(
    model: Decoder,
    tokens: Int[Array, "B T"],
    experts: Sequence[ExpertWeights],
    moe: MoEFunction,
    allowed: Sequence[Bool[Array, " E"]] | None = None,
    valid: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T V"], list[Routing]]:
    """One uncached causal forward; `experts`, `allowed` and the routings are per MoE layer, in order."""
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    rows_valid = None if valid is None else valid.reshape(-1)
    x, rotation = model.embed(tokens), Rotation.of(positions, model.config)
    routings: list[Routing] = []
    for index, layer in enumerate(model.layers):
        x, _ = layer.attention(x, rotation, causal_attend(model.config, model.config.sliding_window(index), positions))
        if not model.config.is_moe(index):
            x = layer.dense(x)
            continue
        m = len(routings)
        layer_allowed = None if allowed is None else jnp.broadcast_to(allowed[m][None, :], (B * T, len(allowed[m])))
        rows, routing = layer.moe_input(x, layer_allowed, rows_valid)
        out = moe(rows, routing.ids, routing.weights.astype(rows.dtype), experts[m])
        x = layer.moe_output(x, rows, out)
        routings.append(routing)
    return model.logits(x), routings
