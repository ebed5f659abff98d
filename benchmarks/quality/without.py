"""Engines that lack a part of the policy `emoe`, to measure what the part is worth while they run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emoe_jax import Engine
from emoe_jax.engine.loading import EngineParts, load_parts
from emoe_jax.engine_config import EngineConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models import open_checkpoint
from emoe_jax.policies.dynamics import DYNAMICS_FILE
from emoe_jax.residency.judges import Drift, Gate
from emoe_jax.residency.knowledge import PREDICTOR_FOLDER, RoutingKnowledge
from emoe_jax.residency.planner import ResidencyPlanner
from emoe_jax.tasks import TaskProfile

PARTS = ("prediction", "refresh", "dynamics", "tasks", "drift", "gate")
"""prediction: plans go by decayed frequency alone. refresh: nothing is loaded between plans. dynamics: constants stand
for what was learned about answers. tasks: no request is told from another. drift: no prediction comes early. gate:
predictions count, however bad they are."""


@contextlib.contextmanager
def engine_without(part: str, model: str, config: EngineConfig) -> Iterator[Engine]:
    """A warm engine with these options, less one of `PARTS`. Raises `ConfigError` for another."""
    if part not in PARTS:
        raise ConfigError(f"unknown part {part!r}; expected one of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        if part == "refresh":
            config = dataclasses.replace(config, policy="emoe-no-refresh")
        if part == "tasks":
            config = dataclasses.replace(config, task_profile=None)
        if part == "dynamics":
            config = dataclasses.replace(config, predictor=_without_dynamics(model, Path(folder)))
        parts = load_parts(model, config)
        if part in _PLANNERS:
            if parts.planner is not None:
                parts.planner.close()
            parts = dataclasses.replace(parts, planner=_planner(part, model, parts))
        with Engine(parts) as engine:
            engine.warm_up()
            yield engine


def _without_dynamics(model: str, folder: Path) -> Path:
    copy = folder / PREDICTOR_FOLDER
    directory = open_checkpoint(model).directory / PREDICTOR_FOLDER
    if not directory.is_dir():
        raise ConfigError(f"{model} has no predictor, and so nothing that was learned about answers")
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns(DYNAMICS_FILE))
    return copy


_PLANNERS: dict[str, Callable[[RoutingKnowledge], dict[str, Any]]] = {
    "prediction": lambda known: {"predictor": None},
    "drift": lambda known: {"predictor": known.predictor, "drift": Drift(tolerance=1.0)},
    "gate": lambda known: {"predictor": known.predictor, "gate": Gate(margin=math.inf)},
}


def _planner(part: str, model: str, parts: EngineParts) -> ResidencyPlanner:
    config = parts.runner.config
    known = RoutingKnowledge.load(open_checkpoint(model).directory, config, "auto", parts.options.predictor)
    profile = parts.profile or TaskProfile.empty(config)
    return ResidencyPlanner(profile, parts.memory.capacities, **_PLANNERS[part](known))
