"""All rows, in the paper's order; its headlines first."""

from __future__ import annotations

from benchmarks.paper import (
    arrivals,
    lengths,
    memory,
    misclassified,
    patterns,
    period,
    predictors,
    quantised,
    residents,
    sensitivity,
    transfers,
)
from benchmarks.paper.claim import Claim

_MODULES = (
    arrivals, lengths, memory, misclassified, patterns, period,
    predictors, quantised, residents, sensitivity, transfers,
)  # fmt: skip
_ALL: dict[str, Claim] = {claim.id: claim for module in _MODULES for claim in module.CLAIMS}
_ORDER = (
    "headline-memory",
    "headline-latency",
    "headline-prompts",
    "headline-batch",
    "headline-throughput",
    "fig1-latency",
    "fig1-transfer",
    "fig2",
    "fig3",
    "fig4",
    "fig5",
    "fig7",
    "fig8",
    "fig9",
    "fig10",
    "fig12",
    "fig13",
    "table2",
    "fig14",
    "fig15",
    "fig16",
    "fig17",
    "fig18-memory",
    "fig18-throughput",
    "table3",
    "fig19",
    "sec5.7",
)
CLAIMS: dict[str, Claim] = {id: _ALL.pop(id) for id in _ORDER}
"""By id."""
assert not _ALL, f"rows without a place: {', '.join(_ALL)}"
