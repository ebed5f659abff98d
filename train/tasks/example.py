"""What a task generator hands out: one prompt with its reference answer."""

from __future__ import annotations

import dataclasses
from typing import Literal

Split = Literal["train", "test"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt of a task, the answer wanted, and the turns that came before it (user text, assistant text)."""

    prompt: str
    answer: str
    task: str
    history: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to and including the prompt, as chat messages."""
        turns = []
        for user, assistant in self.history:
            turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return [*turns, {"role": "user", "content": self.prompt}]
