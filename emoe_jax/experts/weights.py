"""The weights of one layer's experts on the device."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int8, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """`C` experts of one MoE layer, in Hugging Face's `[out, in]` orientation so that reading needs no transpose.

    Fi is `2F` (gate rows, then up rows) or `3F` (OpenMoE: gate, second gate, up). Quantised weights have scales, as
    their `RecordFormat` says: one for each output channel of int8 numbers, where what is computed with is
    `w_in * in_scales[..., None]`, or a matrix of them for blocks of numbers, which are bytes. A bias is a matrix of one
    input. Formats and families without have none of these arrays.
    """

    w_in: Float[Array, "C Fi D"] | Int8[Array, "C Fi D"] | UInt8[Array, "C Fi D"] | UInt8[Array, "C Fi packed_D"]
    w_out: Float[Array, "C D F"] | Int8[Array, "C D F"] | UInt8[Array, "C D F"] | UInt8[Array, "C D packed_F"]
    in_scales: Float[Array, "C Fi"] | Float[Array, "C scaled_Fi scaled_D"] | UInt8[Array, "C Fi scaled_D"] | None = None
    out_scales: Float[Array, "C D"] | Float[Array, "C scaled_D scaled_F"] | UInt8[Array, "C D scaled_F"] | None = None
    b_in: Float[Array, "C Fi 1"] | None = None
    b_out: Float[Array, "C D 1"] | None = None

    @property
    def capacity(self) -> int:
        """`C`, the slots of the layer."""
        return self.w_in.shape[0]
