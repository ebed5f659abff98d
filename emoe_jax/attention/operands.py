"""What a backend of paged attention gets."""

from typing import NamedTuple

from jaxtyping import Array, Float

from emoe_jax.attention.pages import KVView, LayerKV


class Operands(NamedTuple):
    """Queries, the pages they read, and the rule of what they see. The fields are those of `attend`."""

    q: Float[Array, "B T N H"]
    cache: LayerKV
    view: KVView
    sinks: Float[Array, " N"] | None
    window: int | None
    scale: float
