"""What a step takes, learned while serving: `c` of eMoE eq. 3, apart for prompts and answers."""

import dataclasses

from emoe_jax.scheduling.plan import StepPlan

FORGETTING = 0.995
"""Weight that an observation keeps per later step: the last 200 steps count."""
REFIT_EVERY = 8
"""Steps between two fits."""
OUTLIER = 3.0
"""Residuals beyond so many times the usual one pull no harder than that (Huber)."""
CONFIDENCE = 1e-3
"""How many observed steps the last estimate weighs as, so that a coefficient that is not observed stays as it is."""
_TYPICAL = (1.0, 1.0, 100.0, 4.0)
"""What one such step would have of each: itself, chunks, prompt tokens, decodes."""


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Seconds of a step: for being one, per prompt chunk, per prompt token, per sequence that decodes."""

    step: float = 0.005
    chunk: float = 0.001
    prefill_token: float = 0.0001
    decode: float = 0.0005

    def seconds(self, decodes: float, prefill_tokens: float = 0, chunks: float = 0) -> float:
        """Of a step with so many decoding sequences, and so many prompt tokens in so many chunks."""
        return self.step + self.chunk * chunks + self.prefill_token * prefill_tokens + self.decode * decodes

    def of(self, plan: StepPlan) -> float:
        """Seconds of the step that a plan describes."""
        return self.seconds(len(plan.decodes), plan.num_prefill_tokens, len(plan.prefills))

    def prefill(self, tokens: float, chunks: float = 1) -> float:
        """What a prompt adds to the steps that compute it."""
        return self.chunk * chunks + self.prefill_token * tokens


class CostModel:
    """Exponentially weighted least squares of step times, robust against outliers, coefficients never negative.

    A coefficient that nothing has been observed of stays what it was, at first the prior's.
    """

    def __init__(self, prior: StepCost | None = None):
        self.cost = prior or StepCost()
        """The current estimate."""
        self.num_observed = 0
        self._normal = [[0.0] * 4 for _ in range(4)]  # normal equations of the weighted observations
        self._moment = [0.0] * 4
        self._residual: float | None = None

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step of this plan took `seconds`."""
        row = (1.0, float(len(plan.prefills)), float(plan.num_prefill_tokens), float(len(plan.decodes)))
        residual = abs(seconds - self.cost.of(plan))
        weight = 1.0
        if self._residual is None:
            self._residual = residual
        else:
            limit = OUTLIER * max(self._residual, 0.01 * seconds)
            if residual > limit:
                weight = limit / residual
            self._residual += 0.05 * (min(residual, 2 * limit) - self._residual)
        normal, moment = self._normal, self._moment
        for i in range(4):
            scaled = weight * row[i]
            moment[i] = FORGETTING * moment[i] + scaled * seconds
            line = normal[i]
            for j in range(4):
                line[j] = FORGETTING * line[j] + scaled * row[j]
        self.num_observed += 1
        if self.num_observed <= REFIT_EVERY or self.num_observed % REFIT_EVERY == 0:
            self.cost = self._fit()

    def state(self) -> dict[str, float | int]:
        """The estimate in seconds, as JSON-able values."""
        return dataclasses.asdict(self.cost) | {"observed": self.num_observed}

    def _fit(self) -> StepCost:
        """Least squares without the coefficients that would come out negative."""
        normal, moment = [list(line) for line in self._normal], list(self._moment)
        for i, value in enumerate(dataclasses.astuple(self.cost)):
            weight = CONFIDENCE * _TYPICAL[i] ** 2
            normal[i][i] += weight
            moment[i] += weight * value
        kept = [0, 1, 2, 3]
        while True:
            values = _solve([[normal[i][j] for j in kept] for i in kept], [moment[i] for i in kept])
            worst = min(range(len(kept)), key=lambda index: values[index])
            if values[worst] >= 0 or len(kept) == 1:
                break
            del kept[worst]
        found = dict(zip(kept, values, strict=True))
        return StepCost(*(max(0.0, found.get(i, 0.0)) for i in range(4)))


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """The solution of a small positive definite system, by elimination on the diagonal."""
    size = len(vector)
    rows = [[*line, value] for line, value in zip(matrix, vector, strict=True)]
    for i in range(size):
        pivot = rows[i][i]
        for below in range(i + 1, size):
            factor = rows[below][i] / pivot
            if factor:
                rows[below] = [x - factor * y for x, y in zip(rows[below], rows[i], strict=True)]
    values = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * values[j] for j in range(i + 1, size))
        values[i] = (rows[i][size] - known) / rows[i][i]
    return values
