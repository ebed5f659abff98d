"""GPU: two grouped matrix products as Pallas kernels on Triton that index the slab by slot.

The first kernel multiplies a block of rows with gate and up at once and writes the gated hidden rows, the second
multiplies these with the output projection. A program owns one block of one expert's assignments and one tile of its
weights, read in place. Quantised weights become numbers of the rows' dtype tile by tile. The scales of output channels
apply to the sums, and those of blocks to the tiles. The functions of `row_blocks` and `kernel_config` say which.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Int8, UInt8

from emoe_jax.config import ModelConfig
from emoe_jax.moe.activations import gate_in_kernel
from emoe_jax.moe.dispatch import combine, dispatch
from emoe_jax.moe.kernel_choice import table_for
from emoe_jax.moe.kernel_config import KernelTable, Tiling
from emoe_jax.moe.operands import Operands
from emoe_jax.moe.row_blocks import RowBlocks
from emoe_jax.moe.tiles import Tiles, below, both, load, load_line

ScalesAndBias = tuple[Array | None, Float[Array, "C O 1"] | None]
"""Of a matrix of every slot, None where there are none. Scales are of its output channels, or of its blocks."""


def triton(
    operands: Operands, config: ModelConfig, *, table: KernelTable | None = None, interpret: bool = False
) -> Float[Array, "R D"]:
    """`table` gives the tile sizes; None is those that are in use for these experts. `interpret` runs the kernels
    without a GPU, slowly."""
    rows, ids, weights, slot_of_expert, experts, accumulator = operands
    table = table or table_for(config, rows.dtype, experts)
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
    w: Float[Array, "C Fi D"] | Int8[Array, "C Fi D"] | UInt8[Array, "C Fi packed_D"],
    of_rows: ScalesAndBias,
    config: ModelConfig,
    tiling: Tiling,
    interpret: bool,
) -> Float[Array, "A F"]:
    """The hidden rows of all sorted assignments, in the dtype of `x`; those of absent experts stay undefined.

    The operands stay whole and the kernel indexes them; Pallas computes offsets in 64 bits for arrays over 4 GiB, so a
    slab of any size is safe.
    """
    F, tiles = config.expert_hidden, Tiles.of(x.shape[1], of_rows[0], tiling.depth, config.expert_hidden)
    return pl.pallas_call(
        partial(_hidden_kernel, config=config, tiling=tiling, tiles=tiles),
        grid=(blocks.start.shape[0], pl.cdiv(F, tiling.tile)),
        out_shape=jax.ShapeDtypeStruct((row.shape[0], F), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="moe_gated_hidden",
    )(*blocks, row, x, w, *_operands(*of_rows))


def _hidden_kernel(
    start_ref, size_ref, slot_ref, row_ref, x_ref, w_ref, *refs, config: ModelConfig, tiling: Tiling, tiles: Tiles
) -> None:
    *of_rows_refs, out_ref = refs
    scales_refs, bias_refs = tiles.split(of_rows_refs)
    b, first = pl.program_id(0), pl.program_id(1) * tiling.tile
    start, size, slot = start_ref[b], size_ref[b], slot_ref[b]
    F = out_ref.shape[1]

    @pl.when(size > 0)
    def _() -> None:
        inside = jnp.arange(tiling.rows) < size
        row = plgpu.load(row_ref.at[pl.ds(start, tiling.rows)], mask=inside, other=0)
        wanted = below(F, first, tiling.tile)
        firsts = [first + part * F for part in range(config.ffn_in_factor)]
        places = [pl.ds(part, tiling.tile) for part in firsts]

        def step(i, totals):
            at = i * tiles.depth
            # Rows are picked by number here, so that no kernel of its own has to gather them.
            xs = [
                load(x_ref.at[row[:, None], columns[None, :]], inside, tiles.known(columns))
                for columns in tiles.columns(at)
            ]
            parts = [tiles.product(xs, w_ref, scales_refs, slot, part, tiling.tile, wanted, at) for part in firsts]
            return tuple(total + part for total, part in zip(totals, parts, strict=True))

        zero = jnp.zeros((tiling.rows, tiling.tile), jnp.float32)
        totals = jax.lax.fori_loop(0, pl.cdiv(tiles.inputs, tiles.depth), step, (zero,) * config.ffn_in_factor)
        for scales_ref in scales_refs if tiles.kind == "channels" else ():
            scales = [load_line(scales_ref.at[slot, place], wanted) for place in places]
            totals = [total * scale for total, scale in zip(totals, scales, strict=True)]
        for bias_ref in bias_refs:
            biases = [load_line(bias_ref.at[slot, place], wanted) for place in places]
            totals = [total + bias for total, bias in zip(totals, biases, strict=True)]
        gated = gate_in_kernel(totals, config).astype(out_ref.dtype)
        corner = out_ref.at[pl.ds(start, tiling.rows), pl.ds(first, tiling.tile)]
        plgpu.store(corner, gated, mask=both(inside, wanted))


def _products(
    blocks: RowBlocks,
    hidden: Float[Array, "A F"],
    w: Float[Array, "C D F"] | Int8[Array, "C D F"] | UInt8[Array, "C D packed_F"],
    of_rows: ScalesAndBias,
    tiling: Tiling,
    splits: int,
    interpret: bool,
) -> Float[Array, "splits A D"]:
    """`hidden[i] @ w[slot]^T` in float32 for all sorted assignments, as sums over `splits` parts of the inputs."""
    (A, F), D = hidden.shape, w.shape[1]
    tiles = Tiles.of(F, of_rows[0], tiling.depth, D)
    part = pl.cdiv(pl.cdiv(F, splits), tiles.depth) * tiles.depth
    tiles = tiles._replace(covered=splits * part)
    return pl.pallas_call(
        partial(_product_kernel, tiling=tiling, part=part, tiles=tiles),
        grid=(blocks.start.shape[0], pl.cdiv(D, tiling.tile), splits),
        out_shape=jax.ShapeDtypeStruct((splits, A, D), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="moe_products",
    )(*blocks, hidden, w, *_operands(*of_rows))


def _product_kernel(
    start_ref, size_ref, slot_ref, x_ref, w_ref, *refs, tiling: Tiling, part: int, tiles: Tiles
) -> None:
    *of_rows_refs, out_ref = refs
    scales_refs, bias_refs = tiles.split(of_rows_refs)
    b, first, split = pl.program_id(0), pl.program_id(1) * tiling.tile, pl.program_id(2)
    start, size, slot = start_ref[b], size_ref[b], slot_ref[b]
    D = out_ref.shape[2]

    @pl.when(size > 0)
    def _() -> None:
        inside = jnp.arange(tiling.rows) < size
        wanted = below(D, first, tiling.tile)
        row = start + jnp.arange(tiling.rows)

        def step(i, total):
            at = split * part + i * tiles.depth
            xs = [
                load(x_ref.at[row[:, None], columns[None, :]], inside, tiles.known(columns))
                for columns in tiles.columns(at)
            ]
            return total + tiles.product(xs, w_ref, scales_refs, slot, first, tiling.tile, wanted, at)

        total = jnp.zeros((tiling.rows, tiling.tile), jnp.float32)
        total = jax.lax.fori_loop(0, part // tiles.depth, step, total)
        for scales_ref in scales_refs if tiles.kind == "channels" else ():
            total = total * load_line(scales_ref.at[slot, pl.ds(first, tiling.tile)], wanted)
        for bias_ref in bias_refs:  # once, in the first of the parts that are added up
            bias = load_line(bias_ref.at[slot, pl.ds(first, tiling.tile)], wanted)
            total = total + jnp.where(split == 0, bias, 0.0)
        corner = out_ref.at[split, pl.ds(start, tiling.rows), pl.ds(first, tiling.tile)]
        plgpu.store(corner, total, mask=both(inside, wanted))


def _operands(scales: Array | None, bias: Float[Array, "C O 1"] | None) -> list[Array]:
    """What a kernel gets of scales and biases, none where there are none. A bias becomes a vector."""
    vector = None if bias is None else bias.reshape(bias.shape[:2])
    return [each for each in (scales, vector) if each is not None]
