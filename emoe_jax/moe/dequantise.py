"""Weights in blocks with a scale each, made float32 where they are multiplied: parts of one slot, or whole matrices."""

from typing import TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Num, UInt8

from emoe_jax.experts.blocks import FP8_BLOCK, MXFP4_BLOCK, MXFP4_NAN

Blocks = tuple[Float[Array, "block_O block_I"], ...]
"""Output features of a slot's matrix in float32. Of numbers in four bits there are two arrays, for the inputs of even
and of odd number, because the two numbers of a byte are next to each other."""

Scales = Float[Array, "C scaled_O scaled_I"] | UInt8[Array, "C O scaled_I"]
"""Of blocks of FP8 in float32, and of MXFP4 as powers of two."""


def is_blocked(scales: Num[Array, "..."] | None) -> TypeGuard[Array]:
    """Whether these are scales of blocks, which apply to weights, and not to sums of products."""
    return scales is not None and scales.ndim == 3


def slot_blocks(
    w: UInt8[Array, "C O packed_I"], scales: Scales, slot: Array, first: Array, step: int, part: int
) -> Blocks:
    """Output features `first : first + step` of a slot's matrix, for the CPU backends.

    The matrix consists of parts of `part` features, gate and up, and these features are of one of them.
    """
    rows = jax.lax.dynamic_slice(w, (slot, first, 0), (1, step, w.shape[2]))[0]
    if scales.dtype == jnp.uint8:
        return _fp4_blocks(rows, jax.lax.dynamic_slice(scales, (slot, first, 0), (1, step, scales.shape[2]))[0])
    return (_fp8_block(rows, scales[slot, scale_rows(first, step, part)]),)


def multiply(x: Float[Array, "n I"], blocks: Blocks) -> Float[Array, "n block_O"]:
    """`x` times these output features, in float32."""
    x = x.astype(jnp.float32)
    products = [
        jnp.dot(x[:, part :: len(blocks)], block.T, preferred_element_type=jnp.float32)
        for part, block in enumerate(blocks)
    ]
    return sum(products[1:], start=products[0])


def factor_and_scales(
    w: Float[Array, "C O I"] | Int8[Array, "C O I"] | UInt8[Array, "C O packed_I"],
    scales: Float[Array, "C O"] | Scales | None,
    dtype: jnp.dtype,
    part: int,
) -> tuple[Float[Array, "C O I"], Float[Array, "C O"] | None]:
    """What rows of `dtype` are multiplied with, and the scales of the sums; for backends that copy weights.

    Weights in blocks are copied as float32, and their sums have no scales. `part` is as in `slot_blocks`.
    """
    if not is_blocked(scales):
        return w.astype(dtype), scales
    if scales.dtype == jnp.uint8:
        return jnp.stack(_fp4_blocks(w, scales), axis=-1).reshape(*w.shape[:-1], -1), None
    parts = [scale_rows(jnp.int32(first), part, part) for first in range(0, w.shape[1], part)]
    return _fp8_block(w, scales[:, jnp.concatenate(parts)]), None


def scale_rows(first: Int[Array, ""], step: int, part: int) -> Int[Array, " block_O"]:
    """In which rows of the scales of FP8 those of output features `first : first + step` are.

    Worked example: parts of 130 features take two rows each, so those of feature 130 are in row 2.
    """
    within = first % part + jnp.arange(step, dtype=jnp.int32)
    return first // part * -(-part // FP8_BLOCK) + within // FP8_BLOCK


def e4m3(numbers: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """The numbers that these bytes mean. Made of their bits: not every GPU that runs a kernel knows the format."""
    bits = numbers.astype(jnp.int32)
    magnitude = bits & 127
    normal = jax.lax.bitcast_convert_type((magnitude << 20) + (120 << 23), jnp.float32)
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 2.0**-9, normal)
    value = jnp.where(magnitude == 127, jnp.nan, value)
    return jnp.where(bits >= 128, -value, value)


def twice_fp4(numbers: UInt8[Array, "..."] | Int[Array, "..."]) -> Float[Array, "..."]:
    """Twice the numbers (e2m1) that these four bits mean: integers, which need no table and no small exponents.

    Worked example: 0b0001 is 0.5, so 1; 0b1111 is -6, so -12.
    """
    bits = numbers.astype(jnp.int32)
    exponent = (bits >> 1) & 3
    magnitude = ((bits & 1) | jnp.where(exponent > 0, 2, 0)) << jnp.maximum(exponent - 1, 0)
    return jnp.where(bits & 8 != 0, -magnitude, magnitude).astype(jnp.float32)


def half_e8m0(scales: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Half of the powers of two that these bytes mean, and NaN for 255. Below 2^-126 they may be 0."""
    bits = (scales.astype(jnp.int32) << 23) | (scales == MXFP4_NAN).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32) * 0.5


def _fp4_blocks(w: UInt8[Array, "*lead packed_I"], scales: UInt8[Array, "*lead scaled_I"]) -> tuple[Array, ...]:
    """The numbers in the low and in the high halves of bytes."""
    scale = jnp.repeat(half_e8m0(scales), MXFP4_BLOCK // 2, axis=-1)
    return tuple(twice_fp4(half) * scale for half in (w & 15, w >> 4))


def _fp8_block(w: UInt8[Array, "*lead I"], scales: Float[Array, "*lead scaled_I"]) -> Float[Array, "*lead I"]:
    return e4m3(w) * jnp.repeat(scales, FP8_BLOCK, axis=-1)[..., : w.shape[-1]]
