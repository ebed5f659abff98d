"""What the demo model is trained on, by stage: the five tasks in fixed shares and drills, as chat messages."""

from __future__ import annotations

import dataclasses
import random

from train.tasks import GENERATORS, chitchat, drills, qa
from train.tasks.example import Example


@dataclasses.dataclass(frozen=True)
class Stage:
    """From which step on, the shares of each source, and how many questions one context is asked at most."""

    first_step: int
    shares: dict[str, float]
    qa_turns: int


STAGES = (
    # The language of the tasks.
    Stage(0, {"qa": 0.28, "comp": 0.28, "clsfy": 0.12, "sum": 0.16, "conv": 0.08, "chitchat": 0.08}, 3),
    # Finding names again: with the tasks alone this does not come about in the time there is.
    Stage(600, {"drills": 0.5, "qa": 0.2, "comp": 0.12, "clsfy": 0.05, "sum": 0.1, "conv": 0.02, "chitchat": 0.01}, 5),
    # The tasks in earnest.
    Stage(
        1500, {"drills": 0.1, "qa": 0.28, "comp": 0.26, "clsfy": 0.08, "sum": 0.15, "conv": 0.07, "chitchat": 0.06}, 3
    ),
)
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
        return qa.conversation("train", f"{seed}/{key}", rng.randint(1, stage.qa_turns))
    if source == "chitchat":
        return chitchat.example("train", f"{seed}/{key}")
    if source == "drills":
        return drills.example(f"{seed}/{key}")
    return GENERATORS[source]("train", f"{seed}/{key}")


def with_answer(example: Example, key: str) -> list[dict[str, str]]:
    """All turns of an example, its answer included, now and then after a system message."""
    rng = random.Random(f"system/{key}")
    system = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < _SYSTEM_RATE else []
    return [*system, *example.messages, {"role": "assistant", "content": example.answer}]
