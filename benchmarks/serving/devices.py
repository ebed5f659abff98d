"""Machines to simulate: what a step takes on them, and how much they hold."""

import dataclasses

from emoe_jax.scheduling.cost import StepCost


@dataclasses.dataclass(frozen=True)
class ExpertTimes:
    """Seconds per expert: a load in the background, its commit, and what an `exact` step waits for a missing one."""

    load: float
    commit: float
    wait: float


@dataclasses.dataclass(frozen=True)
class Device:
    """A machine as the scheduler sees it."""

    cost: StepCost
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_tokens: int
    noise: float = 0.1
    """Standard deviation of a step's time, as a share of it."""
    page_size: int = 16
    experts: ExpertTimes | None = None
    """None: all experts are resident, and nothing is known of their routing."""

    @property
    def prefill_chunk(self) -> int:
        return self.max_num_batched_tokens


DEMO = Device(
    StepCost(step=0.0019, chunk=0.001, prefill_token=0.00015, decode=0.0004),
    max_num_seqs=16,
    max_num_batched_tokens=512,
    max_model_len=1024,
    kv_tokens=16 * 1024,
    experts=ExpertTimes(load=0.00019, commit=0.0001, wait=0.00013),
)
"""The bundled demo model on two shared cores: least squares over the steps of runs at some 75 % of capacity.

Times of experts: `python -m benchmarks.serving --in-process --residency 40% --routing resident exact`."""

_GPUS = 4
_WEIGHTS = 46.7e9 * 2  # bytes: bfloat16
_ACTIVE = 2 * 12.9e9  # operations per token
_KV = 32 * 2 * 8 * 128 * 2  # bytes per token: layers, keys and values, heads, head size, bfloat16
_BANDWIDTH = _GPUS * 1.555e12  # bytes/s: A100-40GB
_COMPUTE = _GPUS * 312e12 * 0.5  # operations/s: half of the A100's bfloat16 peak
_CONTEXT = 1400  # tokens a decoding sequence attends over, on average

MIXTRAL = Device(
    StepCost(
        # A decode step of a large batch reads all weights once; 5 ms are for launches and all-reduces.
        step=_WEIGHTS / _BANDWIDTH + 0.005,
        chunk=0.0,
        prefill_token=_ACTIVE / _COMPUTE,
        decode=_ACTIVE / _COMPUTE + _KV * _CONTEXT / _BANDWIDTH,
    ),
    max_num_seqs=128,
    max_num_batched_tokens=2048,
    max_model_len=16384,
    kv_tokens=450_000,  # what 160 GB leave beside the weights
)
"""Mixtral-8x7B on the paper's machine, four A100-40GB. Not measured: a roofline from the data sheets."""

DEVICES = {"demo": DEMO, "mixtral-8x7b": MIXTRAL}
