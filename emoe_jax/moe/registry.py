"""The interchangeable backends of the MoE op, by name."""

import dataclasses
from functools import partial
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
    """One way to compute the op, and where it may run."""

    run: MoEBackend
    wave_exact: bool
    """Waves over any slab placement give, bit for bit, what one call with all experts resident gives."""
    platforms: tuple[str, ...] | None = None
    """The platforms that it is made for; none is all. On others it would not run, or stall the host in every loop."""

    def runs_on(self, platform: str) -> bool:
        """Whether a step for `platform` may use it."""
        return self.platforms is None or platform in self.platforms


BACKENDS: dict[str, Backend] = {
    "loop": Backend(loop, wave_exact=True, platforms=("cpu",)),
    "blocks": Backend(blocks, wave_exact=True, platforms=("cpu",)),
    "triton": Backend(triton, wave_exact=True, platforms=("cuda",)),
    "triton-interpreted": Backend(partial(triton, interpret=True), wave_exact=True, platforms=("cpu",)),
    "ragged": Backend(ragged, wave_exact=False),
    "gather": Backend(gather, wave_exact=True),
    "reference": Backend(reference, wave_exact=False),
}


def check_backend(name: str, platform: str) -> None:
    """Raises `ValueError` for a backend that is unknown or not made for `platform`."""
    if name not in BACKENDS:
        raise ValueError(f"unknown MoE backend {name!r}; choose auto or one of {', '.join(BACKENDS)}")
    if not BACKENDS[name].runs_on(platform):
        made_for = ", ".join(BACKENDS[name].platforms or ())
        here = ", ".join(other for other, entry in BACKENDS.items() if entry.runs_on(platform))
        raise ValueError(f"the MoE backend {name!r} is made for {made_for}, not for {platform}; choose one of {here}")
