"""Weights in blocks with a scale each, made float32 where they are multiplied: parts of one slot, or whole matrices."""

from typing import TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Num, UInt8

from emoe_jax.experts.blocks import MXFP4_BLOCK, MXFP4_NAN

Blocks = tuple[Float[Array, "block_O block_I"], ...]
"""Output features of a slot's matrix in float32. Of numbers in four bits there are two arrays, for the inputs of even
and of odd number, because the two numbers of a byte are next to each other."""


def is_blocked(scales: Num[Array, "..."] | None) -> TypeGuard[Array]:
    """Whether these are scales of blocks, which apply to weights, and not to sums of products."""
    return scales is not None and scales.ndim == 3


def slot_blocks(
    w: UInt8[Array, "C O packed_I"], scales: UInt8[Array, "C O scaled_I"], slot: Array, first: Array, step: int
) -> Blocks:
    """Output features `first : first + step` of a slot's matrix, for the CPU backends."""
    rows, scale = (jax.lax.dynamic_slice(each, (slot, first, 0), (1, step, each.shape[2]))[0] for each in (w, scales))
    return _blocks(rows, scale)


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
    scales: Num[Array, "..."] | None,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "C O I"], Float[Array, "C O"] | None]:
    """What rows of `dtype` are multiplied with, and the scales of the sums; for backends that copy weights.

    Weights in blocks are copied as float32, which holds them exactly, and their sums have no scales.
    """
    if not is_blocked(scales):
        return w.astype(dtype), scales
    return jnp.stack(_blocks(w, scales), axis=-1).reshape(*w.shape[:-1], -1), None


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


def _blocks(w: UInt8[Array, "*lead packed_I"], scales: UInt8[Array, "*lead scaled_I"]) -> tuple[Array, ...]:
    """The numbers in the low and in the high halves of bytes."""
    scale = jnp.repeat(half_e8m0(scales), MXFP4_BLOCK // 2, axis=-1)
    return tuple(twice_fp4(half) * scale for half in (w & 15, w >> 4))
