"""Grouped-query and latent attention: `uncached` (a sequence to itself) and `paged` (over the KV cache)."""

from emoe_jax.attention.paged import attend, paged_attend
from emoe_jax.attention.pages import KVView, LayerKV, Places, write
from emoe_jax.attention.registry import BACKENDS

__all__ = ["BACKENDS", "KVView", "LayerKV", "Places", "attend", "paged_attend", "write"]
