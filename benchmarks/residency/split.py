"""Which prompts are learned from and which are replayed, and what a predictor's directory brings along."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.residency.forecasts import check_traces
from emoe_jax.errors import ConfigError
from emoe_jax.policies.dynamics import DYNAMICS_FILE, Dynamics
from emoe_jax.predictor import Predictor, Prompts
from emoe_jax.traces import RoutingTrace
from train.predictor.evaluate import count_seen


class Given(NamedTuple):
    """What is given to a replay; None is learned from `trained`."""

    trained: RoutingTrace
    replayed: RoutingTrace
    predictor: Predictor | None
    dynamics: Dynamics | None
    seen: int = 0
    """Replayed prompts that the predictor was trained on: what it says of them proves nothing."""

    @property
    def warning(self) -> str | None:
        """One line about prompts that the predictor has seen."""
        if not self.seen:
            return None
        return (
            f"{self.seen} of the {self.replayed.num_prompts} replayed prompts are among those that the predictor was "
            "trained on; its coverage of them says nothing"
        )


def read_traces(trace_file: Path, train_file: Path | None, predictor_directory: Path | None) -> Given:
    """Without a trace to learn from, it is the first three quarters of the prompts that are learned from.

    Raises `EmoeError`s, one line, where a file cannot be used or is of another model.
    """
    trace = RoutingTrace.load(trace_file)
    if train_file is not None:
        trained = RoutingTrace.load(train_file)
        check_traces(trained, trace)
    else:
        quarter = 3 * trace.num_prompts // 4
        if quarter < 2:
            raise ConfigError(f"{trace_file} has {trace.num_prompts} prompts; 3 are needed to learn from some of them")
        trained, trace = trace.select(range(quarter)), trace.select(range(quarter, trace.num_prompts))
    predictor = dynamics = None
    seen = 0
    if predictor_directory is not None:
        predictor, path = Predictor.load(predictor_directory), predictor_directory / DYNAMICS_FILE
        predictor.config.check_model(trace.num_layers, trace.num_experts, trace.top_k, f"the trace {trace.source}")
        dynamics = Dynamics.load(path, trace.num_layers, trace.num_experts) if path.exists() else None
        seen = count_seen(predictor.trained, Prompts.of(trace, predictor.config.first_tokens).routed())
    return Given(trained, trace, predictor, dynamics, seen)
