"""The coverage that a plan takes from a recorded trace: what the server's policy covered, replayed, by residency."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from emoe_jax.config import ModelConfig

POLICY = "emoe"
"""The server's policy unless `--policy` says otherwise."""


def covered_by(trace: str, config: ModelConfig) -> Callable[[float], float]:
    """Coverage by the share of a layer's experts that are resident, one request at a time.

    The policy learns from the first three quarters of the prompts and is replayed on the others
    (`python -m benchmarks.residency`) at a few shares. Between these, coverage is interpolated.

    Raises `TraceError` for a file that is no trace, or one of another model, and `ConfigError` for too few prompts.
    """
    from benchmarks.residency.forecasts import learn_from  # these take seconds to import
    from benchmarks.residency.grid import RESIDENCIES, measure, slots
    from benchmarks.residency.split import read_traces

    given = read_traces(Path(trace), None, None)
    experts, top_k = config.num_experts, config.top_k
    given.replayed.check_model(len(config.moe_layers), experts, top_k, "the model")
    no_cost = {"expert_bytes": 0.0, "link_bandwidth": 1.0}
    cells = measure(given.replayed, learn_from(given.trained), 1, 1, [POLICY], no_cost)[POLICY]
    curve = {slots(share, experts, top_k) / experts: cells[f"{share:g}"]["coverage"] for share in RESIDENCIES}
    shares = [0.0, *sorted(curve)]
    values = [0.0, *(curve[share] for share in shares[1:])]
    return lambda share: float(np.interp(share, shares, values))
