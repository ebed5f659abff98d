"""The differences between the checkpoints of families: configuration, tensors and their layouts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from emoe_jax.config import ModelConfig


class Band(NamedTuple):
    """Of each `period` rows of a matrix, those from `start` to `stop`."""

    period: int
    start: int
    stop: int

    def of(self, matrix: np.ndarray) -> np.ndarray:
        """A view of these rows, `[rows / period, stop - start, columns]`."""
        return matrix.reshape(-1, self.period, matrix.shape[-1])[:, self.start : self.stop]


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of rows of one of our arrays as a checkpoint stores it.

    `shape` is that of the tensor on disk; `index` selects one expert of a fused `[E, ...]` tensor, and `transposed`
    means that what is selected is stored `[in, out]`. With `turns` of 2 the rows of the first and the second half are
    stored in turn. With a `band` the part is some of the stored rows, and the others are of another array.
    """

    name: str
    shape: tuple[int, ...]
    index: int | None = None
    transposed: bool = False
    turns: int = 1
    band: Band | None = None

    @property
    def rows(self) -> int:
        """Rows that this part fills of the array it belongs to."""
        stored = self.selected[-1] if self.transposed else self.selected[0]
        return stored if self.band is None else stored // self.band.period * (self.band.stop - self.band.start)

    @property
    def whole(self) -> "Part":
        """All rows of what is stored."""
        return dataclasses.replace(self, band=None)

    @property
    def selected(self) -> tuple[int, ...]:
        """The shape of what is selected, as stored."""
        return self.shape if self.index is None else self.shape[1:]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of what it fills, where that is a part of a matrix."""
        rows, columns = self.selected
        return (columns, rows) if self.transposed else (rows, columns)


@dataclasses.dataclass(frozen=True)
class ExpertSource:
    """One on-disk layout of one expert: `w_in` is its parts concatenated along rows.

    `biases` are those of `w_in` and of `w_out`, where the family has any.
    """

    w_in: tuple[Part, ...]
    w_out: Part
    biases: tuple[Part, ...] = ()

    @property
    def arrays(self) -> tuple[tuple[Part, ...], ...]:
        """The parts of `w_in`, of `w_out` and of their biases, each in the order of their rows."""
        return (*self.projections, *((bias,) for bias in self.biases))

    @property
    def projections(self) -> tuple[tuple[Part, ...], ...]:
        """The parts of `w_in` and of `w_out`."""
        return self.w_in, (self.w_out,)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, array by array."""
        return tuple(part for parts in self.arrays for part in parts)


DenseTensors = dict[str, tuple[Part, ...]]
"""Parameter path of `Decoder` (`layers.0.self_attention.qkv.weight`) -> the parts whose rows in sequence it is."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that differs between architectures.

    `dense_tensors(config)` covers all weights but the experts. `expert_sources(config, layer, expert)` lists the
    layouts that are understood, one tensor per expert or fused; `layer` is the decoder's layer index. `aliases` maps
    the ending of a tensor name that some checkpoints use to the ending that `dense_tensors` uses.
    `ignored(config, name)` says whether a tensor may be there although nothing reads it. `reasoning` and `calls` name
    the forms in which its models write thoughts and calls of tools, where all of them use one; else a checkpoint's
    chat template tells.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], ModelConfig]
    dense_tensors: Callable[[ModelConfig], DenseTensors]
    expert_sources: Callable[[ModelConfig, int, int], tuple[ExpertSource, ...]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: Callable[[ModelConfig, str], bool] = lambda config, name: False
    reasoning: str | None = None
    calls: str | None = None

    def canonical(self, name: str) -> str:
        """The name under which `dense_tensors` knows the checkpoint tensor `name`."""
        for ending, replacement in self.aliases.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + replacement
        return name
