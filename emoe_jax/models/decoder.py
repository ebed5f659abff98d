"""The one decoder of all families: Flax NNX modules for everything but the experts, which come in as arguments.

The engine splits the state of a `Decoder` once and jits pure functions that merge it back while tracing, so no NNX
machinery runs per step. Layers expose the pieces of a step (`attention`, `moe_input`, `moe_output`, `dense`) because
the `exact` contract stops between a layer's router and its experts. A whole step also writes the KV cache between two
parts of the attention (`project`, `attended`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.attention import Attention, LatentAttention
from emoe_jax.models.modules import INIT_STDDEV, Linear, RMSNorm
from emoe_jax.models.products import times_transposed
from emoe_jax.models.rope import Rotation
from emoe_jax.models.routing import Allowances, Routing, route

MoEFunction = Callable[[Array, Array, Array, ExpertWeights], Array]
"""`(rows [R, D], ids [R, k], weights [R, k], experts of the layer) -> [R, D]`."""

AttendFunction = Callable[[Array, Array, Array, Array | None], tuple[Array, Any]]
"""`(q [B, T, N, H], k [B, T, K, H], v [B, T, K, Hv], sinks [N] or None) -> (attended [B, T, N, Hv], cache)`; owns
masking and the KV cache."""


def activation_function(config: ModelConfig) -> Callable[[Array], Array]:
    """The elementwise nonlinearity that `config.activation` names. `gelu` is exact, and `gelu_tanh` approximates it."""
    return {
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "relu": jax.nn.relu,
    }[config.activation]


def gate(hidden: Float[Array, "... Fi"], config: ModelConfig) -> Float[Array, "... F"]:
    """The nonlinearity between an FFN's two projections: `act(gate) * up`, or OpenMoE's `gate1 * act(gate2) * up`, or
    gpt-oss's `gate * sigmoid(alpha * gate) * (up + 1)` of what is cut off at a limit."""
    parts = jnp.split(hidden, config.ffn_in_factor, axis=-1)
    return gate_parts(parts, config, activation_function(config))


def gate_parts(
    parts: Sequence[Float[Array, "... F"]], config: ModelConfig, act: Callable[[Array], Array]
) -> Float[Array, "... F"]:
    """`gate` of the projections one by one: gate (or both gates), then up."""
    if config.ffn == "double_glu":
        first, second, up = parts
        return first * act(second) * up
    gate_rows, up = parts
    if config.ffn == "clamped_glu":
        limit = config.glu_limit  # by comparison: in a Triton kernel the minimum of NaN and a number is the number
        gate_rows = jnp.where(gate_rows > limit, limit, gate_rows)
        up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
        return gate_rows * jax.nn.sigmoid(config.glu_alpha * gate_rows) * (up + 1)
    return act(gate_rows) * up


def _times(x: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    return x if factor == 1 else x * factor


class Router(nnx.Module):
    """The linear map from a row to a logit of every expert, and the bias of the choice where the family has one."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        E = config.num_experts
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (E, config.hidden_size)) * INIT_STDDEV)
        self.bias = nnx.Param(jnp.zeros((E,))) if config.router.bias else None
        # Rounded to a model's bfloat16 it would change choices.
        self.choice_bias = nnx.Param(jnp.zeros((E,)), keeps_float32=True) if config.router.choice_bias else None

    def __call__(self, rows: Float[Array, "R D"]) -> Float[Array, "R E"]:
        """In float32."""
        weight = self.weight[...].astype(jnp.float32)
        # Never TF32, whatever the model's dtype: its rounding changes choices.
        logits = jnp.matmul(rows.astype(jnp.float32), weight.T, precision=jax.lax.Precision.HIGHEST)
        return logits if self.bias is None else logits + self.bias[...].astype(jnp.float32)[None, :]


class FeedForward(nnx.Module):
    """A dense FFN: ordinary layers between MoE layers, the shared expert, OpenMoE's extra FFN."""

    def __init__(self, config: ModelConfig, hidden: int, *, rngs: nnx.Rngs):
        self.config = config
        self.w_in = Linear(config.hidden_size, config.ffn_in_factor * hidden, rngs=rngs)
        self.w_out = Linear(hidden, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.w_out(gate(self.w_in(x), self.config))


class Layer(nnx.Module):
    """One decoder layer. MoE layers have a router (and a shared or extra FFN); the others a dense FFN."""

    def __init__(self, config: ModelConfig, index: int, *, rngs: nnx.Rngs):
        self.config = config
        D = config.hidden_size
        self.input_norm = RMSNorm(D, config.norm_eps)
        self.self_attention = (Attention if config.latent is None else LatentAttention)(config, rngs=rngs)
        self.ffn_norm = RMSNorm(D, config.norm_eps)
        if not config.is_moe(index):
            self.mlp = FeedForward(config, config.dense_hidden, rngs=rngs)
            return
        self.router = Router(config, rngs=rngs)
        if config.shared_expert_hidden:
            self.shared_expert = FeedForward(config, config.shared_expert_hidden, rngs=rngs)
            if config.shared_expert_gate:
                self.shared_expert_gate = Linear(D, 1, rngs=rngs)
        if config.extra_ffn:
            self.extra_norm = RMSNorm(D, config.norm_eps)
            self.extra_mlp = FeedForward(config, config.dense_hidden, rngs=rngs)

    def attention(
        self, x: Float[Array, "B T D"], rotation: Rotation, attend_fn: AttendFunction
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The attention sub-block with its residual, and the cache that `attend_fn` returned."""
        q, k, v = self.project(x, rotation)
        with jax.named_scope("attention"):
            attended, cache = attend_fn(q, k, v, self.sinks)
        return self.attended(x, attended), cache

    @jax.named_scope("attention")
    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K Hv"]]:
        """The first part of the attention sub-block: queries, keys and values."""
        return self.self_attention.project(self.input_norm(x), rotation)

    @property
    def sinks(self) -> Float[Array, " N"] | None:
        """The logits of the attention's sinks, where the family has any."""
        sinks = self.self_attention.sinks
        return None if sinks is None else sinks[...]

    @jax.named_scope("attention")
    def attended(self, x: Float[Array, "B T D"], attended: Float[Array, "B T N Hv"]) -> Float[Array, "B T D"]:
        """The last part of the attention sub-block, with its residual."""
        return self._add(x, self.self_attention.output(attended))

    @jax.named_scope("dense_ffn")
    def dense(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The feed-forward sub-block of a layer without experts."""
        return self._add(x, self.mlp(self.ffn_norm(x)))

    @jax.named_scope("router")
    def moe_input(
        self,
        x: Float[Array, "B T D"],
        allowed: Bool[Array, "R E"] | None = None,
        valid: Bool[Array, " R"] | None = None,
        allowances: Allowances | None = None,
    ) -> tuple[Float[Array, "R D"], Routing]:
        """Normed rows for the experts and what `route` makes of them (router in float32)."""
        rows = self.ffn_norm(x).reshape(-1, x.shape[-1])
        bias = None if self.router.choice_bias is None else self.router.choice_bias[...]
        return rows, route(self.router(rows), self.config, allowed, valid, allowances, bias)

    @jax.named_scope("moe_output")
    def moe_output(
        self, x: Float[Array, "B T D"], rows: Float[Array, "R D"], experts_out: Float[Array, "R D"]
    ) -> Float[Array, "B T D"]:
        """Close the MoE sub-block: shared expert, residual, and OpenMoE's sequential extra FFN."""
        if self.config.shared_expert_hidden:
            shared = self.shared_expert(rows)
            if self.config.shared_expert_gate:
                shared = jax.nn.sigmoid(self.shared_expert_gate(rows)) * shared
            experts_out = experts_out + shared
        x = self._add(x, experts_out.reshape(x.shape))
        if self.config.extra_ffn:
            x = self._add(x, self.extra_mlp(self.extra_norm(x)))
        return x

    def _add(self, x: Float[Array, "B T D"], part: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream with one part more."""
        return x + _times(part, self.config.residual_multiplier)


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head. Holds all weights except the experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape) * INIT_STDDEV)
        self.layers = nnx.List([Layer(config, index, rngs=rngs) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nnx.Param(jax.random.normal(rngs.params(), shape) * INIT_STDDEV)

    @jax.named_scope("embedding")
    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table times the multiplier. Tokens must lie in the vocabulary; JAX clamps others
        silently."""
        return _times(self.embedding[...][tokens], self.config.embedding_multiplier)

    @jax.named_scope("head")
    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Final norm and head, in float32."""
        table = self.embedding if self.config.tie_embeddings else self.head
        logits = times_transposed(self.norm(x), table[...], jnp.dtype(jnp.float32))
        return logits if self.config.logits_divisor == 1 else logits / self.config.logits_divisor


def init_experts(config: ModelConfig, key: Array) -> tuple[ExpertWeights, ...]:
    """Random experts for training from scratch: all `E` of every MoE layer, float32."""
    experts = []
    for layer_key in jax.random.split(key, len(config.moe_layers)):
        key_in, key_out = jax.random.split(layer_key)
        w_in = jax.random.normal(key_in, (config.num_experts, *config.expert_in_shape)) * INIT_STDDEV
        w_out = jax.random.normal(key_out, (config.num_experts, *config.expert_out_shape)) * INIT_STDDEV
        b_in, b_out = (jnp.zeros((*w.shape[:2], 1)) if config.expert_bias else None for w in (w_in, w_out))
        experts.append(ExpertWeights(w_in, w_out, b_in=b_in, b_out=b_out))
    return tuple(experts)
