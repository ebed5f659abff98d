"""`AnswerNetwork`: a small network that corrects the forecast of an answer's next wishes, in a few matrix products.

A linear forecast errs by the same amount whether an expert is wished for often or hardly ever. The network works on
the logarithm of the forecast instead, which is what decides about experts that are wished for rarely. Of a single
request the mean of both forecasts is better than either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from emoe_jax.policies.rule import Matrix, namespace

FLOOR = 0.03
"""Share of an even rate that is added before a logarithm is taken."""


class AnswerNetwork(NamedTuple):
    """Logits of a layer's experts: the logarithm of its own forecast, scaled, plus what decayed means say of it."""

    scale: Float[Any, " ME"]
    bias: Float[Any, " ME"]
    linear: Float[Any, "latent ME"]
    up: Float[Any, "latent hidden"]
    up_bias: Float[Any, " hidden"]
    down: Float[Any, "hidden ME"]

    def logits(self, log_own: Float[Any, "*lead ME"], linear: Any, hidden: Any) -> Float[Any, "*lead ME"]:
        """`linear` and `hidden` are the latent means times the matrices of those names, the second before its bias."""
        xp, lead = namespace(log_own), (1,) * (log_own.ndim - 1)
        scale, bias, up_bias = (vector.reshape(*lead, -1) for vector in (self.scale, self.bias, self.up_bias))
        return scale * log_own + bias + linear + xp.maximum(hidden + up_bias, 0) @ self.down


def log_own(own: Matrix, requests: Any, top_k: int) -> Float[Any, "*lead ME"]:
    """Logarithm of one request's share of the forecast `own`, which is that of `requests` together."""
    xp = namespace(own)
    even = top_k / own.shape[-1]
    each = xp.maximum(own / (even * requests[..., None, None]), 0)
    return xp.log(each + FLOOR).reshape(*own.shape[:-2], -1)


def num_requests(rates: Matrix, top_k: int) -> Float[Any, "*lead"]:
    """How many requests were planned for; 1 where nothing was planned."""
    xp = namespace(rates)
    return xp.maximum(rates.sum((-2, -1)) / np.float32(rates.shape[-2] * top_k), np.float32(1))


def network_share(requests: Any) -> Float[Any, "*lead"]:
    """The network's part of the forecast: half for one request. Several requests wish for a mixture, which a softmax of
    their mean is not, and the linear forecast is the sum of theirs."""
    return np.float32(0.5) / (requests * requests)


def wishes(logits: Float[Any, "*lead ME"], shape: tuple[int, ...], requests: Any, top_k: int) -> Matrix:
    """Wishes per step of `requests` requests; each layer sums to `top_k` for each of them."""
    xp = namespace(logits)
    by_layer = logits.reshape(shape)
    powers = xp.exp(by_layer - by_layer.max(-1, keepdims=True))
    return powers * (np.float32(top_k) * requests[..., None, None] / powers.sum(-1, keepdims=True))
