"""The weights of one layer's experts on the device."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """`C` experts of one MoE layer, in Hugging Face's `[out, in]` orientation so that reading needs no transpose.

    Fi is `2F` (gate rows, then up rows) or `3F` (OpenMoE: gate, second gate, up). Quantised weights have a scale for
    each output channel: what is computed with is `w_in * in_scales[..., None]`. A bias is a matrix of one input.
    Formats and families without have none of these arrays.
    """

    w_in: Float[Array, "C Fi D"] | Int8[Array, "C Fi D"]
    w_out: Float[Array, "C D F"] | Int8[Array, "C D F"]
    in_scales: Float[Array, "C Fi"] | None = None
    out_scales: Float[Array, "C D"] | None = None
    b_in: Float[Array, "C Fi 1"] | None = None
    b_out: Float[Array, "C D 1"] | None = None

    @property
    def capacity(self) -> int:
        """`C`, the slots of the layer."""
        return self.w_in.shape[0]
