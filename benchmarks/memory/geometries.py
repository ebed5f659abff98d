"""Shapes of well-known models, as their `config.json` has them; enough to plan memory without a checkpoint."""

from __future__ import annotations

from typing import Any

from emoe_jax.planning.catalogue import known_model

NAMES = ("mixtral-8x7b", "mixtral-8x22b", "gpt-oss-20b", "gpt-oss-120b", "olmoe-1b-7b", "openmoe-8b", "qwen3-30b-a3b")
"""Those of the planner's known models that benchmarks are run for."""

GEOMETRIES: dict[str, dict[str, Any]] = {name: known_model(name) for name in NAMES}
