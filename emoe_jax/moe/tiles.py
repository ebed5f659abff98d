"""How a Triton kernel multiplies rows with a tile of one slot's weights, by the format that they are stored in."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, Num

from emoe_jax.experts.blocks import FP8_BLOCK, MXFP4_BLOCK
from emoe_jax.moe.dequantise import e4m3, half_e8m0, is_blocked, scale_rows, twice_fp4
from emoe_jax.moe.kernel_config import MIN_TILE


class Tiles(NamedTuple):
    """The static facts of a matrix that a kernel reads tile by tile."""

    inputs: int
    """`I` of the matrix."""
    depth: int
    """Inputs that are read in one step."""
    covered: int
    """Inputs that all steps together read: those above `inputs` do not exist."""
    kind: Literal["plain", "channels", "fp8", "mxfp4"]
    """What has a scale: nothing, an output channel, or a block of one of the two formats."""
    part: int
    """Output features of gate, of up, or of all that there is."""

    @classmethod
    def of(cls, inputs: int, scales: Num[Array, "..."] | None, depth: int, part: int) -> "Tiles":
        """Of a matrix with these scales, of all slots, in steps of `depth` or of what comes closest in its format."""
        kind = "plain" if scales is None else "channels"
        if is_blocked(scales):
            kind = "mxfp4" if scales.dtype == jnp.uint8 else "fp8"
            depth = max(depth, 2 * MIN_TILE) if kind == "mxfp4" else min(depth, FP8_BLOCK)
        return cls(inputs, depth, pl.cdiv(inputs, depth) * depth, kind, part)

    @property
    def per_byte(self) -> int:
        """Numbers that lie in one number of the array."""
        return 2 if self.kind == "mxfp4" else 1

    def split(self, refs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Scales and biases among what a kernel gets of them: at most one of each."""
        has_scales = self.kind != "plain"
        return refs[:has_scales], refs[has_scales:]

    def columns(self, at: Int[Array, ""]) -> list[Int[Array, " block_I"]]:
        """The inputs of a step, in as many groups as a byte has numbers."""
        numbers = self.per_byte * jnp.arange(self.depth // self.per_byte)
        return [at + numbers + number for number in range(self.per_byte)]

    def known(self, columns: Int[Array, " block_I"]) -> Bool[Array, " block_I"] | None:
        """Which of these inputs exist; none where all that are read do, so that nothing is masked."""
        return None if self.covered == self.inputs else columns < self.inputs

    def product(
        self,
        xs: list[Float[Array, "block_R block_I"]],
        w_ref,
        scales_refs,
        slot: Int[Array, ""],
        first: Int[Array, ""],
        tile: int,
        wanted: Bool[Array, " block_O"] | None,
        at: Int[Array, ""],
    ) -> Float[Array, "block_R block_O"]:
        """Rows, whose inputs were read as `columns` says, times the outputs `first : first + tile` of a slot."""
        known, width = self.known(self.columns(at)[0]), self.depth // self.per_byte
        w = load(w_ref.at[slot, pl.ds(first, tile), pl.ds(at // self.per_byte, width)], wanted, known)
        if self.kind in ("plain", "channels"):
            return dot(xs[0], w)
        if self.kind == "fp8":  # a step is of one block of columns
            place = scales_refs[0].at[slot, scale_rows(first, tile, self.part), at // FP8_BLOCK]
            return dot(xs[0], e4m3(w)) * load_line(place, wanted)
        outputs, places = first + jnp.arange(tile), at // self.per_byte + jnp.arange(width)
        place = scales_refs[0].at[slot, outputs[:, None], (places // (MXFP4_BLOCK // 2))[None, :]]
        scale = half_e8m0(load(place, wanted, known))
        low, high = (twice_fp4(half) * scale for half in (w & 15, w >> 4))
        return dot(xs[0], low) + dot(xs[1], high)


def below(size: int, first: Int[Array, ""], tile: int) -> Bool[Array, " block_O"] | None:
    """Which of the features from `first` on exist; none where tiles fit exactly, so that nothing is masked."""
    return None if size % tile == 0 else first + jnp.arange(tile) < size


def both(
    first: Bool[Array, " block_O"] | None, second: Bool[Array, " block_I"] | None
) -> Bool[Array, "block_O block_I"] | Bool[Array, "block_O 1"] | Bool[Array, "1 block_I"] | None:
    """Where both of two masks of lines and of columns hold."""
    lines = None if first is None else first[:, None]
    columns = None if second is None else second[None, :]
    if lines is None or columns is None:
        return columns if lines is None else lines
    return lines & columns


def load(
    place, first: Bool[Array, " block_O"] | None, second: Bool[Array, " block_I"] | None
) -> Num[Array, "block_O block_I"]:
    """A tile of a matrix, zero where a mask of its lines or of its columns says so."""
    mask = both(first, second)
    return plgpu.load(place) if mask is None else plgpu.load(place, mask=mask, other=0)


def load_line(place, mask: Bool[Array, " block_O"] | None) -> Float[Array, "1 block_O"]:
    """A part of one slot's scales or bias, in float32, for the columns of a product."""
    numbers = plgpu.load(place) if mask is None else plgpu.load(place, mask=mask, other=0)
    return numbers.astype(jnp.float32)[None, :]


def dot(x: Float[Array, "block_R block_I"], w: Num[Array, "block_O block_I"]) -> Float[Array, "block_R block_O"]:
    """`x @ w^T` in float32. No TF32: its rounding would show in the router's choices further on."""
    return plgpu.dot(x, w.astype(x.dtype), trans_b=True, precision=jax.lax.Precision.HIGHEST)
