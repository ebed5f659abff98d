"""How one expert is stored, moved and multiplied: named arrays, and the contiguous record that holds them."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from emoe_jax.config import ModelConfig
from emoe_jax.errors import ConfigError
from emoe_jax.experts.blocks import FP8_BLOCK, MXFP4_BLOCK
from emoe_jax.experts.weights import ExpertWeights

QUANTISED = ("int8", "fp8", "mxfp4")
"""The formats whose weights have scales."""


class RecordArray(NamedTuple):
    """One array of an expert. `name` is the field of `ExpertWeights` that holds it for the `C` slots of a layer."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class RecordFormat:
    """The arrays of one expert, in the order of the fields of `ExpertWeights`.

    A record is these arrays one after the other, without gaps. It is moved as a flat array of `dtype`, in which arrays
    of another dtype lie as their bytes.

    - A plain format has the name of a dtype, and two arrays of it: `w_in` and `w_out`.
    - `int8` is symmetric, with one scale per output channel: the weight is `w_in[o, i] * in_scales[o]`. The numbers
      are -127 to 127, and the scales float32.
    - `mxfp4` has numbers of four bits (e2m1), two in a byte, the first in its low half. 32 neighbours of a row have a
      scale in common: a byte `s` for `2**(s - 127)`, where 255 is not a number.
    - `fp8` has numbers of eight bits (e4m3), kept as bytes. A block of 128 rows and 128 columns has one float32 scale.
      Blocks of the gate, and of each other part of `w_in`, begin with its first row, and those at an edge are smaller.
    - Biases of a family that has them follow, as they are; beside quantised weights they are float32.
    """

    name: str
    arrays: tuple[RecordArray, ...]

    @classmethod
    def of(cls, config: ModelConfig, name: str | np.dtype) -> "RecordFormat":
        """The format of this name for a model's experts. It may differ from what the checkpoint stores.

        Raises `ConfigError` where its blocks do not fit the model's experts.
        """
        shapes = config.expert_in_shape, config.expert_out_shape
        if str(name) in QUANTISED:
            return cls._quantised(str(name), *shapes, config.expert_bias, config.ffn_in_factor)
        return cls.plain(*shapes, np.dtype(jnp.dtype(name)), config.expert_bias)

    @classmethod
    def plain(
        cls, in_shape: tuple[int, int], out_shape: tuple[int, int], dtype: np.dtype, has_biases: bool = False
    ) -> "RecordFormat":
        """Weights in a floating-point dtype, as they are."""
        weights = RecordArray("w_in", in_shape, dtype), RecordArray("w_out", out_shape, dtype)
        return cls(str(dtype), (*weights, *(_biases(in_shape, out_shape, dtype) if has_biases else ())))

    @classmethod
    def int8(cls, in_shape: tuple[int, int], out_shape: tuple[int, int], has_biases: bool = False) -> "RecordFormat":
        """Weights in eight bits with a scale per output channel."""
        return cls._quantised("int8", in_shape, out_shape, has_biases)

    @classmethod
    def mxfp4(cls, in_shape: tuple[int, int], out_shape: tuple[int, int], has_biases: bool = False) -> "RecordFormat":
        """Weights in four bits with a scale per 32 neighbours. Raises `ConfigError` where rows are no whole blocks."""
        return cls._quantised("mxfp4", in_shape, out_shape, has_biases)

    @classmethod
    def fp8(cls, in_shape: tuple[int, int], out_shape: tuple[int, int], parts: int = 2) -> "RecordFormat":
        """Weights in eight bits with a scale per block of 128 x 128; `w_in` has so many parts, gate and up."""
        return cls._quantised("fp8", in_shape, out_shape, False, parts)

    @classmethod
    def _quantised(
        cls, name: str, in_shape: tuple[int, int], out_shape: tuple[int, int], has_biases: bool, parts: int = 1
    ) -> "RecordFormat":
        """`w_in` has so many parts, each of which is a matrix by itself."""
        w_in, in_scales = quantised_matrix(name, in_shape, parts)
        w_out, out_scales = quantised_matrix(name, out_shape)
        arrays = {"w_in": w_in, "w_out": w_out, "in_scales": in_scales, "out_scales": out_scales}
        biases = _biases(in_shape, out_shape, np.dtype(np.float32)) if has_biases else ()
        return cls(name, (*(RecordArray(field, *kind) for field, kind in arrays.items()), *biases))

    @property
    def dtype(self) -> np.dtype:
        """Of a record as a whole: that of the weights."""
        return self.arrays[0].dtype

    @property
    def is_quantised(self) -> bool:
        """Whether the weights have scales."""
        return self.name in QUANTISED

    @property
    def size(self) -> int:
        """Numbers in one record, in its dtype."""
        return self.nbytes // self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of one record, scales included."""
        return sum(array.nbytes for array in self.arrays)

    def views(self, record: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays as views of a flat record of `size` numbers; writing to them fills the record."""
        if record.shape != (self.size,) or record.dtype != self.dtype:
            raise ValueError(
                f"record is {record.dtype}[{record.shape}]; an expert of this model is {self.dtype}[{self.size}]"
            )
        found, start = [], 0
        for array in self.arrays:
            numbers = array.nbytes // self.dtype.itemsize
            found.append(record[start : start + numbers].view(array.dtype).reshape(array.shape))
            start += numbers
        return tuple(found)

    def weights(self, arrays: Iterable[Any]) -> ExpertWeights:
        """Experts of these arrays, which are in the order of the format, one for each slot."""
        return ExpertWeights(**{array.name: jnp.array(of) for array, of in zip(self.arrays, arrays, strict=True)})

    def empty_weights(self, capacity: int) -> ExpertWeights:
        """Zeroed device arrays for `capacity` slots."""
        return ExpertWeights(**{array.name: jnp.zeros((capacity, *array.shape), array.dtype) for array in self.arrays})


ArrayKind = tuple[tuple[int, ...], np.dtype]
"""Shape and dtype of an array."""


def quantised_matrix(name: str, shape: tuple[int, int], parts: int = 1) -> tuple[ArrayKind, ArrayKind]:
    """The numbers and the scales of a matrix of this shape in a quantised format.

    The matrix may be `parts` of them, one above the other. Raises `ConfigError` where blocks do not fit the shape.
    """
    rows, columns = shape
    if name == "int8":
        return (shape, np.dtype(np.int8)), ((rows,), np.dtype(np.float32))
    if name == "fp8":
        scales = parts * -(-(rows // parts) // FP8_BLOCK), -(-columns // FP8_BLOCK)
        return (shape, np.dtype(np.uint8)), (scales, np.dtype(np.float32))
    if columns % MXFP4_BLOCK:
        raise ConfigError(f"experts have a matrix of {rows} x {columns}; MXFP4 has rows of a multiple of {MXFP4_BLOCK}")
    return ((rows, columns // 2), np.dtype(np.uint8)), ((rows, columns // MXFP4_BLOCK), np.dtype(np.uint8))


def _biases(in_shape: tuple[int, int], out_shape: tuple[int, int], dtype: np.dtype) -> tuple[RecordArray, ...]:
    """Matrices of one input."""
    return RecordArray("b_in", (in_shape[0], 1), dtype), RecordArray("b_out", (out_shape[0], 1), dtype)
