"""Signs of life of a step, for whoever watches the thread that computes it."""

import dataclasses

FORGETTING = 0.99
"""What the longest step counts for after each further one: half after 69 steps."""


@dataclasses.dataclass(frozen=True)
class Vitals:
    """What is known of the step that runs."""

    longest_step: float | None
    """Seconds that steps take at most, waits for loads included; None before the first one."""
    progress: tuple[int, ...]
    """Counts that grow while something gets done: steps, bytes of experts staged, reads that failed."""
    compiling: bool
    """Whether the step waits for the compiler."""


class StepTimes:
    """The longest of the last steps, in seconds. One that was long for once is forgotten after a while."""

    def __init__(self) -> None:
        self.longest: float | None = None

    def took(self, seconds: float) -> None:
        """A step has ended."""
        self.longest = max(seconds, FORGETTING * (self.longest or 0.0))
