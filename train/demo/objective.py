"""What training minimises: cross entropy of the chosen positions, and what keeps routing balanced and small.

This is how mixtures of experts are trained: top-k routing, a loss that has experts used alike over a batch in which all
kinds of text are mixed (Switch Transformer), and the router's z-loss (ST-MoE). Two techniques are there to be compared
with it, and off. With *expert dropout* a share of the rows gets by with part of the experts: in each layer a random set
in which experts that the row's tokens want are likely. Such a model does not come to need every expert, and no choice
of residents hurts it. With *concentration* a group's tokens are drawn towards those experts that the group wants most
(the aim of Mod-Squad, Chen et al. 2023, with a plainer loss).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Decoder, MoEFunction
from emoe_jax.models.rope import Rotation
from emoe_jax.models.routing import Routing, route
from train.demo import initial
from train.demo.attention import attend_packed, causal_within_documents
from train.demo.batches import Batch
from train.demo.mixture import GROUPS
from train.demo.moe import dropped, moe_buffers

BALANCE_WEIGHT = 0.04  # 0.01 in Hugging Face's count, which is k times ours
GROUP_EXPERTS = 3 / 8  # of a layer's experts: those that concentration draws a group to
Z_WEIGHT = 1e-3
SHORT_ANSWER = 2.0  # loss weight from which on a position belongs to an answer that has to be exact
_FACTS = GROUPS.index("facts")  # groups behind it are kinds of real text


class Restriction(NamedTuple):
    """How many experts each row may use in a layer, and noise on which; see `Batch`."""

    slots: Int[Array, "B M"]
    luck: Float[Array, "B M E"]

    def allowed(
        self, layer: int, probabilities: Float[Array, "B T E"], valid: Bool[Array, "B T"]
    ) -> Bool[Array, "R E"]:
        """Draws without replacement, in proportion to what the row's tokens want (Gumbel top-k)."""
        B, T, E = probabilities.shape
        wanted = (
            jnp.sum(jax.lax.stop_gradient(probabilities) * valid[..., None].astype(probabilities.dtype), axis=1) + 1e-6
        )
        rows = _highest(jnp.log(wanted) + self.luck[:, layer], self.slots[:, layer])
        return jnp.broadcast_to(rows[:, None], (B, T, E)).reshape(B * T, E)


class Parameters(NamedTuple):
    """All that is trained: the decoder's arrays by path, and the experts of each layer."""

    dense: dict[str, Array]
    experts: tuple[ExpertWeights, ...]


class Metrics(NamedTuple):
    """Of one step, all float32 scalars."""

    loss: Float[Array, ""]  # weighted cross entropy, nats
    answer_accuracy: Float[Array, ""]  # share of answers' tokens that are most probable, of short answers of the tasks
    fact_accuracy: Float[Array, ""]  # the same of facts
    text_loss: Float[Array, ""]  # nats per token of real text, unweighted
    balance: Float[Array, ""]  # 1 when experts are used alike
    strayed: Float[Array, ""]  # router probability outside the experts that a token's group wants most
    dropped: Float[Array, ""]  # share of assignments


def init(config: ModelConfig, seed: int) -> Parameters:
    return Parameters(initial.dense_weights(config, seed), initial.expert_weights(config, seed))


def decoder(config: ModelConfig, dense: dict[str, Array]) -> Decoder:
    """The decoder module with these arrays in place (traceable)."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    flat = {path: variable.replace(dense[".".join(map(str, path))]) for path, variable in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def packed_forward(
    model: Decoder,
    experts: tuple[ExpertWeights, ...],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    documents: Int[Array, "B T"],
    moe: MoEFunction = moe_buffers,
    restriction: Restriction | None = None,
) -> tuple[Float[Array, "B T D"], list[Routing]]:
    """Hidden states before the final norm, of rows that hold several documents which do not see each other."""
    mask = causal_within_documents(documents)
    config = model.config
    x, rotation = model.embed(tokens), Rotation.of(positions, config)
    routings = []
    valid = documents > 0
    for index, (layer, layer_experts) in enumerate(zip(model.layers, experts, strict=True)):
        x, _ = layer.attention(
            x, rotation, lambda q, k, v, _: (attend_packed(q, k, v, mask, config.attention_scale), None)
        )
        rows, routing = layer.moe_input(x, None, valid.reshape(-1))
        if restriction:
            probabilities = jax.nn.softmax(routing.logits, axis=-1).reshape(*tokens.shape, -1)
            allowed = restriction.allowed(index, probabilities, valid)
            routing = route(routing.logits, config, allowed, valid.reshape(-1))
        out = moe(rows, routing.ids, routing.weights, layer_experts)
        x = layer.moe_output(x, rows, out)
        routings.append(routing)
    return x, routings


def loss(
    parameters: Parameters, batch: Batch, config: ModelConfig, expert_dropout: bool = False, concentration: float = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """The training objective of a batch, and what to report of it."""
    model = decoder(config, parameters.dense)
    tokens, positions, documents = (jnp.asarray(x) for x in (batch.tokens, batch.positions, batch.documents))
    restriction = Restriction(jnp.asarray(batch.slots), jnp.asarray(batch.luck)) if expert_dropout else None
    x, routings = packed_forward(model, parameters.experts, tokens, positions, documents, restriction=restriction)
    logits = model.logits(x.reshape(-1, x.shape[-1])[batch.loss_at])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = log_z - jnp.take_along_axis(logits, batch.targets[:, None], axis=-1)[:, 0]
    cross_entropy = jnp.sum(nats * batch.weights) / jnp.sum(batch.weights)
    valid = documents.reshape(-1) > 0
    balance = jnp.mean(jnp.stack([balance_loss(routing, valid) for routing in routings]))
    counted = valid.astype(jnp.float32)
    router_z = jnp.mean(jnp.stack([jnp.mean(jax.nn.logsumexp(r.logits, axis=-1) ** 2 * counted) for r in routings]))
    groups = jnp.asarray(batch.groups).reshape(-1)
    strayed = jnp.float32(0)
    if concentration:
        marks = jax.nn.one_hot(groups, len(GROUPS)) * counted[:, None]
        strayed = jnp.mean(jnp.stack([concentration_loss(routing, marks) for routing in routings]))
    weights = jnp.asarray(batch.weights)
    right, group = jnp.argmax(logits, axis=-1) == batch.targets, groups[batch.loss_at]
    short = weights >= SHORT_ANSWER
    metrics = Metrics(
        cross_entropy,
        _mean(right, short & (group != _FACTS)),
        _mean(right, short & (group == _FACTS)),
        _mean(nats, (weights > 0) & (group > _FACTS)),
        balance,
        strayed,
        jnp.mean(jnp.stack([dropped(r.ids, config.num_experts) for r in routings])),
    )
    return cross_entropy + BALANCE_WEIGHT * balance + concentration * strayed + Z_WEIGHT * router_z, metrics


def _mean(values: Array, chosen: Bool[Array, " loss_positions"]) -> Float[Array, ""]:
    """Over the chosen ones; 0 of none."""
    weights = chosen.astype(jnp.float32)
    return jnp.sum(values.astype(jnp.float32) * weights) / jnp.maximum(jnp.sum(weights), 1)


def balance_loss(routing: Routing, valid: Bool[Array, " R"]) -> Float[Array, ""]:
    """`E * sum_e share_e * probability_e` of a batch (Switch Transformer, eq. 4): 1 when all experts are used alike.

    The shares are of a whole batch, in which all kinds of text are mixed: experts may specialise at no cost. They are
    of what the router wished for, not of what expert dropout left it.
    """
    E = routing.logits.shape[1]
    wishes = jnp.where(valid[:, None], routing.wish_ids, E)
    counts = jnp.bincount(wishes.reshape(-1), length=E).astype(jnp.float32)
    shares = counts / jnp.maximum(jnp.sum(counts), 1)
    counted = valid.astype(jnp.float32)
    probabilities = jax.nn.softmax(routing.logits, axis=-1) * counted[:, None]
    return E * jnp.sum(shares * jnp.sum(probabilities, axis=0) / jnp.maximum(jnp.sum(counted), 1))


def concentration_loss(routing: Routing, groups: Float[Array, "R groups"]) -> Float[Array, ""]:
    """Mean router probability outside the `GROUP_EXPERTS` share of the experts that a row's group wants most.

    `groups` is one-hot, and zero for rows that do not count.
    """
    probabilities = jax.nn.softmax(routing.logits, axis=-1)
    wanted = jnp.einsum("rj,re->je", groups, jax.lax.stop_gradient(probabilities))
    count = jnp.full(len(wanted), round(GROUP_EXPERTS * probabilities.shape[1]))
    outside = groups @ (1.0 - _highest(wanted, count).astype(jnp.float32))
    return jnp.sum(probabilities * outside) / jnp.maximum(jnp.sum(groups), 1)


def _highest(scores: Float[Array, "n E"], count: Int[Array, " n"]) -> Bool[Array, "n E"]:
    """Marks the `count` highest scores of each line."""
    rank = jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1)
    return rank < count[:, None]
