"""The weights of one layer's experts on the device, and the contiguous record one expert has off it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emoe_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """`C` experts of one MoE layer, in Hugging Face's `[out, in]` orientation so that reading needs no transpose.

    Fi is `2F` (gate rows, then up rows) or `3F` (OpenMoE: gate, second gate, up).
    """

    w_in: Float[Array, "C Fi D"]
    w_out: Float[Array, "C D F"]

    @property
    def capacity(self) -> int:
        """`C`, the slots of the layer."""
        return self.w_in.shape[0]


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """Shapes and dtype of one expert; a record is `w_in` followed by `w_out`, contiguous, in slab dtype."""

    in_shape: tuple[int, int]
    out_shape: tuple[int, int]
    dtype: np.dtype

    @classmethod
    def of(cls, config: ModelConfig, dtype: str | np.dtype) -> "ExpertLayout":
        """The layout of this model's experts in the slab's `dtype`, which may differ from the checkpoint's."""
        return cls(config.expert_in_shape, config.expert_out_shape, np.dtype(jnp.dtype(dtype)))

    @property
    def size(self) -> int:
        """Numbers in one record."""
        return math.prod(self.in_shape) + math.prod(self.out_shape)

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return self.size * self.dtype.itemsize

    def views(self, record: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(w_in, w_out)` as views of a flat record of `size` numbers; writing to them fills the record."""
        if record.shape != (self.size,) or record.dtype != self.dtype:
            raise ValueError(
                f"record is {record.dtype}[{record.shape}]; an expert of this model is {self.dtype}[{self.size}]"
            )
        split = math.prod(self.in_shape)
        return record[:split].reshape(self.in_shape), record[split:].reshape(self.out_shape)

    def empty_weights(self, capacity: int) -> ExpertWeights:
        """Zeroed device arrays for `capacity` slots."""
        return ExpertWeights(
            jnp.zeros((capacity, *self.in_shape), self.dtype), jnp.zeros((capacity, *self.out_shape), self.dtype)
        )
