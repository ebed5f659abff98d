"""The paged KV cache on the device: its pages per layer, made, moved and resized."""

from collections.abc import Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from emoe_jax.attention import LayerKV
from emoe_jax.config import ModelConfig
from emoe_jax.scheduling.pages import PAGE_SIZE

KVCache = tuple[LayerKV, ...]
"""One `LayerKV` per layer. Donated to every step and returned by it."""

PAGES_MOVED = 32
"""Pages that are copied in one call."""


def page_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of one page over all layers."""
    return config.num_layers * PAGE_SIZE * config.kept_numbers * jnp.dtype(dtype).itemsize


def new_cache(config: ModelConfig, num_pages: int, dtype: str) -> KVCache:
    """Zeroed pages for every layer."""
    kind = config.num_kv_heads, config.head_dim, dtype, config.shared_value_dim
    return tuple(LayerKV.zeros(num_pages, *kind) for _ in range(config.num_layers))


@partial(jax.jit, donate_argnames=("cache",))
def move_pages(cache: LayerKV, sources: Int[Array, " n"], targets: Int[Array, " n"]) -> LayerKV:
    """Copy pages of a layer to other places, in place. Donates `cache`; page 0 to page 0 changes nothing."""
    return jax.tree.map(lambda pages: pages.at[targets].set(pages[sources]), cache)


def in_calls(moves: Mapping[int, int]) -> Iterator[Int32[np.ndarray, "2 n"]]:
    """Sources and targets of the calls of `move_pages` that copy each key to its value."""
    pairs = list(moves.items())
    for first in range(0, len(pairs), PAGES_MOVED):
        padded = np.zeros((2, PAGES_MOVED), np.int32)
        padded[:, : len(pairs) - first] = np.transpose(pairs[first : first + PAGES_MOVED])
        yield padded


@partial(jax.jit, static_argnames=("num_pages",))
def resize_pages(cache: LayerKV, *, num_pages: int) -> LayerKV:
    """A layer with another number of pages: its first ones, and zeros where it had none."""

    def resized(pages: Array) -> Array:
        missing = max(0, num_pages - pages.shape[0])
        return jnp.pad(pages[:num_pages], ((0, missing), (0, 0), (0, 0), (0, 0)))

    return jax.tree.map(resized, cache)
