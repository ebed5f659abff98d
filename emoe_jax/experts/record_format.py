"""How one expert is stored, moved and multiplied: named arrays, and the contiguous record that holds them."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights


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

    A record is these arrays one after the other, without gaps. It is moved as a flat array of the weights' dtype, in
    which arrays of another dtype lie as their bytes.

    - A plain format has the name of a dtype, and two arrays of it: `w_in` and `w_out`.
    - `int8` is symmetric, with one scale per output channel: the weight is `w_in[o, i] * in_scales[o]`. The numbers
      are -127 to 127, and the scales float32.
    - Biases of a family that has them follow, as they are; beside int8 they are float32.
    """

    name: str
    arrays: tuple[RecordArray, ...]

    @classmethod
    def of(cls, config: ModelConfig, name: str | np.dtype) -> "RecordFormat":
        """The format of this name for a model's experts. It may differ from what the checkpoint stores."""
        shapes = config.expert_in_shape, config.expert_out_shape
        if str(name) == "int8":
            return cls.int8(*shapes, config.expert_bias)
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
        weights = cls.plain(in_shape, out_shape, np.dtype(np.int8)).arrays
        scale = np.dtype(np.float32)
        scales = (RecordArray("in_scales", in_shape[:1], scale), RecordArray("out_scales", out_shape[:1], scale))
        return cls("int8", (*weights, *scales, *(_biases(in_shape, out_shape, scale) if has_biases else ())))

    @property
    def dtype(self) -> np.dtype:
        """Of the weights, and of a record as a whole."""
        return self.arrays[0].dtype

    @property
    def is_quantised(self) -> bool:
        """Whether the weights have scales."""
        return self.name == "int8"

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


def _biases(in_shape: tuple[int, int], out_shape: tuple[int, int], dtype: np.dtype) -> tuple[RecordArray, ...]:
    """Matrices of one input."""
    return RecordArray("b_in", (in_shape[0], 1), dtype), RecordArray("b_out", (out_shape[0], 1), dtype)
