"""Bytes of weights, expert slab and KV cache, from the engine's own memory plan, and what fits where.

`memory` is the sum of the three. What a step takes beside them is the plan's workspace: a share of the device, the same
whatever the prompt's length, because prompts are read in chunks. A plan for a device leaves it free; memory against
memory is compared without it. The paper's numbers are of processes as measured, activations included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from emoe_jax.config import ModelConfig
from emoe_jax.device.kv_cache import page_bytes
from emoe_jax.errors import CapacityError
from emoe_jax.memory.plan import MemoryPlan
from emoe_jax.scheduling.pages import PAGE_SIZE, pages_for

_NO_LIMIT = 2**50  # bytes of a device on which everything fits, and positions of a model that reads everything
_PLATFORM = "gpu"  # where `auto` is the checkpoint's dtype


class Workload(NamedTuple):
    """`batch` sequences, each of a prompt and what is written after it."""

    prompt_length: int
    batch: int
    output_tokens: int

    @property
    def pages(self) -> int:
        return self.batch * pages_for(self.prompt_length + self.output_tokens)


@dataclasses.dataclass(frozen=True)
class Needs:
    """A model with a share of its experts resident, on no device in particular."""

    slots: int
    """Of all MoE layers: the share rounded down to whole experts."""
    weights: int
    slab: int
    page: int

    @classmethod
    def of(cls, config: ModelConfig, share: float, dtype: str, expert_format: str = "auto") -> Needs:
        """Raises `CapacityError` for a share below top-k experts."""
        plan = _plan(config, share, dtype, _NO_LIMIT, expert_format)
        return cls(sum(plan.capacities), plan.dense_bytes, plan.slab_bytes, page_bytes(config, plan.dtype))

    def memory(self, load: Workload) -> int:
        """Bytes; the KV cache has a page more than the sequences use."""
        return self.weights + self.slab + (load.pages + 1) * self.page

    def pages_within(self, memory: int) -> int:
        """Pages for sequences that this much memory has room for; 0 or less: none."""
        return (memory - self.weights - self.slab) // self.page - 1


def pages_on(config: ModelConfig, share: float, dtype: str, device_bytes: int, expert_format: str = "auto") -> int:
    """Pages for sequences that the engine has on this device; 0 where it does not start."""
    try:
        return _plan(config, share, dtype, device_bytes, expert_format).num_pages - 1
    except CapacityError:
        return 0


def longest_prompt(pages: int, load: Workload) -> int:
    """Tokens, with the load's batch and output; 0 where there is no room for any."""
    return max(0, pages // load.batch * PAGE_SIZE - load.output_tokens)


def largest_batch(pages: int, load: Workload) -> int:
    """Sequences of the load's length."""
    return max(0, pages // pages_for(load.prompt_length + load.output_tokens))


def measure(
    config: ModelConfig,
    dtype: str,
    device_bytes: int,
    shares: Sequence[float],
    load: Workload,
    prompt_lengths: Sequence[int],
    batches: Sequence[int],
    expert_format: str = "auto",
) -> dict[str, Any]:
    """`{share: numbers}`. Ratios are to the same model with all experts resident; None where that has no room at all.

    `same_device`: what the device has room for with each. `same_memory`: what has room where all experts and `load` do,
    as in the paper. Lengths are what memory has room for; `within_model` ends at the model's last position.
    """
    full = Needs.of(config, 1.0, dtype, expert_format)
    full_pages = pages_on(config, 1.0, dtype, device_bytes, expert_format)
    results: dict[str, Any] = {}
    for share in shares:
        try:
            needs = Needs.of(config, share, dtype, expert_format)
        except CapacityError as error:
            results[f"{share:g}"] = {"problem": str(error)}
            continue
        pages = pages_on(config, share, dtype, device_bytes, expert_format)
        results[f"{share:g}"] = {
            "slots": needs.slots,
            "weights": needs.weights,
            "slab": needs.slab,
            "memory": needs.memory(load),
            "memory_saved": 1 - needs.memory(load) / full.memory(load),
            "expert_memory_saved": 1 - needs.slab / full.slab,
            "fits": pages >= load.pages,
            "by_prompt_length": {str(n): needs.memory(load._replace(prompt_length=n)) for n in prompt_lengths},
            "by_batch": {str(n): needs.memory(load._replace(batch=n)) for n in batches},
            "same_device": _room(
                pages, load, config, longest_prompt(full_pages, load), largest_batch(full_pages, load)
            ),
            "same_memory": _room(needs.pages_within(full.memory(load)), load, config, load.prompt_length, load.batch),
        }
    return results


def _room(pages: int, load: Workload, config: ModelConfig, full_prompt: int, full_batch: int) -> dict[str, Any]:
    prompt, batch = longest_prompt(pages, load), largest_batch(pages, load)
    return {
        "longest_prompt": prompt,
        "longest_prompt_within_model": min(prompt, max(0, config.max_position - load.output_tokens)),
        "prompt_ratio": prompt / full_prompt if full_prompt else None,
        "largest_batch": batch,
        "batch_ratio": batch / full_batch if full_batch else None,
    }


def _plan(config: ModelConfig, share: float, dtype: str, device_bytes: int, expert_format: str) -> MemoryPlan:
    """With as large a KV cache as there is room for."""
    return MemoryPlan.of(
        config.replace(max_position=_NO_LIMIT),
        platform=_PLATFORM,
        device_bytes=device_bytes,
        dtype=dtype,
        expert_format=expert_format,
        expert_memory=f"{100 * share:.6f}%",
        max_num_seqs=1,
    )
