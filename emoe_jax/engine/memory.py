"""One plan of the device's memory: dense weights, expert slab, KV cache, and what is left for a step's temporaries."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
from flax import nnx

from emoe_jax.config import ModelConfig
from emoe_jax.engine.kv_cache import PAGE_SIZE, page_bytes, pages_for
from emoe_jax.errors import CapacityError, ConfigError
from emoe_jax.experts.budget import capacities, format_bytes, parse_expert_memory
from emoe_jax.experts.weights import ExpertLayout
from emoe_jax.models.decoder import Decoder

WORKSPACE_SHARE = 0.1
"""Share of the device kept free for the temporaries of a step."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, slots per MoE layer and KV pages (the trash page included)."""

    dtype: str
    device_bytes: int
    dense_bytes: int
    slab_bytes: int
    kv_bytes: int
    host_bytes: int
    capacities: tuple[int, ...]
    num_pages: int
    max_model_len: int
    may_split: bool
    """Whether layers may get different numbers of slots; not where the budget names slots per layer."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        platform: str,
        device_bytes: int,
        dtype: str = "auto",
        expert_memory: str | int = "40%",
        host_memory: str | int = 0,
        kv_memory: str | int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
    ) -> "MemoryPlan":
        """Split `device_bytes`. The KV cache gets `kv_memory`, or room for `max_num_seqs` full sequences if that fits.

        `max_model_len` defaults to the model's limit, or to what the KV cache can hold of one sequence. Raises
        `CapacityError` with both numbers when something does not fit, `ConfigError` for a malformed amount.
        """
        dtype = resolve_dtype(dtype, config, platform)
        usable = int(device_bytes * (1 - WORKSPACE_SHARE))
        layout = ExpertLayout.of(config, dtype)
        dense = dense_parameters(config) * jnp.dtype(dtype).itemsize
        if dense > usable:
            raise CapacityError(
                f"the model's weights without experts take {format_bytes(dense)}; "
                f"{format_bytes(usable)} of the device's {format_bytes(device_bytes)} can be used"
            )
        expert_budget = parse_expert_memory(str(expert_memory))
        slots = tuple(capacities(config, layout, expert_budget, usable - dense))
        slab = sum(slots) * layout.nbytes
        left = usable - dense - slab
        if max_model_len is not None and not 2 <= max_model_len <= config.max_position:
            raise ConfigError(f"max_model_len is {max_model_len}; the model allows 2 to {config.max_position}")
        page = page_bytes(config, dtype)
        wanted = max_num_seqs * pages_for(max_model_len or config.max_position)
        budget = left if kv_memory is None else parse_bytes("kv_memory", kv_memory)
        if budget > left:
            raise CapacityError(
                f"kv_memory of {format_bytes(budget)} is more than the {format_bytes(left)} that weights and expert "
                "slab leave"
            )
        pages = min(wanted, budget // page - 1)
        needed = pages_for(max_model_len or 2)
        if pages < needed:
            raise CapacityError(
                f"the KV cache can have {format_bytes(max(budget, 0))}; one sequence of {max_model_len or 2} tokens "
                f"needs {format_bytes((needed + 1) * page)}"
            )
        return cls(
            dtype=dtype,
            device_bytes=device_bytes,
            dense_bytes=dense,
            slab_bytes=slab,
            kv_bytes=(pages + 1) * page,
            host_bytes=parse_bytes("host_memory", host_memory),
            capacities=slots,
            num_pages=pages + 1,
            max_model_len=max_model_len or min(config.max_position, pages * PAGE_SIZE),
            may_split=expert_budget.kind != "slots",
        )

    def report(self) -> dict[str, int]:
        """Bytes by purpose."""
        return {
            "device": self.device_bytes,
            "weights": self.dense_bytes,
            "slab": self.slab_bytes,
            "kv_cache": self.kv_bytes,
            "host": self.host_bytes,
        }


def resolve_dtype(dtype: str, config: ModelConfig, platform: str) -> str:
    """`auto` is the checkpoint's dtype; on CPU float32, because half-precision products are 50 times slower there."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    if platform == "cpu" or config.dtype not in DTYPES:
        return "float32"
    return config.dtype


def device_memory() -> int:
    """Bytes this process may use on the default device; on CPU, the machine's memory."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def dense_parameters(config: ModelConfig) -> int:
    """Numbers in all weights but the experts'."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def parse_bandwidth(amount: str | float | None, name: str = "link_bandwidth") -> float | None:
    """Bytes per second: a number, or text such as `2GiB`; None is no limit. Raises `ConfigError`."""
    if amount is None:
        return None
    bandwidth = float(parse_bytes(name, amount) if isinstance(amount, str) else amount)
    if not bandwidth > 0:
        raise ConfigError(f"{name} is {amount!r}; expected more than 0 bytes per second")
    return bandwidth


def parse_bytes(name: str, amount: str | int) -> int:
    """An integer of bytes, or text such as `2GiB`."""
    if isinstance(amount, int):
        if amount < 0:
            raise ConfigError(f"{name} is {amount}; expected a positive number of bytes")
        return amount
    try:
        budget = parse_expert_memory(amount, name)
    except ConfigError:
        budget = None
    if budget is None or budget.kind != "bytes":
        raise ConfigError(f"{name} {amount!r} is not an amount of bytes; expected for example 2GiB")
    return int(budget.amount)
