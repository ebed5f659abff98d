"""The devices that can be planned for, and how fast their parts are."""

import dataclasses
from typing import NamedTuple

from emoe_jax.errors import ConfigError
from emoe_jax.memory.device_settings import POOL_SHARE
from emoe_jax.option_fields import nearest

EFFICIENCY = 0.7
"""Share of a card's own rates that steps are taken to reach where nothing was measured. An assumption: no step of this
engine has been measured on a card."""


class Card(NamedTuple):
    """A card as its maker describes it, in the units of data sheets."""

    memory_mib: int
    bandwidth_gbps: float
    link_gbps: float
    half_tflops: float
    float32_tflops: float


_PCIE4, _PCIE5 = 25.0, 52.0

# By size: `cards_by_size` keeps this order.
# Memory: "memory.total" of nvidia-smi, which is less than the name says where error correction takes a part.
# Bandwidth and TFLOP/s: NVIDIA's data sheets and architecture papers; products of bfloat16 with float32 sums, dense (no
# sparsity), on tensor cores, and float32 beside them, without TF32. SXM variants where there are several.
# Link: what copies of page-locked memory usually reach of PCIe 4.0 x16 (32 GB/s by its standard) and 5.0 x16 (64 GB/s).
CARDS: dict[str, Card] = {
    "l4": Card(23_034, 300, _PCIE4, 121, 30.3),
    "a10": Card(23_028, 600, _PCIE4, 125, 31.2),
    "rtx3090": Card(24_576, 936, _PCIE4, 71, 35.6),
    "rtx4090": Card(24_564, 1008, _PCIE4, 165.2, 82.6),
    "rtx5090": Card(32_607, 1792, _PCIE5, 209.5, 104.8),
    "a100-40gb": Card(40_960, 1555, _PCIE4, 312, 19.5),
    "l40s": Card(46_068, 864, _PCIE4, 362, 91.6),
    "a100-80gb": Card(81_920, 2039, _PCIE4, 312, 19.5),
    "h100-80gb": Card(81_559, 3350, _PCIE5, 989, 67),
    "h200": Card(143_771, 4800, _PCIE5, 989, 67),
}


class Costs(NamedTuple):
    """Seconds that steps take beside reading, computing and loading."""

    host: float = 0.0
    """Of the host, for each step."""
    layers: float = 0.0
    """Of the device, as the others, for each of what `Work` counts by this name."""
    rows: float = 0.0
    choices: float = 0.0
    repeated_bytes: float = 0.0
    packed_bytes: float = 0.0
    operations: float = 0.0
    """Where products do not overlap with reading."""


DEVICE_COSTS = Costs._fields[1:]
NONE = Costs()
"""Of a device on which no step was measured."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to plan for. Rates are per second: bytes of its memory and of its link, floating point operations."""

    name: str
    platform: str
    """By JAX's name: `cpu` or `gpu`."""
    memory_bytes: int
    """For weights, experts, KV cache and workspace together."""
    bandwidth: float
    link: float
    half_flops: float
    """Of products of bfloat16 or float16."""
    float32_flops: float
    costs: Costs = NONE

    @classmethod
    def of_card(cls, name: str, efficiency: float = EFFICIENCY) -> "Target":
        """A known card. Its own rates count by `efficiency`, the link as it is. Raises `ConfigError`."""
        if name not in CARDS:
            close = next((card for card in CARDS if card.startswith(name.lower())), nearest(name, CARDS))
            raise ConfigError(
                f"device {name[:40]!r} is not known; the nearest known one is {close!r} of {', '.join(CARDS)}"
            )
        card = CARDS[name]
        return cls(
            name=name,
            platform="gpu",
            memory_bytes=int(POOL_SHARE * card.memory_mib * 2**20),
            bandwidth=1e9 * card.bandwidth_gbps * efficiency,
            link=1e9 * card.link_gbps,
            half_flops=1e12 * card.half_tflops * efficiency,
            float32_flops=1e12 * card.float32_tflops * efficiency,
        )

    def flops(self, dtype: str) -> float:
        """Of products in this dtype, per second."""
        return self.float32_flops if dtype == "float32" else self.half_flops


def cards_by_size(efficiency: float = EFFICIENCY) -> list[Target]:
    """All known cards, those of the least memory first, and of cards that are sold as alike the slower one first."""
    return [Target.of_card(name, efficiency) for name in CARDS]
