"""Choosing the next token, for a batch whose rows all ask for something else, with one compilation.

Whatever the parameters, the compiled function is the same; what is costly (noise and sorting over the vocabulary, top
log probabilities) runs only in steps in which a row needs it. A row's token depends on its own logits and parameters
alone, never on the rest of the batch.
"""

import dataclasses
from collections.abc import Sequence as Rows
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from emoe_jax.engine.request import MAX_LOGPROBS
from emoe_jax.engine.sequence import Sequence

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: the quotient would leave float32, and the result is the argmax anyway."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """Sampling parameters of `B` rows, in `SamplingParams`' meaning. Rows that pad the batch are greedy."""

    temperature: Float[Array | np.ndarray, " B"]
    top_p: Float[Array | np.ndarray, " B"]
    min_p: Float[Array | np.ndarray, " B"]
    top_k: Int32[Array | np.ndarray, " B"]
    seed: UInt32[Array | np.ndarray, "B 2"]
    step: Int32[Array | np.ndarray, " B"]

    @classmethod
    def of(cls, sequences: Rows[Sequence], size: int) -> "SamplingArrays":
        """NumPy arrays for the sequences, in order, padded to `size` rows."""
        if len(sequences) > size:
            raise ValueError(f"{len(sequences)} sequences do not fit a batch of {size}")
        arrays = cls(
            temperature=np.zeros(size, np.float32),
            top_p=np.ones(size, np.float32),
            min_p=np.zeros(size, np.float32),
            top_k=np.zeros(size, np.int32),
            seed=np.zeros((size, 2), np.uint32),
            step=np.zeros(size, np.int32),
        )
        for row, sequence in enumerate(sequences):
            params = sequence.params
            arrays.temperature[row] = params.temperature
            arrays.top_p[row] = params.top_p
            arrays.min_p[row] = params.min_p
            arrays.top_k[row] = params.top_k
            arrays.seed[row] = seed_words(sequence.seed, sequence.index)
            arrays.step[row] = len(sequence.generated)
        return arrays


class Sampled(NamedTuple):
    """`logprob` and `top_*` are of the raw distribution (before temperature and filters), zero when not wanted."""

    tokens: Int32[Array, " B"]
    logprob: Float[Array, " B"]
    top_ids: Int32[Array, "B n"]
    top_logprobs: Float[Array, "B n"]


def seed_words(seed: int, index: int) -> tuple[int, int]:
    """Key words of a 64-bit seed; the completions of one request (`index`) get different ones."""
    bits = seed & (2**64 - 1)
    return ((bits >> 32) + index) & 0xFFFFFFFF, bits & 0xFFFFFFFF


def sample(
    logits: Float[Array, "B V"],
    sampling: SamplingArrays,
    want_logprobs: Bool[Array, ""],
    num_top: int = MAX_LOGPROBS,
) -> Sampled:
    """One token per row: argmax at temperature 0, else a draw from the filtered distribution.

    Filters in order: temperature, top-k, top-p (the smallest set of most probable tokens that reaches `p` of what
    top-k left), min-p (relative to the most probable token). The noise of a row comes from its seed and the number of
    tokens it has generated, so a seed gives the same tokens in any batch and after a preemption.
    """
    logits = logits.astype(jnp.float32)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    is_random = jnp.asarray(sampling.temperature) >= GREEDY_BELOW
    tokens = jax.lax.cond(
        jnp.any(is_random),
        lambda: jnp.where(is_random, _draw(logits, sampling, is_random), greedy),
        lambda: greedy,
    )
    n = min(num_top, logits.shape[-1])
    logprob, top_ids, top_logprobs = jax.lax.cond(
        want_logprobs,
        lambda: _logprobs(logits, tokens, n),
        lambda: (
            jnp.zeros(tokens.shape, jnp.float32),
            jnp.zeros((*tokens.shape, n), jnp.int32),
            jnp.zeros((*tokens.shape, n), jnp.float32),
        ),
    )
    return Sampled(tokens, logprob, top_ids, top_logprobs)


def _draw(logits: Float[Array, "B V"], sampling: SamplingArrays, is_random: Bool[Array, " B"]) -> Int[Array, " B"]:
    """Gumbel-argmax over the tokens that the filters keep. Rows that are not random get a meaningless token."""
    V = logits.shape[-1]
    temperature = jnp.where(is_random, sampling.temperature, 1.0)[:, None]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature  # best token at 0: nothing overflows
    top_k = jnp.where((sampling.top_k <= 0) | (sampling.top_k > V), V, sampling.top_k)
    top_p = jnp.asarray(sampling.top_p)
    filtered = is_random & ((top_k < V) | (top_p < 1.0))
    last_value, last_id = jax.lax.cond(
        jnp.any(filtered),
        lambda: _last_kept(scaled, jnp.where(filtered, top_k, V), jnp.where(filtered, top_p, 1.0)),
        lambda: (jnp.full(top_k.shape, -jnp.inf, jnp.float32), jnp.full(top_k.shape, V, jnp.int32)),
    )
    ids = jnp.arange(V, dtype=jnp.int32)[None, :]
    keep = (scaled > last_value[:, None]) | ((scaled == last_value[:, None]) & (ids <= last_id[:, None]))
    keep &= scaled >= jnp.log(jnp.asarray(sampling.min_p))[:, None]
    noise = jax.vmap(_noise, in_axes=(0, 0, None))(jnp.asarray(sampling.seed), jnp.asarray(sampling.step), V)
    return jnp.argmax(jnp.where(keep, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def _last_kept(
    scaled: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> tuple[Float[Array, " B"], Int32[Array, " B"]]:
    """Value and id of the least token that top-k and top-p keep; of equal values the lower id counts as greater.

    Worked example, top_p 0.7, probabilities [.2, .5, .2, .1]: order 1, 0, 2, 3 and reached before each 0, .5, .7, .9;
    kept are those reached by less than 0.7, so the last is token 0.
    """
    V = scaled.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32)[None, :], scaled.shape)
    negated, order = jax.lax.sort((-scaled, ids), dimension=-1, num_keys=1, is_stable=True)
    rank = ids
    kept = rank < top_k[:, None]
    probs = jax.nn.softmax(jnp.where(kept, -negated, -jnp.inf), axis=-1)
    reached_before = jnp.cumsum(probs, axis=-1) - probs
    kept &= (reached_before < top_p[:, None]) | (top_p >= 1.0)[:, None] | (rank == 0)
    last = jnp.sum(kept, axis=-1, keepdims=True) - 1
    value = -jnp.take_along_axis(negated, last, axis=-1)[:, 0]
    return value, jnp.take_along_axis(order, last, axis=-1)[:, 0]


def _noise(seed: UInt32[Array, " 2"], step: Int32[Array, ""], size: int) -> Float[Array, " V"]:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), step)
    return jax.random.gumbel(key, (size,), jnp.float32)


def _logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], n: int
) -> tuple[Float[Array, " B"], Int32[Array, "B n"], Float[Array, "B n"]]:
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, n)
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0], top_ids.astype(jnp.int32), top_logprobs
