"""The grid: every cell's engine serves the same traffic as one with all experts resident."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.quality.calibration import calibrated, needs_profile
from benchmarks.quality.scores import Row, row
from benchmarks.quality.served import ANSWER_TOKENS, Cell, Outcome, engine_of, outcomes
from benchmarks.quality.traffic import Count, Item, draw, in_bursts, wrongly_named
from emoe_jax import EmoeError
from emoe_jax.config import ModelConfig
from emoe_jax.errors import ConfigError
from emoe_jax.models import load_tokenizer, open_checkpoint
from emoe_jax.policies import make_policy
from emoe_jax.residency.knowledge import RoutingKnowledge
from train.sensitivity.embedding import Embed

FULL = Cell("full", "resident", 1.0)
"""All experts resident: what every other cell is compared with."""
_CALIBRATION = 3  # for so many test items, one of the training split says which experts are used most

T = TypeVar("T")

Start = Callable[[str, int], Callable[[], None]]
"""Called with what begins and how many requests it has; returns what is called after each."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The items of each task, in the order they are asked in; `missing` says why a kind of text is left out."""

    items: dict[str, list[Item]]
    calibration: dict[str, list[Item]]
    missing: dict[str, str]
    context: int
    """Tokens that the longest item and its answer take, in whole pages."""

    @classmethod
    def of(cls, model: str, tasks: Sequence[str], count: Count, seed: int) -> Traffic:
        """Test items, and training items for calibration. Raises `EmoeError` where the model cannot take them."""
        checkpoint = open_checkpoint(model)
        tokenizer = load_tokenizer(checkpoint.directory)
        if tokenizer is None:
            raise ConfigError(f"{model} has no tokenizer, so prompts in words cannot be asked")
        items, missing = draw(tokenizer, checkpoint.config, tasks, "test", seed, count)
        fewer = Count(*(-(-number // _CALIBRATION) for number in count))
        calibration, _ = draw(tokenizer, checkpoint.config, list(items), "train", seed, fewer)
        if not items:
            raise ConfigError(f"nothing is left to ask: {'; '.join(missing.values())}")
        return cls(items, calibration, missing, _context([*items.values(), *calibration.values()], checkpoint.config))


def _context(groups: Sequence[Sequence[Item]], config: ModelConfig) -> int:
    needed = 0
    for item in (item for items in groups for item in items):
        tokens = len(item.prompt) + max(len(item.scored), ANSWER_TOKENS if item.answer is not None else 0)
        if tokens > config.max_position:
            raise ConfigError(
                f"a prompt of {item.task} takes {tokens} tokens with its answer; the model has {config.max_position}"
            )
        needed = max(needed, tokens)
    return min(config.max_position, -(-needed // 64) * 64)


def check_policies(model: str, policies: Sequence[str]) -> None:
    """Raise `ConfigError` where a policy needs what the checkpoint has not, before an hour has gone into others."""
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    known = RoutingKnowledge.load(checkpoint.directory, config, "auto", "auto").for_policies()
    for policy in policies:
        make_policy(policy, len(config.moe_layers), config.num_experts, None, known)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The rows of one cell, and the seconds that it took with loading and compiling."""

    rows: list[Row]
    seconds: float
    state: dict[str, Any]
    """`Engine.state` when all was served, of the last run."""


def measure(
    model: str,
    cells: Sequence[Cell],
    traffic: Traffic,
    concurrency: int,
    seed: int,
    random_draws: int,
    start: Start,
    embed: Embed | None = None,
    task_profile: Path | None = None,
) -> Iterator[Measured]:
    """First the cell `FULL`, then the others in order. The policy `random` runs with `random_draws` sets of experts, as
    one set may happen to suit a task. `task_profile` replaces the checkpoint's where none is calibrated.
    """
    stream = in_bursts(traffic.items, seed)
    asked = sum(1 if item.answer is None else 2 for item in stream)
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "task_profile.json"
        began = time.monotonic()
        everything = dataclasses.replace(FULL, policy="static")
        with engine_of(model, everything, traffic.context, concurrency, seed) as engine:
            reference = outcomes(engine, stream, concurrency, start("all experts resident", asked))
            yield measured(FULL, stream, [reference], reference, seed, began, engine.state(), embed)
            if any(needs_profile(cell.policy) for cell in cells):
                calibration = in_bursts(traffic.calibration, seed)
                tell = start("calibration of fixed tables, training prompts", len(calibration))
                calibrated(engine, calibration, concurrency, tell).save(profile)
        for number, cell in enumerate(cells, start=1):
            began, runs, state = time.monotonic(), [], {}
            requests = stream if cell.misnamed is None else wrongly_named(stream, cell.misnamed, seed)
            for draw_seed in range(seed, seed + (random_draws if cell.policy == "random" else 1)):
                title = f"{cell.name}, {cell.share:.0%} resident, {cell.contract} ({number} of {len(cells)})"
                tell = start(title, asked)
                own = profile if needs_profile(cell.policy) else task_profile
                try:
                    with engine_of(model, cell, traffic.context, concurrency, draw_seed, own) as engine:
                        runs.append(outcomes(engine, requests, concurrency, tell, cell.misnamed is not None))
                        state = engine.state()
                except EmoeError as error:
                    raise type(error)(f"{title}: {error}") from None
            yield measured(cell, stream, runs, reference, seed, began, state, embed)


def measured(
    cell: Cell,
    stream: Sequence[Item],
    runs: Sequence[Sequence[Outcome]],
    reference: Sequence[Outcome],
    seed: int,
    began: float,
    state: dict[str, Any],
    embed: Embed | None = None,
) -> Measured:
    """A row for each task of the stream; `began` is when the cell did, on the monotonic clock."""
    rows = []
    for task in dict.fromkeys(item.task for item in stream):
        of_task = [index for index, item in enumerate(stream) if item.task == task]
        found = [_at(of_task, run) for run in runs]
        rows.append(row(cell, _at(of_task, stream), found, _at(of_task, reference), seed, embed))
    return Measured(rows, time.monotonic() - began, state)


def _at(indices: Sequence[int], values: Sequence[T]) -> list[T]:
    return [values[index] for index in indices]
