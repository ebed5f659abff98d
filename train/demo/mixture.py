"""What the demo model is trained on, by stage: the five tasks in fixed shares and drills, as chat messages."""

from __future__ import annotations

import dataclasses
import random

from train.tasks import GENERATORS, chitchat, drills, qa
from train.tasks.example import Example


@dataclasses.dataclass(frozen=True)
class Stage:
    """From which step on: the share of each source, how many questions a context is asked and how many facts it states
    at most."""

    first_step: int
    shares: dict[str, float]
    questions: int
    facts: int


STAGES = (
    Stage(
        0,
        {"drills": 0.3, "qa": 0.25, "comp": 0.2, "clsfy": 0.06, "sum": 0.12, "conv": 0.04, "chitchat": 0.03},
        questions=4,
        facts=6,
    ),
    Stage(
        700,
        {"drills": 0.1, "qa": 0.28, "comp": 0.27, "clsfy": 0.08, "sum": 0.14, "conv": 0.07, "chitchat": 0.06},
        questions=3,
        facts=6,
    ),
    Stage(
        800,
        {
            "lookup": 0.1,
            "same": 0.06,
            "qa": 0.38,
            "comp": 0.2,
            "clsfy": 0.06,
            "sum": 0.12,
            "conv": 0.06,
            "chitchat": 0.02,
        },
        questions=3,
        facts=3,
    ),
    Stage(
        1300,
        {"same": 0.03, "qa": 0.32, "comp": 0.24, "clsfy": 0.09, "sum": 0.15, "conv": 0.11, "chitchat": 0.06},
        questions=4,
        facts=6,
    ),
    Stage(
        1400,
        {"qa": 0.37, "comp": 0.2, "clsfy": 0.23, "sum": 0.1, "conv": 0.07, "chitchat": 0.03},
        questions=4,
        facts=4,
    ),
)
_DRILLS = {"drills": drills.example, "lookup": drills.lookup, "same": drills.same}
_SYSTEM = ("You are a helpful assistant.", "You are a small and friendly assistant.", "Be brief and helpful.")
_SYSTEM_RATE = 0.06


def stage_of(step: int) -> Stage:
    """The last stage that has begun."""
    return next(stage for stage in reversed(STAGES) if stage.first_step <= step)


def draw(seed: int, key: str, stage: Stage = STAGES[0]) -> Example:
    """The training example named `key`; the same for the same seed and stage, whatever was drawn before."""
    rng = random.Random(f"{seed}/{key}")
    source = rng.choices(list(stage.shares), list(stage.shares.values()))[0]
    if source == "qa":
        return qa.conversation("train", f"{seed}/{key}", rng.randint(1, stage.questions), stage.facts)
    if source == "chitchat":
        return chitchat.example("train", f"{seed}/{key}")
    if source in _DRILLS:
        return _DRILLS[source](f"{seed}/{key}")
    return GENERATORS[source]("train", f"{seed}/{key}")


def with_answer(example: Example, key: str) -> list[dict[str, str]]:
    """All turns of an example, its answer included, now and then after a system message."""
    rng = random.Random(f"system/{key}")
    system = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < _SYSTEM_RATE else []
    return [*system, *example.messages, {"role": "assistant", "content": example.answer}]
