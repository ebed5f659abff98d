"""How the Triton kernels of the MoE op cut their work: a few sets of tile sizes, chosen by rows per expert."""

import dataclasses
from typing import NamedTuple

MIN_TILE = 16
"""Triton's smallest matrix product."""

SHARED_BYTES = 96 << 10
"""Shared memory for one program: what every card of compute capability 8.0 or higher offers."""

_MAX_SPLITS = 16
_MIN_ITERATIONS = 4  # of a split: fewer do not pay for the partial sums


class Tiling(NamedTuple):
    """One kernel's tile sizes. A program multiplies `rows` rows with `tile` outputs, `depth` inputs per iteration."""

    rows: int
    tile: int
    depth: int
    warps: int
    stages: int
    """Iterations whose loads are in flight."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Tile sizes for both kernels. Sizes are powers of two of at least 16; smaller matrices get smaller tiles.

    Raises `ValueError` with the size that is wrong.
    """

    rows: int
    """Assignments per block. An expert's weights are read once for each block of its assignments."""
    tile_in: int
    """Hidden features per program of the first kernel, of each of gate and up."""
    tile_out: int
    """Output features per program of the second kernel."""
    depth: int
    """Inputs per iteration, in 16-bit numbers; half as many in float32."""
    warps: int
    stages: int
    programs: int = 256
    """The second kernel splits its long axis while it has fewer programs: two for each core of a large card."""

    def __post_init__(self) -> None:
        for name in ("rows", "tile_in", "tile_out", "depth"):
            size = getattr(self, name)
            if size < MIN_TILE or size & (size - 1):
                raise ValueError(f"KernelConfig.{name} is {size}; it has to be a power of two, at least {MIN_TILE}")
        if self.warps not in (1, 2, 4, 8, 16) or self.stages < 1 or self.programs < 1:
            raise ValueError(
                f"KernelConfig has warps {self.warps}, stages {self.stages} and programs {self.programs}; warps are "
                "1, 2, 4, 8 or 16, the others at least 1"
            )

    def tiling_in(self, inputs: int, outputs: int, matrices: int, itemsize: int) -> Tiling:
        """For the first kernel: `matrices` of `outputs x inputs` numbers per expert, multiplied side by side."""
        return self._tiling(self.tile_in, inputs, outputs, matrices, itemsize)

    def tiling_out(self, inputs: int, outputs: int, itemsize: int) -> Tiling:
        """For the second kernel: one matrix of `outputs x inputs` numbers per expert."""
        return self._tiling(self.tile_out, inputs, outputs, 1, itemsize)

    def splits(self, blocks: int, inputs: int, outputs: int, itemsize: int) -> int:
        """Into how many parts the second kernel cuts its `inputs`, so that few blocks keep many cores busy."""
        tiling = self.tiling_out(inputs, outputs, itemsize)
        programs = blocks * -(-outputs // tiling.tile)
        splits = 1
        while (
            splits < _MAX_SPLITS
            and programs * splits < self.programs
            and inputs >= 2 * splits * _MIN_ITERATIONS * tiling.depth
        ):
            splits *= 2
        return splits

    def _tiling(self, tile: int, inputs: int, outputs: int, matrices: int, itemsize: int) -> Tiling:
        tile = min(tile, _power_of_two(outputs))
        depth = min(max(MIN_TILE, self.depth * 2 // itemsize), _power_of_two(inputs))
        stage = (self.rows + matrices * tile) * depth * itemsize
        while stage > SHARED_BYTES and depth > MIN_TILE:
            depth, stage = depth // 2, stage // 2
        return Tiling(self.rows, tile, depth, self.warps, max(1, min(self.stages, SHARED_BYTES // stage)))


class KernelTable(NamedTuple):
    """Kernel configurations for more and more rows per expert; the last one is for all above."""

    limits: tuple[int, ...]
    configs: tuple[KernelConfig, ...]

    def choose(self, assignments: int, num_experts: int) -> KernelConfig:
        """By the mean number of assignments of an expert that has any, if they are spread evenly."""
        mean = -(-assignments // min(assignments, num_experts))
        return next((c for limit, c in zip(self.limits, self.configs, strict=False) if mean <= limit), self.configs[-1])


DEFAULT_TABLE = KernelTable(
    (16, 32, 64),
    (
        KernelConfig(rows=16, tile_in=32, tile_out=64, depth=128, warps=4, stages=4),
        KernelConfig(rows=32, tile_in=64, tile_out=128, depth=64, warps=4, stages=4),
        KernelConfig(rows=64, tile_in=64, tile_out=128, depth=64, warps=8, stages=4),
        KernelConfig(rows=128, tile_in=64, tile_out=128, depth=64, warps=8, stages=3),
    ),
)
"""Not measured on a card yet: taken from what grouped products of this kind use elsewhere. `emoe bench kernels`
measures, and keeps what is faster (`kernel_choice`)."""


def _power_of_two(size: int) -> int:
    """The smallest tile that holds `size`."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())
