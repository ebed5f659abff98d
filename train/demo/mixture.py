"""What the demo model is trained on, by stage: the five tasks in fixed shares and drills, as chat messages."""

from __future__ import annotations

import dataclasses
import random

from train.tasks import GENERATORS, chitchat, comp, drills, qa
from train.tasks.example import Example


@dataclasses.dataclass(frozen=True)
class Stage:
    """From which step on: the share of each source. Drills first, so that what all tasks need is learned early.

    `restricted` is the share of rows that get by with part of the experts, as when the model is served from a slab.
    `coined` is the share of nouns in questions and answers that no list holds, so that any word is copied.
    """

    first_step: int
    shares: dict[str, float]
    restricted: float
    coined: float = 0.0


STAGES = (
    Stage(
        0,
        {
            "drills": 0.18,
            "qa": 0.18,
            "rivals": 0.04,
            "comp": 0.18,
            "retold": 0.12,
            "clsfy": 0.13,
            "sum": 0.1,
            "conv": 0.04,
            "chitchat": 0.03,
        },
        restricted=0.1,
    ),
    Stage(
        1000,
        {
            "drills": 0.05,
            "qa": 0.22,
            "rivals": 0.05,
            "comp": 0.22,
            "retold": 0.13,
            "clsfy": 0.15,
            "sum": 0.1,
            "conv": 0.05,
            "chitchat": 0.03,
        },
        restricted=0.33,
    ),
    Stage(
        4300,
        {
            "drills": 0.04,
            "qa": 0.23,
            "rivals": 0.04,
            "comp": 0.24,
            "retold": 0.14,
            "clsfy": 0.18,
            "sum": 0.08,
            "conv": 0.03,
            "chitchat": 0.02,
        },
        restricted=0.33,
        coined=0.2,
    ),
)
_QUESTIONS = 4  # at most, about one passage
_SYSTEM = ("You are a helpful assistant.", "You are a small and friendly assistant.", "Be brief and helpful.")
_SYSTEM_RATE = 0.06


def stage_of(step: int) -> Stage:
    """The last stage that has begun."""
    return next(stage for stage in reversed(STAGES) if stage.first_step <= step)


def draw(seed: int, key: str, stage: Stage = STAGES[0]) -> Example:
    """The training example named `key`; the same for the same seed and stage, whatever was drawn before."""
    rng = random.Random(f"{seed}/{key}")
    source = rng.choices(list(stage.shares), list(stage.shares.values()))[0]
    if source in ("qa", "rivals"):
        return qa.conversation("train", f"{seed}/{key}", rng.randint(1, _QUESTIONS), source == "rivals", stage.coined)
    if source == "chitchat":
        return chitchat.example("train", f"{seed}/{key}")
    if source == "retold":
        return comp.retold(f"{seed}/{key}")
    if source == "drills":
        return drills.example(f"{seed}/{key}")
    return GENERATORS[source]("train", f"{seed}/{key}")


def with_answer(example: Example, key: str) -> list[dict[str, str]]:
    """All turns of an example, its answer included, now and then after a system message."""
    rng = random.Random(f"system/{key}")
    system = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < _SYSTEM_RATE else []
    return [*system, *example.messages, {"role": "assistant", "content": example.answer}]
