"""GPU: two grouped matrix products as Pallas kernels on Triton that index the slab by slot.

The first kernel multiplies a block of rows with gate and up at once and writes the gated hidden rows, the second
multiplies these with the output projection. A program owns one block of one expert's assignments and one tile of its
weights, read in place. Quantised weights become numbers of the rows' dtype tile by tile, and the sums get the scales of
their output channels. The functions of `row_blocks` and `kernel_config` say which.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, Int8

from emoe_jax.config import ModelConfig
from emoe_jax.moe.activations import gate_in_kernel
from emoe_jax.moe.dispatch import combine, dispatch
from emoe_jax.moe.kernel_config import DEFAULT_TABLE, KernelTable, Tiling
from emoe_jax.moe.operands import Operands
from emoe_jax.moe.row_blocks import RowBlocks

ScalesAndBias = tuple[Float[Array, "C O"] | None, Float[Array, "C O 1"] | None]
"""Of the output channels of a matrix of every slot, None where there are none."""


def triton(
    operands: Operands, config: ModelConfig, *, table: KernelTable = DEFAULT_TABLE, interpret: bool = False
) -> Float[Array, "R D"]:
    """`table` gives the tile sizes. `interpret` runs the kernels without a GPU, slowly."""
    rows, ids, weights, slot_of_expert, experts, accumulator = operands
    kernels = table.choose(ids.size, slot_of_expert.shape[0])
    groups = dispatch(ids, slot_of_expert, experts.capacity)
    blocks = RowBlocks.of(groups, kernels.rows)
    D, F, itemsize = rows.shape[1], config.expert_hidden, rows.dtype.itemsize
    tiling = kernels.tiling_in(D, F, config.ffn_in_factor, itemsize)
    of_rows = experts.in_scales, experts.b_in
    hidden = _gated_hidden(blocks, groups.row, rows, experts.w_in, of_rows, config, tiling, interpret)
    splits = kernels.splits(blocks.start.shape[0], F, D, itemsize)
    tiling = kernels.tiling_out(F, D, itemsize)
    of_rows = experts.out_scales, experts.b_out
    products = _products(blocks, hidden, experts.w_out, of_rows, tiling, splits, interpret)
    total = products[0]
    for part in products[1:]:  # in this order, so that the sum has the same bits in every wave
        total = total + part
    return combine(total, groups, weights, accumulator)


def _gated_hidden(
    blocks: RowBlocks,
    row: Int[Array, " A"],
    x: Float[Array, "R D"],
    w: Float[Array, "C Fi D"] | Int8[Array, "C Fi D"],
    of_rows: ScalesAndBias,
    config: ModelConfig,
    tiling: Tiling,
    interpret: bool,
) -> Float[Array, "A F"]:
    """The hidden rows of all sorted assignments, in the dtype of `x`; those of absent experts stay undefined.

    The operands stay whole and the kernel indexes them; Pallas computes offsets in 64 bits for arrays over 4 GiB, so a
    slab of any size is safe.
    """
    F = config.expert_hidden
    return pl.pallas_call(
        partial(_hidden_kernel, config=config, tiling=tiling, is_scaled=of_rows[0] is not None),
        grid=(blocks.start.shape[0], pl.cdiv(F, tiling.tile)),
        out_shape=jax.ShapeDtypeStruct((row.shape[0], F), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="moe_gated_hidden",
    )(*blocks, row, x, w, *_operands(of_rows))


def _hidden_kernel(
    start_ref, size_ref, slot_ref, row_ref, x_ref, w_ref, *refs, config: ModelConfig, tiling: Tiling, is_scaled: bool
) -> None:
    *of_rows_refs, out_ref = refs
    scales_refs, bias_refs = of_rows_refs[:is_scaled], of_rows_refs[is_scaled:]  # at most one of each
    b, first = pl.program_id(0), pl.program_id(1) * tiling.tile
    start, size, slot = start_ref[b], size_ref[b], slot_ref[b]
    D, F = x_ref.shape[1], out_ref.shape[1]

    @pl.when(size > 0)
    def _() -> None:
        inside = jnp.arange(tiling.rows) < size
        row = plgpu.load(row_ref.at[pl.ds(start, tiling.rows)], mask=inside, other=0)
        wanted = _below(F, first, tiling.tile)
        places = [pl.ds(first + part * F, tiling.tile) for part in range(config.ffn_in_factor)]

        def step(i, totals):
            at = i * tiling.depth
            known = _below(D, at, tiling.depth)
            # Rows are picked by number here, so that no kernel of its own has to gather them.
            x = _load(x_ref.at[row[:, None], (at + jnp.arange(tiling.depth))[None, :]], inside, known)
            parts = [_load(w_ref.at[slot, place, pl.ds(at, tiling.depth)], wanted, known) for place in places]
            return tuple(total + _dot(x, w) for total, w in zip(totals, parts, strict=True))

        zero = jnp.zeros((tiling.rows, tiling.tile), jnp.float32)
        totals = jax.lax.fori_loop(0, pl.cdiv(D, tiling.depth), step, (zero,) * config.ffn_in_factor)
        for scales_ref in scales_refs:
            scales = [_load_line(scales_ref.at[slot, place], wanted) for place in places]
            totals = [total * scale for total, scale in zip(totals, scales, strict=True)]
        for bias_ref in bias_refs:
            biases = [_load_line(bias_ref.at[slot, place], wanted) for place in places]
            totals = [total + bias for total, bias in zip(totals, biases, strict=True)]
        gated = gate_in_kernel(totals, config).astype(out_ref.dtype)
        corner = out_ref.at[pl.ds(start, tiling.rows), pl.ds(first, tiling.tile)]
        plgpu.store(corner, gated, mask=_mask(inside, wanted))


def _products(
    blocks: RowBlocks,
    hidden: Float[Array, "A F"],
    w: Float[Array, "C D F"] | Int8[Array, "C D F"],
    of_rows: ScalesAndBias,
    tiling: Tiling,
    splits: int,
    interpret: bool,
) -> Float[Array, "splits A D"]:
    """`hidden[i] @ w[slot]^T` in float32 for all sorted assignments, as sums over `splits` parts of the inputs."""
    (A, F), D = hidden.shape, w.shape[1]
    part = pl.cdiv(pl.cdiv(F, splits), tiling.depth) * tiling.depth
    return pl.pallas_call(
        partial(_product_kernel, tiling=tiling, part=part, is_scaled=of_rows[0] is not None),
        grid=(blocks.start.shape[0], pl.cdiv(D, tiling.tile), splits),
        out_shape=jax.ShapeDtypeStruct((splits, A, D), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="moe_products",
    )(*blocks, hidden, w, *_operands(of_rows))


def _product_kernel(
    start_ref, size_ref, slot_ref, x_ref, w_ref, *refs, tiling: Tiling, part: int, is_scaled: bool
) -> None:
    *of_rows_refs, out_ref = refs
    scales_refs, bias_refs = of_rows_refs[:is_scaled], of_rows_refs[is_scaled:]  # at most one of each
    b, first, split = pl.program_id(0), pl.program_id(1) * tiling.tile, pl.program_id(2)
    start, size, slot = start_ref[b], size_ref[b], slot_ref[b]
    (_, D, F), splits = w_ref.shape, out_ref.shape[0]

    @pl.when(size > 0)
    def _() -> None:
        inside = jnp.arange(tiling.rows) < size
        wanted = _below(D, first, tiling.tile)

        def step(i, total):
            at = split * part + i * tiling.depth
            known = None if splits * part == F else at + jnp.arange(tiling.depth) < F
            x = _load(x_ref.at[pl.ds(start, tiling.rows), pl.ds(at, tiling.depth)], inside, known)
            w = _load(w_ref.at[slot, pl.ds(first, tiling.tile), pl.ds(at, tiling.depth)], wanted, known)
            return total + _dot(x, w)

        total = jnp.zeros((tiling.rows, tiling.tile), jnp.float32)
        total = jax.lax.fori_loop(0, part // tiling.depth, step, total)
        for scales_ref in scales_refs:
            total = total * _load_line(scales_ref.at[slot, pl.ds(first, tiling.tile)], wanted)
        for bias_ref in bias_refs:  # once, in the first of the parts that are added up
            bias = _load_line(bias_ref.at[slot, pl.ds(first, tiling.tile)], wanted)
            total = total + jnp.where(split == 0, bias, 0.0)
        corner = out_ref.at[split, pl.ds(start, tiling.rows), pl.ds(first, tiling.tile)]
        plgpu.store(corner, total, mask=_mask(inside, wanted))


def _below(size: int, first: Int[Array, ""], tile: int) -> Bool[Array, " block_O"] | None:
    """Which of the features from `first` on exist; none where tiles fit exactly, so that nothing is masked."""
    return None if size % tile == 0 else first + jnp.arange(tile) < size


def _mask(
    first: Bool[Array, " block_O"] | None, second: Bool[Array, " block_I"] | None
) -> Bool[Array, "block_O block_I"] | Bool[Array, "block_O 1"] | Bool[Array, "1 block_I"] | None:
    """Where both of two masks of lines and of columns hold."""
    lines = None if first is None else first[:, None]
    columns = None if second is None else second[None, :]
    if lines is None or columns is None:
        return columns if lines is None else lines
    return lines & columns


def _load(
    place, first: Bool[Array, " block_O"] | None, second: Bool[Array, " block_I"] | None
) -> Float[Array, "block_O block_I"] | Int8[Array, "block_O block_I"]:
    """A tile of a matrix, zero where a mask of its lines or of its columns says so."""
    mask = _mask(first, second)
    return plgpu.load(place) if mask is None else plgpu.load(place, mask=mask, other=0)


def _operands(of_rows: ScalesAndBias) -> list[Array]:
    """What a kernel gets of scales and biases: vectors, none where there are none."""
    return [each.reshape(each.shape[:2]) for each in of_rows if each is not None]


def _load_line(place, mask: Bool[Array, " block_O"] | None) -> Float[Array, "1 block_O"]:
    """A part of one slot's scales or bias, in float32, for the columns of a product."""
    numbers = plgpu.load(place) if mask is None else plgpu.load(place, mask=mask, other=0)
    return numbers.astype(jnp.float32)[None, :]


def _dot(
    x: Float[Array, "block_R block_I"], w: Float[Array, "block_O block_I"] | Int8[Array, "block_O block_I"]
) -> Float[Array, "block_R block_O"]:
    """`x @ w^T` in float32. No TF32: its rounding would show in the router's choices further on."""
    return plgpu.dot(x, w.astype(x.dtype), trans_b=True, precision=jax.lax.Precision.HIGHEST)
