"""From prompts, the prior's opinion and the prompts before, to the arrays that the network takes."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from emoe_jax.predictor.kernel import PromptKernel
from emoe_jax.predictor.model import Inputs
from emoe_jax.predictor.prompts import Prompts, frequencies

_HALF_LIFE = 8  # prompts, of the memory of earlier ones


@dataclasses.dataclass(frozen=True)
class History:
    """Routing of the prompts before one, in arrival order (eMoE eq. 1's input). NaN where there was none yet."""

    last: Float[np.ndarray, "M E"]
    recent: Float[np.ndarray, "M E"]  # decayed mean over all before

    @staticmethod
    def empty(num_layers: int, num_experts: int) -> History:
        """The history of the first prompt: NaN throughout."""
        nothing = np.full((num_layers, num_experts), np.nan, np.float32)
        return History(nothing, nothing)

    def after(self, counts: Int[np.ndarray, "M E"]) -> History:
        """The history of the prompt that comes after one routed like this."""
        if not counts.any():
            return self
        now = frequencies(counts)
        keep = 0.5 ** (1 / _HALF_LIFE)
        return History(now, now if np.isnan(self.recent).any() else keep * self.recent + (1 - keep) * now)

    @staticmethod
    def of(counts: Int[np.ndarray, "P M E"]) -> list[History]:
        """The history of every prompt of a trace."""
        histories = [History.empty(*counts.shape[1:])]
        for routed in counts[:-1]:
            histories.append(histories[-1].after(routed))
        return histories


class InputBuilder:
    """Centres and scales what the network sees by the statistics of the prompts it was trained on."""

    def __init__(self, kernel: PromptKernel, prompts: Prompts):
        self._kernel = kernel
        roots = np.sqrt(frequencies(prompts.counts))
        self.centre = roots.mean(0)
        self.scale = float(1 / max(roots.std(0).mean(), 1e-6))
        coordinates = kernel.coordinates(prompts)
        self._spread = max(float(coordinates.std()), 1e-6) if coordinates.size else 1.0

    def routing(self, shares: Float[np.ndarray, "B M E"]) -> Float[np.ndarray, "B M E"]:
        """Frequencies as the network sees them; unknown ones (NaN) as the mean."""
        return np.nan_to_num((np.sqrt(shares) - self.centre) * self.scale, nan=0.0).astype(np.float32)

    def build(
        self, prompts: Prompts, prior: Float[np.ndarray, "B M E"], histories: list[History], with_first: bool
    ) -> Inputs:
        """The network's inputs for `B` prompts, each with its own history.

        `prior` holds positive shares, because its logarithm is taken. Without `with_first` the routing of the first
        answer tokens counts as unknown.
        """
        first = frequencies(prompts.first) if with_first else np.full_like(prior, np.nan)
        channels = (prior, np.stack([h.last for h in histories]), np.stack([h.recent for h in histories]), first)
        return Inputs(
            prior=np.log(prior),  # pyright: ignore[reportArgumentType]
            layers=np.stack([self.routing(channel) for channel in channels], axis=2),  # pyright: ignore[reportArgumentType]
            names=self._kernel.names(prompts.tasks),  # pyright: ignore[reportArgumentType]
            embedding=self._kernel.coordinates(prompts) / self._spread,  # pyright: ignore[reportArgumentType]
        )
