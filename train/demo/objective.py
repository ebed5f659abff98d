"""What training minimises: cross entropy of the chosen positions, a balance loss and a router z-loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Decoder, MoEFunction
from emoe_jax.models.routing import Routing
from train.demo import initial
from train.demo.attention import attend_packed, causal_within_documents
from train.demo.batches import PROMPT_WEIGHT, Batch
from train.demo.moe import dropped, moe_buffers

BALANCE_WEIGHT = 0.01
Z_WEIGHT = 1e-3


class Parameters(NamedTuple):
    """All that is trained: the decoder's arrays by path, and the experts of each layer."""

    dense: dict[str, Array]
    experts: tuple[ExpertWeights, ...]


class Metrics(NamedTuple):
    """Of one step, all float32 scalars."""

    loss: Float[Array, ""]  # weighted cross entropy, nats
    answer_loss: Float[Array, ""]  # of the answers' tokens alone, unweighted
    answer_accuracy: Float[Array, ""]  # share of the answers' tokens that are most probable
    balance: Float[Array, ""]  # 1 when experts are used alike
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
) -> tuple[Float[Array, "B T D"], list[Routing]]:
    """Hidden states before the final norm, of rows that hold several documents which do not see each other."""
    mask = causal_within_documents(documents)
    config = model.config
    x = model.embed(tokens)
    routings = []
    for layer, layer_experts in zip(model.layers, experts, strict=True):
        x, _ = layer.attention(
            x, positions, lambda q, k, v: (attend_packed(q, k, v, mask, config.attention_scale), None)
        )
        rows, routing = layer.moe_input(x, None, documents.reshape(-1) > 0)
        out = moe(rows, routing.ids, routing.weights, layer_experts)
        x = layer.moe_output(x, rows, out)
        routings.append(routing)
    return x, routings


def loss(parameters: Parameters, batch: Batch, config: ModelConfig) -> tuple[Float[Array, ""], Metrics]:
    """The training objective of a batch, and what to report of it."""
    model = decoder(config, parameters.dense)
    tokens, positions, documents = (jnp.asarray(x) for x in (batch.tokens, batch.positions, batch.documents))
    x, routings = packed_forward(model, parameters.experts, tokens, positions, documents)
    logits = model.logits(x.reshape(-1, x.shape[-1])[batch.loss_at])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = log_z - jnp.take_along_axis(logits, batch.targets[:, None], axis=-1)[:, 0]
    cross_entropy = jnp.sum(nats * batch.weights) / jnp.sum(batch.weights)
    valid = documents.reshape(-1) > 0
    balance = jnp.mean(jnp.stack([balance_loss(routing, valid) for routing in routings]))
    router_z = jnp.mean(jnp.stack([jnp.mean(jax.nn.logsumexp(r.logits, axis=-1) ** 2 * valid) for r in routings]))
    answers = jnp.asarray(batch.weights > PROMPT_WEIGHT).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(answers), 1)
    metrics = Metrics(
        cross_entropy,
        jnp.sum(nats * answers) / count,
        jnp.sum((jnp.argmax(logits, axis=-1) == batch.targets) * answers) / count,
        balance,
        jnp.mean(jnp.stack([dropped(r.ids, config.num_experts) for r in routings])),
    )
    return cross_entropy + BALANCE_WEIGHT * balance + Z_WEIGHT * router_z, metrics


def balance_loss(routing: Routing, valid: Bool[Array, " R"]) -> Float[Array, ""]:
    """`E * sum_e share_e * probability_e` of a batch (Switch Transformer, eq. 4): 1 when all experts are used alike.

    The shares are of a whole batch, in which all tasks are mixed: experts may specialise by task at no cost.
    """
    E = routing.logits.shape[1]
    counts = jnp.bincount(routing.ids.reshape(-1), length=E).astype(jnp.float32)
    shares = counts / jnp.maximum(jnp.sum(counts), 1)
    probabilities = jax.nn.softmax(routing.logits, axis=-1) * valid[:, None]
    return E * jnp.sum(shares * jnp.sum(probabilities, axis=0) / jnp.maximum(jnp.sum(valid), 1))
