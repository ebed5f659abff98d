"""What of an engine's setting makes it slow, by the planner's formulas."""

import math
from collections.abc import Iterator

from emoe_jax.amounts import format_bytes
from emoe_jax.config import ModelConfig
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.planning.roofline import Roofline
from emoe_jax.requests.contract import RoutingContract

MEMORY_OVER_LINK = {"cpu": 1.0}
"""How much faster a device reads its memory than experts come to it. On a CPU both are copies within one memory."""

_OF_CARDS = 30.0
"""Known cards have 12 to 92, most of them more than this."""


def slow_parts(config: ModelConfig, plan: MemoryPlan, contract: RoutingContract, platform: str) -> Iterator[str]:
    """A line for each, with the reason and what would help. `contract` is that of requests that name none."""
    if platform == "cpu" and plan.dtype != "float32":
        yield f"products of {plan.dtype} are slow on a CPU; --dtype float32, the default there, is faster"
    count = len(config.moe_layers) * config.num_experts
    resident = sum(plan.capacities)
    if resident == count:
        return
    missing = count - resident - plan.host_bytes // plan.sizes.slot
    if missing > 0:
        needed = math.ceil((count - resident) * plan.sizes.slot / 2**20)
        yield (
            f"{missing} of {count} experts have room neither on the device nor in host memory, so that loads read "
            f"files; --host-memory {needed}MiB keeps them all"
        )
    roofline = Roofline(config, plan.dtype, plan.expert_format, resident / len(config.moe_layers))
    work = roofline.decode(1, 1)
    if contract != "resident" and work.link_bytes * MEMORY_OVER_LINK.get(platform, _OF_CARDS) > work.memory_bytes:
        loaded = format_bytes(int(work.link_bytes))
        yield (
            f"with {resident / count:.0%} of the experts resident, a token may wait for {loaded} of experts, which "
            "takes longer than to compute it; more --expert-memory, --expert-format int8 or --routing resident help"
        )
