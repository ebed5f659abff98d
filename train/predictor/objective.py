"""The training objective: cross entropy to a prompt's expert frequencies, and coverage under slot budgets."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from emoe_jax.predictor import network
from emoe_jax.predictor.config import PredictorConfig
from emoe_jax.predictor.model import Dropout, Inputs, Known
from emoe_jax.predictor.network import Sizes, Weights

BUDGETS = (0.25, 0.5, 0.75)  # residencies whose coverage is trained and reported


class Batch(NamedTuple):
    """What a step learns from. `weight` is a prompt's share of the loss, by its tokens; `given` says which prompts are
    predicted layer by layer, from the closed form given earlier layers."""

    inputs: Inputs
    known: Known
    target: Float[Array, "B M E"]
    weight: Float[Array, " B"]
    given: Bool[Array, " B"]


class Metrics(NamedTuple):
    loss: Array
    cross_entropy: Array
    coverage: Array  # hard, mean over the budgets


def slots(residency: float, num_experts: int) -> int:
    """Slots per layer at a residency: at least one, never all."""
    return min(max(1, round(residency * num_experts)), num_experts - 1)


def soft_coverage(
    logits: Float[Array, "B M E"], target: Float[Array, "B M E"], budget: int, softness: float
) -> Float[Array, " B"]:
    """Share of assignments whose expert is among the `budget` highest, with a smooth edge.

    An expert counts by how far its logit is above the middle between the last resident and the first absent one.
    """
    top = jax.lax.top_k(logits, budget + 1)[0]
    edge = (top[..., -1:] + top[..., -2:-1]) / 2
    return (target * jax.nn.sigmoid((logits - edge) / softness)).sum(-1).mean(-1)


def hard_coverage(logits: Float[Array, "B M E"], target: Float[Array, "B M E"], budget: int) -> Float[Array, " B"]:
    top = jax.lax.top_k(logits, budget)[1]
    return jnp.take_along_axis(target, top, axis=-1).sum(-1).mean(-1)


def loss(
    weights: Weights,
    config: PredictorConfig,
    sizes: Sizes,
    batch: Batch,
    key: PRNGKeyArray,
    dropout: float,
    ranking: float,
    softness: float = 0.15,
) -> tuple[Float[Array, ""], Metrics]:
    """Of one member. `ranking` weighs the loss of coverage against cross entropy (in nats per layer)."""
    logits = network.member_logits(weights, config, sizes, batch.inputs, batch.known, Dropout(dropout, key))
    weight = batch.weight / batch.weight.sum()
    entropy = -(batch.target * jax.nn.log_softmax(logits, axis=-1)).sum(-1).mean(-1) @ weight
    budgets = sorted({slots(residency, config.num_experts) for residency in BUDGETS})
    covered = jnp.stack([soft_coverage(logits, batch.target, budget, softness) for budget in budgets]).mean(0) @ weight
    hard = jnp.stack([hard_coverage(logits, batch.target, budget) for budget in budgets]).mean(0) @ weight
    total = entropy - ranking * covered
    return total, Metrics(total, entropy, hard)


def visible_layers(config: PredictorConfig, given: Bool[Array, " B"], key: PRNGKeyArray) -> Array:
    """Which true routing each layer may see when it is predicted, drawn anew for every prompt.

    All-layer: for half of the prompts none, as at prediction time; for the other half that of the layers before it
    in a random order (xlnet), before it in the model (gpt2), or of all that are not masked (bert).
    Layer by layer: that of the layers before it where the prompt is `given` them, else none.
    """
    layers, batch = config.num_layers, len(given)
    order_key, share_key, mask_key, half_key = jax.random.split(key, 4)
    before = jnp.tril(jnp.ones((layers, layers), bool), -1)[None]
    if config.variant == "layer-by-layer":
        return before & given[:, None, None]
    share = jax.random.uniform(share_key, (batch, 1, 1))
    kept = jax.random.uniform(mask_key, (batch, 1, layers)) < share
    half = jax.random.uniform(half_key, (batch, 1, 1)) < 0.5
    if config.arch == "xlnet":
        place = jnp.argsort(jax.random.uniform(order_key, (batch, layers)), axis=-1)
        seen = place[:, None, :] < place[:, :, None]
    elif config.arch == "gpt2":
        seen = jnp.broadcast_to(before, (batch, layers, layers))
    else:
        seen = kept & ~jnp.eye(layers, dtype=bool)[None]
    return seen & half
