"""The interchangeable backends of paged attention, by name."""

from functools import partial
from typing import Protocol

from jaxtyping import Array, Float

from emoe_jax.attention.blocks import blocks
from emoe_jax.attention.operands import Operands
from emoe_jax.attention.reference import reference
from emoe_jax.attention.triton import triton


class AttentionBackend(Protocol):
    """What `attend` promises, for one kind of device."""

    def __call__(self, operands: Operands) -> Float[Array, "B T N Hv"]: ...


BACKENDS: dict[str, AttentionBackend] = {
    "blocks": blocks,
    "triton": triton,
    "triton-interpreted": partial(triton, interpret=True),
    "reference": reference,
}
