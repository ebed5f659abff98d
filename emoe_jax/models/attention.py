"""The kinds of attention, but for the attending itself: what a layer makes of its input before, and of the result."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from emoe_jax.config import ModelConfig
from emoe_jax.models.modules import INIT_STDDEV, Linear, RMSNorm
from emoe_jax.models.rope import Rotation, rotate


class Attention(nnx.Module):
    """Projections, q/k norms and rotary positions; the owner of the cache does the attending."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = Linear(config.hidden_size, (N + 2 * K) * H, rngs=rngs, bias=config.qkv_bias)
        self.out = Linear(N * H, config.hidden_size, rngs=rngs, bias=config.output_bias)
        self.sinks = nnx.Param(jnp.zeros((N,))) if config.attention_sinks else None
        if config.qk_norm != "none":
            q_size, k_size = (H, H) if config.qk_norm == "head" else (N * H, K * H)
            self.q_norm = RMSNorm(q_size, config.norm_eps)
            self.k_norm = RMSNorm(k_size, config.norm_eps)

    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries and keys rotated to their positions, and values."""
        config = self.config
        B, T, _ = x.shape
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        q, k, v = jnp.split(self.qkv(x), [N * H, (N + K) * H], axis=-1)
        if config.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if config.clip_qkv is not None:
            q, k, v = (jnp.clip(z, -config.clip_qkv, config.clip_qkv) for z in (q, k, v))
        q, k, v = q.reshape(B, T, N, H), k.reshape(B, T, K, H), v.reshape(B, T, K, H)
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        interleaved = config.rope.interleaved
        return rotate(q, rotation, interleaved), rotate(k, rotation, interleaved), v

    def output(self, attended: Float[Array, "B T N Hv"]) -> Float[Array, "B T D"]:
        """What the heads attended to, as a part of the residual stream."""
        return self.out(attended.reshape(*attended.shape[:2], -1))


class LatentAttention(nnx.Module):
    """Attention of all heads to one vector per token, in the form that reads nothing but these vectors (DeepSeek-V2).

    A token's `latent` is a normed projection of its hidden state, and `rope` a rotated part of a key. Head `n` has keys
    `[K_n latent, rope]` and values `V_n latent`, whose maps `K_n` and `V_n` are moved to the query and to the output:

        score = [K_n^T q_nope, q_rope] . [latent, rope]
        attended = V_n (sum of share * latent)

    So the owner of the cache has one kv head whose keys are `[latent, rope]` and whose values are `latent`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.latent is not None
        self.config, self.latent = config, config.latent
        latent, N, D = self.latent, config.num_heads, config.hidden_size
        self.down = Linear(D, (latent.q_rank or 0) + latent.key_dim, rngs=rngs, bias=config.qkv_bias)
        self.q = Linear(latent.q_rank or D, N * (latent.nope_dim + latent.rope_dim), rngs=rngs)
        self.q_norm = None if latent.q_rank is None else RMSNorm(latent.q_rank, latent.norm_eps)
        self.latent_norm = RMSNorm(latent.kv_rank, latent.norm_eps)
        self.key_map, self.value_map = (
            nnx.Param(jax.random.normal(rngs.params(), (N * size, latent.kv_rank)) * INIT_STDDEV)
            for size in (latent.nope_dim, latent.value_dim)
        )
        self.out = Linear(N * latent.value_dim, D, rngs=rngs, bias=config.output_bias)
        self.sinks = None

    def project(
        self, x: Float[Array, "B T D"], rotation: Rotation
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K Hv"]]:
        """Queries that the keys' maps are moved to, the keys of the one kv head, and their first numbers as values."""
        latent, N = self.latent, self.config.num_heads
        low = self.down(x)
        if self.q_norm is not None:
            x, low = jnp.split(low, [low.shape[-1] - latent.key_dim], axis=-1)
            x = self.q_norm(x)
        q_nope, q_rope = jnp.split(self.q(x).reshape(*x.shape[:2], N, -1), [latent.nope_dim], axis=-1)
        vector, k_rope = jnp.split(low, [latent.kv_rank], axis=-1)
        values = self.latent_norm(vector)[:, :, None, :]
        interleaved = self.config.rope.interleaved
        keys = jnp.concatenate([values, rotate(k_rope[:, :, None, :], rotation, interleaved)], axis=-1)
        mapped = jnp.einsum("BTNn,Nnr->BTNr", q_nope, self.key_map[...].reshape(N, latent.nope_dim, -1))
        queries = jnp.concatenate([mapped, rotate(q_rope, rotation, interleaved)], axis=-1)
        return queries, keys, values

    def output(self, attended: Float[Array, "B T N Hv"]) -> Float[Array, "B T D"]:
        """What the heads attended to, mapped to their values, as a part of the residual stream."""
        maps = self.value_map[...].reshape(self.config.num_heads, self.latent.value_dim, -1)
        values = jnp.einsum("BTNr,Nnr->BTNn", attended, maps)
        return self.out(values.reshape(*values.shape[:2], -1))
