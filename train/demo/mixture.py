"""What the demo model is trained on, by stage: the five tasks, made-up facts, real text and drills, in fixed shares."""

from __future__ import annotations

import dataclasses
import random

from train.tasks import GENERATORS, TASKS, comp, drills, facts, qa, texts
from train.tasks.example import Example

GROUPS = (*TASKS, "facts", *texts.KINDS)  # what a piece of training text counts as
TOKENS = {  # of a piece of each source on average, as it comes into a row of 128
    "drills": 64,
    "qa": 100,
    "rivals": 100,
    "comp": 41,
    "retold": 48,
    "clsfy": 34,
    "sum": 84,
    "conv": 66,
    "facts": 63,
    "articles": 84,
    "prose": 84,
    "reference": 84,
    "code": 84,
    "french": 84,
    "dialogue": 86,
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A conversation to learn, or running text (`text`); what it counts as."""

    group: str
    example: Example | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """From which part of the run on: the share of tokens of each source. Drills first, so that what all tasks need is
    learned early.

    `coined` is the share of nouns in questions and answers that no list holds, so that any word is copied.
    """

    begins: float
    shares: dict[str, float]
    coined: float = 0.0


_KNOWLEDGE = {"facts": 0.12, "articles": 0.04}
_TEXTS = {"prose": 0.06, "reference": 0.03, "code": 0.07, "french": 0.05, "dialogue": 0.06}
STAGES = (
    Stage(
        0.0,
        {
            **_KNOWLEDGE,
            **_TEXTS,
            "drills": 0.16,
            "qa": 0.14,
            "rivals": 0.03,
            "comp": 0.09,
            "retold": 0.06,
            "clsfy": 0.04,
            "sum": 0.04,
            "conv": 0.01,
        },
    ),
    Stage(
        0.1891,  # step 870 of 4,600
        {
            **_KNOWLEDGE,
            **_TEXTS,
            "drills": 0.05,
            "qa": 0.18,
            "rivals": 0.05,
            "comp": 0.11,
            "retold": 0.065,
            "clsfy": 0.05,
            "sum": 0.05,
            "conv": 0.015,
        },
    ),
    Stage(
        0.8,
        {
            **_KNOWLEDGE,
            **_TEXTS,
            "drills": 0.03,
            "qa": 0.19,
            "rivals": 0.04,
            "comp": 0.12,
            "retold": 0.07,
            "clsfy": 0.06,
            "sum": 0.05,
            "conv": 0.01,
        },
        coined=0.2,
    ),
)
_QUESTIONS = 4  # at most, about one passage
_CHARACTERS = 3000  # of running text: more than a row holds
_SYSTEM = ("You are a helpful assistant.", "You are a small and friendly assistant.", "Be brief and helpful.")
_SYSTEM_RATE = 0.06


def stage_of(step: int, steps: int) -> Stage:
    """The last stage that has begun at a step of a run of so many."""
    return next(stage for stage in reversed(STAGES) if stage.begins * steps <= step)


def draw(seed: int, key: str, stage: Stage) -> Piece:
    """The piece named `key`; the same for the same seed and stage, whatever was drawn before."""
    rng = random.Random(f"{seed}/{key}")
    rates = [share / TOKENS[source] for source, share in stage.shares.items()]
    source = rng.choices(list(stage.shares), rates)[0]
    name = f"{seed}/{key}"
    if source in texts.WRITTEN:
        return Piece(source, text=texts.passage(source, "train", name, _CHARACTERS))
    if source == "articles":
        return Piece("facts", text=facts.article(name))
    if source == "facts":
        return Piece("facts", facts.conversation(name))
    if source == "dialogue":
        return Piece("dialogue", texts.dialogue("train", name))
    example = _task_example(source, name, rng, stage)
    return Piece(example.task, example)


def filler(seed: int, key: str, stage: Stage) -> Piece:
    """Running text for what is left of a row, of a kind drawn by the stage's shares."""
    rng = random.Random(f"filler/{seed}/{key}")
    kind = rng.choices(texts.WRITTEN, [stage.shares[kind] for kind in texts.WRITTEN])[0]
    return Piece(kind, text=texts.passage(kind, "train", f"filler/{seed}/{key}", _CHARACTERS))


def _task_example(source: str, name: str, rng: random.Random, stage: Stage) -> Example:
    if source in ("qa", "rivals"):
        return qa.conversation("train", name, rng.randint(1, _QUESTIONS), source == "rivals", stage.coined)
    if source == "retold":
        return comp.retold(name)
    if source == "drills":
        return drills.example(name)
    return GENERATORS[source]("train", name)


def with_answer(example: Example, key: str) -> list[dict[str, str]]:
    """All turns of an example, its answer included, now and then after a system message."""
    rng = random.Random(f"system/{key}")
    system = [{"role": "system", "content": rng.choice(_SYSTEM)}] if rng.random() < _SYSTEM_RATE else []
    return [*system, *answered(example)]


def answered(example: Example) -> list[dict[str, str]]:
    """All turns of an example, its answer included."""
    return [*example.messages, {"role": "assistant", "content": example.answer}]
