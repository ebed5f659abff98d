"""A checkpoint loaded whole, and its uncached forward with the reference MoE op."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emoe_jax.checkpoint import Checkpoint
from emoe_jax.experts.weights import ExpertLayout, ExpertWeights
from emoe_jax.models.decoder import Decoder
from emoe_jax.models.routing import Routing
from emoe_jax.moe.reference import reference


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

    def greedy(self, prompt: np.ndarray, count: int, length: int) -> list[int]:
        """`count` greedy tokens by full recomputation of a sequence right-padded to `length`."""
        tokens = list(map(int, prompt))
        for _ in range(count):
            padded = np.array([tokens + [0] * (length - len(tokens))] * 2, np.int32)
            tokens.append(int(np.argmax(self.forward(padded)[0][0, len(tokens) - 1])))
        return tokens[len(prompt) :]


def load(directory: Path, dtype: str = "float32", router_capacity_factor: float | None = None) -> LoadedModel:
    checkpoint = Checkpoint.open(directory, router_capacity_factor=router_capacity_factor)
    graphdef, state = checkpoint.load_dense(dtype)
    return LoadedModel(checkpoint, graphdef, state, load_experts(checkpoint, dtype))


def load_experts(checkpoint: Checkpoint, dtype: str) -> tuple[ExpertWeights, ...]:
    """All experts of all layers, read one record at a time as the expert store does."""
    layout = ExpertLayout.of(checkpoint.config, dtype)
    layers = []
    for m in range(len(checkpoint.config.moe_layers)):
        records = np.empty((checkpoint.config.num_experts, layout.size), layout.dtype)
        for expert, record in enumerate(records):
            checkpoint.read_expert(m, expert, record, layout)
        w_in, w_out = zip(*map(layout.views, records), strict=True)
        layers.append(ExpertWeights(jnp.array(np.stack(w_in)), jnp.array(np.stack(w_out))))
    return tuple(layers)


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef, state, experts, tokens, valid):
    model: Decoder = nnx.merge(graphdef, state)
    config = model.config
    slots = jnp.arange(config.num_experts)

    def moe(rows, ids, weights, layer_experts):
        return reference(rows, ids, weights, slots, layer_experts, config, jnp.zeros_like(rows))

    return model.forward(tokens, experts, moe, valid=valid)
