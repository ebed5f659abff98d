"""A checkpoint loaded whole, and its uncached forward with the reference MoE op."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emoe_jax.attention.uncached import causal_attend
from emoe_jax.checkpoint import Checkpoint
from emoe_jax.config import ModelConfig
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models import load_dense, open_checkpoint
from emoe_jax.models.decoder import Decoder, MoEFunction
from emoe_jax.models.rope import Rotation
from emoe_jax.models.routing import Routing
from emoe_jax.moe.operands import Operands
from emoe_jax.moe.reference import reference
from tests.models.plain import plain_forward


@dataclasses.dataclass
class LoadedModel:
    checkpoint: Checkpoint
    graphdef: nnx.GraphDef
    state: nnx.State
    experts: tuple[ExpertWeights, ...]

    def forward(self, tokens: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, list[Routing]]:
        """Logits `[B, T, V]` and routings; compiled once per configuration and shape."""
        logits, routings = _forward(self.graphdef, self.state, self.experts, jnp.asarray(tokens), valid)
        return np.asarray(logits), routings

    def hidden_states(self, tokens: np.ndarray) -> np.ndarray:
        """The residual stream after each layer, `[L, B, T, D]`."""
        return np.asarray(_hidden_states(self.graphdef, self.state, self.experts, jnp.asarray(tokens)))

    def greedy(self, prompt: np.ndarray, count: int, length: int) -> list[int]:
        """`count` greedy tokens by full recomputation of a sequence right-padded to `length`."""
        tokens = list(map(int, prompt))
        for _ in range(count):
            padded = np.array([tokens + [0] * (length - len(tokens))] * 2, np.int32)
            tokens.append(int(np.argmax(self.forward(padded)[0][0, len(tokens) - 1])))
        return tokens[len(prompt) :]


def load(
    directory: Path,
    dtype: str = "float32",
    router_capacity_factor: float | None = None,
    expert_format: str | None = None,
) -> LoadedModel:
    """Experts are kept in `dtype`, or in `expert_format`."""
    checkpoint = open_checkpoint(directory, router_capacity_factor=router_capacity_factor)
    graphdef, state = load_dense(checkpoint, dtype)
    return LoadedModel(checkpoint, graphdef, state, load_experts(checkpoint, expert_format or dtype))


def load_experts(checkpoint: Checkpoint, name: str) -> tuple[ExpertWeights, ...]:
    """All experts of all layers in a format, read one record at a time as the expert store does."""
    record_format = RecordFormat.of(checkpoint.config, name)
    layers = []
    for m in range(len(checkpoint.config.moe_layers)):
        records = np.empty((checkpoint.config.num_experts, record_format.size), record_format.dtype)
        for expert, record in enumerate(records):
            checkpoint.read_expert(m, expert, record, record_format)
        parts = zip(*map(record_format.views, records), strict=True)
        layers.append(record_format.weights(map(np.stack, parts)))
    return tuple(layers)


def _reference_moe(config: ModelConfig) -> MoEFunction:
    slots = jnp.arange(config.num_experts)
    return lambda rows, ids, weights, experts: reference(
        Operands(rows, ids, weights, slots, experts, jnp.zeros_like(rows)), config
    )


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef, state, experts, tokens, valid):
    model: Decoder = nnx.merge(graphdef, state)
    return plain_forward(model, tokens, experts, _reference_moe(model.config), valid=valid)


@functools.partial(jax.jit, static_argnames="graphdef")
def _hidden_states(graphdef, state, experts, tokens):
    model: Decoder = nnx.merge(graphdef, state)
    config, moe = model.config, _reference_moe(model.config)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    rotation = Rotation.of(positions, config)
    x, hidden, remaining = model.embed(tokens), [], list(experts)
    for index, layer in enumerate(model.layers):
        x, _ = layer.attention(x, rotation, causal_attend(config, config.sliding_window(index), positions))
        if config.is_moe(index):
            rows, routing = layer.moe_input(x)
            x = layer.moe_output(x, rows, moe(rows, routing.ids, routing.weights, remaining.pop(0)))
        else:
            x = layer.dense(x)
        hidden.append(x)
    return jnp.stack(hidden)
