"""The tensors that a checkpoint has for a weight of its experts, by the format that it stores experts in."""

import dataclasses
from typing import NamedTuple

from emoe_jax.checkpoint.family import Part
from emoe_jax.checkpoint.safetensors import WEIGHT_DTYPES
from emoe_jax.experts.blocks import MXFP4_BLOCK
from emoe_jax.experts.record_format import quantised_matrix


class StoredTensor(NamedTuple):
    """One tensor, and the dtypes that it may have, as safetensors spells them."""

    part: Part
    dtypes: tuple[str, ...]


def stored_tensors(part: Part, expert_format: str | None) -> tuple[StoredTensor, ...]:
    """The numbers of a part, then their scales where experts are quantised.

    Those of a fused tensor are one tensor for all experts. Rows that are stored in turn are so in each of them.
    """
    stack = () if part.index is None else part.shape[:1]
    if expert_format is None:
        return (StoredTensor(part, tuple(WEIGHT_DTYPES)),)
    if expert_format == "int8":
        scales = Part(f"{part.name}_scale", (*stack, part.rows), part.index, turns=part.turns)
        return StoredTensor(part, ("I8",)), StoredTensor(scales, ("F32",))
    if expert_format == "fp8":
        # In float32 (DeepSeek) or bfloat16 (Qwen).
        _, ((*shape,), _) = quantised_matrix("fp8", part.matrix)
        scales = Part(f"{part.name}_scale_inv", (*stack, *shape), part.index)
        return StoredTensor(part, ("F8_E4M3",)), StoredTensor(scales, tuple(WEIGHT_DTYPES))
    # OpenAI's layout: always [out, in], and a block's bytes are an axis of their own.
    rows, columns = part.matrix
    shape = (*stack, rows, columns // MXFP4_BLOCK)
    blocks = dataclasses.replace(part, name=f"{part.name}_blocks", shape=(*shape, MXFP4_BLOCK // 2), transposed=False)
    scales = dataclasses.replace(blocks, name=f"{part.name}_scales", shape=shape)
    return StoredTensor(blocks, ("U8",)), StoredTensor(scales, ("U8",))
