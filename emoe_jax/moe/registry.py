"""The interchangeable backends of the MoE op, by name."""

import dataclasses
from typing import Protocol

from jaxtyping import Array, Float

from emoe_jax.config import ModelConfig
from emoe_jax.moe.blocks import blocks
from emoe_jax.moe.gather import gather
from emoe_jax.moe.loop import loop
from emoe_jax.moe.operands import Operands
from emoe_jax.moe.ragged import ragged
from emoe_jax.moe.reference import reference
from emoe_jax.moe.triton import triton


class MoEBackend(Protocol):
    """The accumulator plus the weighted products of all assignments with a resident expert, in its dtype."""

    def __call__(self, operands: Operands, config: ModelConfig) -> Float[Array, "R D"]: ...


@dataclasses.dataclass(frozen=True)
class Backend:
    """`wave_exact`: waves over any slab placement give, bit for bit, what one call with all experts resident gives."""

    run: MoEBackend
    wave_exact: bool


BACKENDS: dict[str, Backend] = {
    "loop": Backend(loop, wave_exact=True),
    "blocks": Backend(blocks, wave_exact=True),
    "triton": Backend(triton, wave_exact=True),
    "ragged": Backend(ragged, wave_exact=False),
    "gather": Backend(gather, wave_exact=True),
    "reference": Backend(reference, wave_exact=False),
}
