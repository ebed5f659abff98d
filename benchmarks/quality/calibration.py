"""A task profile with the routing of this benchmark's own kind of traffic, for policies that keep a fixed table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality.served import Tell, free, given, serve
from benchmarks.quality.traffic import Item
from emoe_jax import Engine
from emoe_jax.policies import POLICIES
from emoe_jax.tasks import TaskProfile
from emoe_jax.traces import RoutingTrace


def needs_profile(policy: str) -> bool:
    """Whether what the policy keeps follows from mean routing, of all prompts or of a task's."""
    return POLICIES[policy].forecast in ("global", "task")


def calibrated(engine: Engine, stream: Sequence[Item], concurrency: int, tell: Tell) -> TaskProfile:
    """The engine's task profile (or an empty one), with the mean routing of each task in `stream`.

    `engine` has all experts resident. The mean of all tasks counts every task alike, however long its texts are.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.npz"
        engine.record_traces(path)
        requests = [(item, given(item) if item.answer is None else free()) for item in stream]
        serve(engine, requests, concurrency, tell, name_tasks=True)
        engine.stop_recording()
        trace = RoutingTrace.load(path)
    profile = engine.task_profile or TaskProfile.empty(engine.config)
    counts = trace.counts().astype(np.float64)
    for index, task in enumerate(trace.task_names):
        total = counts[trace.task == index].sum(0)
        if total.any():
            profile = profile.with_task(task, routing=total / total.sum(1, keepdims=True))
    return profile
