"""How many of the experts a model uses: over all, per prompt and per step of a batch."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Shaped

from emoe_jax.traces import RoutingTrace


def active_shares(trace: RoutingTrace) -> dict[str, float]:
    """Distinct experts over all experts of a layer, averaged over layers, of prompts that ran as one batch.

    `over_all`: wished for by any token. `per_prompt`: by a prompt and its answer. `per_step`: by one decode step, to
    which each prompt brings its next token; the mean over steps in which all of them decode. Layers count alike.
    """
    assert trace.prompt_length is not None
    used = trace.counts() > 0  # [P, M, E]
    step = trace.token_pos.astype(np.int64) - trace.prompt_length[trace.sample]
    steps = min((int(step[trace.sample == prompt].max()) + 1 for prompt in range(trace.num_prompts)), default=0)
    each = [_used(trace, step == number).mean() for number in range(steps)]
    return {
        "over_all": float(used.any(0).mean()),
        "per_prompt": float(used.mean()),
        "per_step": float(np.mean(each)) if each else 0.0,
    }


def _used(trace: RoutingTrace, tokens: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, "M E"]:
    chosen: Shaped[np.ndarray, "n M k"] = trace.experts[tokens]
    used = np.zeros((trace.num_layers, trace.num_experts), bool)
    for layer in range(trace.num_layers):
        used[layer, chosen[:, layer].ravel()] = True
    return used
