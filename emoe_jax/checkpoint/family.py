"""The differences between the checkpoints of families: configuration, tensors and their layouts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from emoe_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of rows of one of our arrays as a checkpoint stores it.

    `shape` is that of the tensor on disk; `index` selects one expert of a fused `[E, ...]` tensor, and `transposed`
    means that what is selected is stored `[in, out]`.
    """

    name: str
    shape: tuple[int, ...]
    index: int | None = None
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Rows that this part fills of the array it belongs to."""
        selected = self.shape if self.index is None else self.shape[1:]
        return selected[-1] if self.transposed else selected[0]


@dataclasses.dataclass(frozen=True)
class ExpertSource:
    """One on-disk layout of one expert: `w_in` is its parts concatenated along rows."""

    w_in: tuple[Part, ...]
    w_out: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of `w_in` in the order of their rows, then `w_out`."""
        return (*self.w_in, self.w_out)


DenseTensors = dict[str, tuple[Part, ...]]
"""Parameter path of `Decoder` (`layers.0.self_attention.qkv.weight`) -> the parts whose rows in sequence it is."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that differs between architectures.

    `dense_tensors(config)` covers all weights but the experts. `expert_sources(config, layer, expert)` lists the
    layouts that are understood, one tensor per expert or fused; `layer` is the decoder's layer index. `aliases` maps
    the ending of a tensor name that some checkpoints use to the ending that `dense_tensors` uses.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], ModelConfig]
    dense_tensors: Callable[[ModelConfig], DenseTensors]
    expert_sources: Callable[[ModelConfig, int, int], tuple[ExpertSource, ...]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def canonical(self, name: str) -> str:
        """The name under which `dense_tensors` knows the checkpoint tensor `name`."""
        for ending, replacement in self.aliases.items():
            if name.endswith(ending):
                return name.removesuffix(ending) + replacement
        return name
