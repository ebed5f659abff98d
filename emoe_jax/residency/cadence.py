"""`Cadence`: after how many prompts the predictor is asked again, by what a prediction costs and what it gains."""

from __future__ import annotations

from typing import Any

MOST_PROMPTS = 64
"""The most prompts per prediction. Predictions never stop: they may become worth more."""

FEWEST_JUDGED = 16
"""Predictions whose gain is known before the number of prompts changes."""

WINDOW = 64.0
"""Prompts and predictions after which an earlier one counts half."""

UP, DOWN = 1.25, 0.4
"""The number doubles above `UP` times itself and halves below `DOWN` times itself; between these it stays."""


class DecayedMean:
    """Mean of values by weight, of which earlier ones count less: half after a weight of `half_life`."""

    def __init__(self, half_life: float = WINDOW):
        self._half_life = half_life
        self._sum = self._weight = 0.0

    def add(self, total: float, weight: float = 1.0) -> None:
        """`total` is the sum of so many values."""
        keep = 0.5 ** (weight / self._half_life)
        self._sum, self._weight = keep * self._sum + total, keep * self._weight + weight

    @property
    def value(self) -> float | None:
        """None before the first."""
        return self._sum / self._weight if self._weight else None


class Cadence:
    """Chooses `every`, a power of two from 1 to `MOST_PROMPTS`; begins at 1.

    A prediction may cost that share of a prompt's computing time which it adds to the prompt's coverage. Worked
    example: 2 ms per prediction, 50 ms of computing per prompt, coverage 0.91 instead of 0.90: 4 % of the time for
    1 % of coverage, so every fourth prompt is asked about.
    """

    def __init__(self) -> None:
        self.every = 1
        self._prediction, self._gain = DecayedMean(), DecayedMean()
        self._prompt = DecayedMean()
        self._computing = 0.0  # seconds since the last prompt ended
        self._judged = 0

    def predicted(self, seconds: float, prompts: int) -> None:
        """A call of the predictor took `seconds` for so many prompts."""
        self._prediction.add(seconds, prompts)

    def computed(self, seconds: float) -> None:
        """The device computed for so long."""
        self._computing += seconds

    def ended(self) -> None:
        """A prompt's answers ended."""
        self._prompt.add(self._computing)
        self._computing = 0.0

    def judged(self, gain: float) -> None:
        """By how much of its wishes a prompt's own prediction covered more than frequency, and what follows from it."""
        self._gain.add(gain)
        self._judged += 1
        wanted = self._wanted()
        if self._judged < FEWEST_JUDGED or wanted is None:
            return
        if wanted > UP * self.every and self.every < MOST_PROMPTS:
            self.every *= 2
        elif wanted < DOWN * self.every and self.every > 1:
            self.every //= 2

    def state(self) -> dict[str, Any]:
        """What the choice goes by: seconds of a prediction and of a prompt, share of the wishes gained."""
        numbers = {
            "seconds_per_prediction": self._prediction.value,
            "computing_seconds_per_prompt": self._prompt.value,
            "gain": self._gain.value,
        }
        return {name: None if value is None else round(value, 6) for name, value in numbers.items()}

    def _wanted(self) -> float | None:
        """Prompts per prediction at which it costs as much as it gains; None before all is measured."""
        prediction, prompt, gain = self._prediction.value, self._prompt.value, self._gain.value
        if prediction is None or gain is None or not prompt:
            return None
        cost = prediction / prompt
        return cost / gain if gain * MOST_PROMPTS > cost else float(MOST_PROMPTS)
