"""GPU: one grouped matrix product per projection, as Pallas kernels on Triton that index the slab by slot.

Assignments sorted by expert are cut into blocks of equal size that never mix experts; a program multiplies one block
with one tile of its expert's weights, read in place. Runs interpreted on CPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.models.decoder import gate
from emoe_jax.moe.dispatch import Dispatch, combine, dispatch
from emoe_jax.moe.operands import Operands

_MIN_TILE = 16  # Triton's smallest matrix product
_MAX_TILE_OUT = 64
_MAX_TILE_IN = 64
_BLOCK_SIZES = (16, 32, 64)


def triton(operands: Operands, config: ModelConfig) -> Float[Array, "R D"]:
    """Raises `NotImplementedError` when the model's or the expert's size is no multiple of 16."""
    rows, ids, weights, slot_of_expert, experts, accumulator = operands
    if not supports(config):
        sizes = f"{config.hidden_size} and {config.expert_hidden}"
        raise NotImplementedError(f"the triton backend needs sizes divisible by {_MIN_TILE}, got {sizes}")
    groups = dispatch(ids, slot_of_expert, experts.capacity)
    block = _block_size(ids.size, slot_of_expert.shape[0])
    start, size = _blocks(groups, block)
    x = rows[jnp.pad(groups.row, (0, block))]  # the last block may look past the end

    def run(start: Array, size: Array, slot: Array, x: Array, w_in: Array, w_out: Array, interpret: bool) -> Array:
        product = partial(_grouped_product, start, size, slot, block=block, interpret=interpret)
        return product(gate(product(x, w_in), config).astype(x.dtype), w_out)

    inputs = (start, size, groups.slot[start], x, experts.w_in, experts.w_out)
    products = jax.lax.platform_dependent(
        *inputs, cpu=partial(run, interpret=True), default=partial(run, interpret=False)
    )
    return combine(products, groups, weights, accumulator)


def supports(config: ModelConfig) -> bool:
    """Whether `D` and `F` are multiples of Triton's smallest tile, so that the kernels can multiply them."""
    return config.hidden_size % _MIN_TILE == 0 and config.expert_hidden % _MIN_TILE == 0


def _block_size(assignments: int, num_experts: int) -> int:
    """The smallest block that holds an expert's mean share of the assignments, or the largest there is."""
    return next((size for size in _BLOCK_SIZES if assignments <= size * num_experts), _BLOCK_SIZES[-1])


def _blocks(groups: Dispatch, block: int) -> tuple[Int[Array, " blocks"], Int[Array, " blocks"]]:
    """First assignment and size of all blocks, expert by expert; trailing ones have size 0."""
    A, E = groups.order.shape[0], groups.size.shape[0]
    number = (groups.size + block - 1) // block
    end = jnp.cumsum(number)
    b = jnp.arange(A // block + min(A, E), dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(end, b, side="right"), E - 1).astype(jnp.int32)
    done = (b - (end - number)[expert]) * block
    size = jnp.where(b < end[-1], jnp.clip(groups.size[expert] - done, 0, block), 0)
    return jnp.where(size > 0, groups.start[expert] + done, 0), size


def _tile(size: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `size`."""
    return min(limit, size & -size)


def _grouped_product(
    start: Int[Array, " blocks"],
    size: Int[Array, " blocks"],
    slot: Int[Array, " blocks"],
    x: Float[Array, "padded_A I"],
    w: Float[Array, "C O I"],
    *,
    block: int,
    interpret: bool,
) -> Float[Array, "padded_A O"]:
    """`x[i] @ w[slot]^T` in float32 for every row of every block; rows of no block are left undefined.

    One program per block and tile of output features. The operands stay whole and the kernel indexes them; Pallas
    computes offsets in 64 bits for arrays over 4 GiB, so a slab of any size is safe.
    """
    tile = _tile(w.shape[1], _MAX_TILE_OUT)
    return pl.pallas_call(
        partial(_kernel, block=block, tile=tile, depth=_tile(w.shape[2], _MAX_TILE_IN)),
        grid=(start.shape[0], w.shape[1] // tile),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="moe_grouped_product",
    )(start, size, slot, x, w)


def _kernel(start_ref, size_ref, slot_ref, x_ref, w_ref, out_ref, *, block: int, tile: int, depth: int) -> None:
    b, first = pl.program_id(0), pl.program_id(1) * tile
    start, size, slot = start_ref[b], size_ref[b], slot_ref[b]

    @pl.when(size > 0)
    def _() -> None:
        inside = (jnp.arange(block) < size)[:, None]

        def step(i, total):
            at = pl.ds(i * depth, depth)
            x = plgpu.load(x_ref.at[pl.ds(start, block), at], mask=inside, other=0.0)
            w = plgpu.load(w_ref.at[slot, pl.ds(first, tile), at])
            # No TF32: its rounding would show in the router's choices further on.
            return total + plgpu.dot(x, w, trans_b=True, precision=jax.lax.Precision.HIGHEST)

        total = jax.lax.fori_loop(0, x_ref.shape[1] // depth, step, jnp.zeros((block, tile), jnp.float32))
        plgpu.store(out_ref.at[pl.ds(start, block), pl.ds(first, tile)], total, mask=inside)
