"""The grid policy x residency x requests side by side, and what is reported of each cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.residency.forecasts import Learned, plan_of
from benchmarks.residency.replay import Totals, replay
from benchmarks.residency.stream import Stream, make_plans, make_stream
from emoe_jax.policies import POLICIES
from emoe_jax.traces import RoutingTrace

ORACLE = "oracle"
# Replay has `static` as `static-global`, and `pre-gated` as `next-layer-router`.
NAMES = [*(name for name in POLICIES if name not in ("static", "pre-gated")), ORACLE]
RESIDENCIES = (1.0, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2)
WITHIN_STEP = {"next-layer-router"}


def slots(share: float, num_experts: int, top_k: int) -> int:
    """Per layer, rounded down to whole slots, at least top-k."""
    return max(top_k, int(share * num_experts + 1e-9))


def swaps_per_step(policy: str, concurrency: int, num_experts: int, top_k: int) -> int:
    """Exchanges per layer between plans. `lru` and its like load every miss; fixed sets never change."""
    if policy in ("emoe", "activation-matrix"):
        return min(num_experts, concurrency)
    if policy == "next-layer-router":
        return min(num_experts, top_k * concurrency)
    return num_experts if policy in ("lru", "lfu", ORACLE) else 0


def measure(
    trace: RoutingTrace,
    learned: Learned,
    predict_every: int,
    concurrency: int,
    policies: Sequence[str],
    cost: dict[str, float],
    tell: Callable[[str, float], None] = lambda policy, seconds: None,
) -> dict[str, dict[str, dict[str, float]]]:
    """`{policy: {share: numbers}}`. `cost` has `expert_bytes` and `link_bandwidth`, bytes and bytes per second."""
    stream, E, k = make_stream(trace, concurrency), trace.num_experts, trace.top_k
    capacities = [[slots(share, E, k)] * trace.num_layers for share in RESIDENCIES]
    results = {}
    for policy in policies:
        began = time.perf_counter()
        rule = None if policy == ORACLE else POLICIES[policy].rule(trace.num_layers, E, learned.knowledge)
        plans = make_plans(stream, plan_of(policy, learned, trace, predict_every), k)
        limit = swaps_per_step(policy, concurrency, E, k)
        totals = replay(stream, E, capacities, rule, plans, limit, policy in WITHIN_STEP)
        results[policy] = {
            f"{share:g}": numbers(Totals(*(of[g] for of in totals)), stream, cost)
            for g, share in enumerate(RESIDENCIES)
        }
        tell(policy, time.perf_counter() - began)
    return results


def numbers(totals: Totals, stream: Stream, cost: dict[str, float]) -> dict[str, Any]:
    """Of one cell. Stalls are of the `exact` contract: every miss is waited for, one expert after the other, and what
    it displaces comes back; loads in the background take the link at other times.
    """
    tokens, (_, _, M, k) = stream.num_tokens, stream.experts.shape
    moved, mass = totals.moved / (tokens * M), float(stream.probs.astype(np.float64).sum())
    return {
        "coverage": totals.hits / (tokens * M * k),
        "page_in_free_tokens": totals.free_tokens / tokens,
        "experts_moved_per_token_layer": moved,
        "bytes_moved_per_token": moved * M * cost["expert_bytes"],
        "stall_seconds_per_token": totals.misses / tokens * cost["expert_bytes"] / cost["link_bandwidth"],
        "substituted_weight": totals.missed_weight / mass if mass else 0.0,
    }
