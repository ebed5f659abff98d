"""An engine's state as `Engine.state` gives it: two MoE layers of four experts, two of them resident in each."""

from typing import Any


def engine_state() -> dict[str, Any]:
    return {
        "model": "fake",
        "family": "mixtral",
        "routing": "resident",
        "steps": 7,
        "step_seconds": 0.5,
        "residency": {
            "policy": "emoe",
            "num_experts": 4,
            "top_k": 1,
            "moe_layers": [1, 3],
            "slots": [2, 2],
            "share": 0.5,
            "experts": [[0, 1], [2, 3]],
            "loading": [[0, 3]],
            "wishes": [[5, 3, 0, 2], [0, 1, 4, 5]],
            "coverage": 0.85,
            "loads": {
                "loads": 6,
                "loaded_bytes": 6000,
                "staged_bytes": 7000,
                "busy_seconds": 0.1,
                "commit_seconds": 0.01,
                "retries": 1,
                "failures": 0,
                "cancelled": 2,
                "wasted": 1,
                "deferred": 0,
                "bandwidth": 70000.0,
                "link_bandwidth": None,
                "in_flight": 1,
                "useful": 3,
                "useless": 1,
                "last_error": None,
            },
        },
        "planner": {
            "planning_seconds": 0.02,
            "predictor": True,
            "open": True,
            "predict_every": 40,
            "prompts_since": 3,
            "predictions": 2,
            "early_predictions": 1,
            "seconds": 0.3,
            "coverage_predicted": 0.9,
            "coverage_frequency": 0.8,
            "coverage_promised": None,
            "coverage_recent": 0.87,
            "error": None,
        },
        "tasks": {
            "qa": {"requests": 3, "substituted": 0.1, "substituted_mass": 0.04},
            "sum": {"requests": 1, "substituted": 0.2, "substituted_mass": 0.05},
        },
        "scheduler": {"waiting": 2, "running": 1, "preemptions": 4, "pages_used": 5, "pages": 20},
        "memory": {"weights": 100, "slab": 200, "kv_cache": 300, "host": 0, "device": 1000},
    }
