"""Attention over pages of keys and values: `write` new rows, then `attend`. `paged_attend` does both for one view."""

import jax
from jaxtyping import Array, Float

from emoe_jax.attention.operands import Operands
from emoe_jax.attention.pages import KVView, LayerKV, write
from emoe_jax.attention.registry import BACKENDS
from emoe_jax.config import ModelConfig
from emoe_jax.models.decoder import AttendFunction
from emoe_jax.platforms import default_platform


@jax.named_scope("attend")
def attend(
    q: Float[Array, "B T N H"],
    cache: LayerKV,
    view: KVView,
    *,
    window: int | None,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
    backend: str = "auto",
    platform: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Softmax attention of rows to the positions that they see, read from the pages in place. Writes nothing.

    A row sees the positions up to its own, at most `window` of them; their keys and values must have been written. A
    query head `n` reads kv head `n // (N / K)`. A score is `scale` times the product of a query and a key. `sinks` has
    a logit per head that takes part in the softmax and has no value. Scores and sums are float32, the result has the
    dtype of `q`. Rows of padding get zeros.

    What pages hold outside a row's context (stale values, padding, the trash page) cannot reach it, even if it is not
    finite. A row that sees a key of NaN or a value that is not finite gets numbers that are not finite, even where the
    weight of that value underflows to 0.

    `T` is 1 for decoding rows. Tiles of a prompt's rows have `T` of 64 or so. Cost follows the contexts at hand and not
    the width of the block tables.

    `auto` goes by `platform` (`cpu`, `cuda`, ...; by default that of JAX's default device): `triton` on CUDA and
    `blocks` elsewhere.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose auto or one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = _best(platform or default_platform())
    return BACKENDS[backend](Operands(q, cache, view, sinks, window, scale))


def _best(platform: str) -> str:
    return "triton" if platform == "cuda" else "blocks"


def paged_attend(config: ModelConfig, window: int | None, cache: LayerKV, view: KVView) -> AttendFunction:
    """`write` the new keys and values of the rows of a view to their pages, then let the rows `attend`."""

    def attend_fn(q: Array, k: Array, v: Array, sinks: Array | None = None) -> tuple[Array, LayerKV]:
        keys, values = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        written = write(cache, keys, values, view.places())
        return attend(q, written, view, window=window, scale=config.attention_scale, sinks=sinks), written

    return attend_fn
