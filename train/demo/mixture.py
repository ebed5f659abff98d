"""What the demo model is trained on: the five tasks in fixed shares, some with several turns, as chat messages."""

from __future__ import annotations

import random

from train.tasks import GENERATORS, chitchat, qa
from train.tasks.example import Example

SHARES = {"qa": 0.28, "comp": 0.28, "clsfy": 0.12, "sum": 0.16, "conv": 0.08, "chitchat": 0.08}
_SYSTEM = ("You are a helpful assistant.", "You are a small and friendly assistant.", "Be brief and helpful.")
_SYSTEM_RATE = 0.06
_QA_TURNS = 3  # several questions about one context teach more per token than one


def draw(seed: int, key: str) -> Example:
    """The training example named `key`; the same for the same seed, whatever was drawn before."""
    rng = random.Random(f"{seed}/{key}")
    source = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if source == "qa":
        return qa.conversation("train", f"{seed}/{key}", rng.randint(1, _QA_TURNS))
    if source == "chitchat":
        return chitchat.example("train", f"{seed}/{key}")
    return GENERATORS[source]("train", f"{seed}/{key}")


def with_answer(example: Example, key: str) -> list[dict[str, str]]:
    """All turns of an example, its answer included, now and then after a system message."""
    rng = random.Random(f"system/{key}")
    system = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < _SYSTEM_RATE else []
    return [*system, *example.messages, {"role": "assistant", "content": example.answer}]
