"""`Predictor`: what is asked before a prompt runs and while its layers are computed, and told after it has run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.predictor import network
from emoe_jax.predictor.config import PredictorConfig, PredictorError
from emoe_jax.predictor.inputs import History, InputBuilder
from emoe_jax.predictor.kernel import PromptKernel
from emoe_jax.predictor.layers import LayerPrior
from emoe_jax.predictor.model import Known
from emoe_jax.predictor.network import Sizes, Weights
from emoe_jax.predictor.prior import KernelPrior
from emoe_jax.predictor.prompts import Prompts
from emoe_jax.predictor.token_prior import TokenPrior
from emoe_jax.predictor.tokens import Tokens

CONFIG, MEMORY, LAYERS, WEIGHTS = "config.json", "memory.npz", "layers.npz", "weights.safetensors"
TOKENS = "tokens.npz"
MAX_MEMORY = 1024  # prompts; refitting is cubic in them


class Predictor:
    """Distributions over experts for coming prompts: before they start, and given their routing in some layers.

    The third question, what an answer wishes for next, is `Dynamics`': it stands beside the predictor in its directory.
    Every scale and feature is that of the prompts it was trained on (`trained`); the prior also remembers prompts
    observed since, at most `MAX_MEMORY` in all, the oldest forgotten first. Not thread-safe.
    """

    def __init__(
        self,
        config: PredictorConfig,
        trained: Prompts,
        weights: Weights | None = None,
        remembered: Prompts | None = None,
        layers: LayerPrior | None = None,
        tokens: TokenPrior | None = None,
    ):
        """Without `weights` closed forms predict alone; the prior remembers `trained` unless told what else. Without
        `layers` nothing is predicted from earlier layers, and without `tokens` prompts' tokens are not read."""
        shape = (config.num_layers, config.num_experts)
        if trained.counts.shape[1:] != shape or trained.embedding.shape[1] != config.embedding_dim:
            raise PredictorError(
                f"remembered prompts have routing {list(trained.counts.shape[1:])} and embeddings of "
                f"{trained.embedding.shape[1]}; the predictor is for {list(shape)} and {config.embedding_dim}"
            )
        self.config, self.weights, self.layers, self.tokens = config, weights, layers, tokens
        self.trained, self.memory = trained, remembered or trained
        self.kernel = PromptKernel(trained)
        self.inputs = InputBuilder(self.kernel, trained)
        self.sizes = Sizes(self.kernel.names(()).shape[1], self.kernel.dim)
        self.history = History.empty(*shape)
        self._priors: dict[bool, KernelPrior] = {}  # those asked for since the last refit, by `with_first`
        self._widths = dict(zip((False, True), config.prior_widths or (), strict=False))  # of their kernels
        self._observed: list[Prompts] = []
        self._remember()  # the prior is made when it is first asked for: a server starts sooner

    @staticmethod
    def load(directory: str | Path) -> Predictor:
        """Read what `python -m train.predictor` wrote. Raises `PredictorError`, one line, where it cannot be used."""
        directory = Path(directory)
        config = PredictorConfig.load(directory / CONFIG)
        predictor = Predictor(config, Prompts.load(directory / MEMORY))
        predictor.layers = LayerPrior.load(directory / LAYERS, config)
        if config.tokens:
            predictor.tokens = TokenPrior.load(directory / TOKENS, config)
        predictor.weights = network.load(directory / WEIGHTS, config, predictor.sizes)
        return predictor

    def save(self, directory: str | Path) -> None:
        """Write all that `load` needs, without what was observed since training. How layers follow each other is
        learned from what is remembered, where it is not known.

        The description comes last: a directory written half does not load.
        """
        if self.weights is None:
            raise PredictorError("a predictor without weights cannot be saved")
        if self.layers is None:
            start = self.prior(with_first=False).left_out()
            self.layers, _ = LayerPrior.fit(start, self.memory.counts, self.config.top_k)
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.trained.save(directory / MEMORY)
        self.layers.save(directory / LAYERS)
        if self.tokens is not None:
            self.tokens.save(directory / TOKENS)
        network.save(self.weights, directory / WEIGHTS)
        before, after = self.priors
        config = dataclasses.replace(
            self.config, tokens=self.tokens is not None, prior_widths=(before.width, after.width)
        )
        (directory / CONFIG).write_text(json.dumps(config.to_json(), indent=2) + "\n")

    @property
    def num_parameters(self) -> int:
        """Of the networks. The prior's memory is the prompts in `memory`."""
        return 0 if self.weights is None else network.count(self.weights)

    @property
    def reads_tokens(self) -> bool:
        """Whether it makes use of prompts' tokens."""
        return self.tokens is not None

    def predict(
        self,
        task: str,
        embedding: Float[Array | np.ndarray, " d"] | None = None,
        first: Int[np.ndarray, "M E"] | None = None,
        tokens: Sequence[int] = (),
    ) -> Float[np.ndarray, "M E"]:
        """The distribution of a prompt's expert assignments in each layer; rows sum to 1.

        `task` may be one never seen. `first` counts the choices of the first answer tokens, once there are some.
        Prompts before this one are those that were observed.
        """
        unknown = np.zeros(self.inputs.centre.shape, np.int32)
        first = unknown if first is None else first
        ids = (np.asarray(tokens, np.int64),)
        prompt = Prompts((task,), self._embedding(embedding), unknown[None], first[None], ids)
        return self.predict_many(prompt, [self.history], with_first=bool(first.any()))[0]

    def predict_next(
        self,
        prompts: Sequence[tuple[str, Float[Array | np.ndarray, " d"] | None]],
        rows: int,
        tokens: Sequence[Sequence[int] | Tokens] | None = None,
    ) -> Float[np.ndarray, "P M E"]:
        """`predict` for tasks and embeddings of one prompt or more, each as if it came next; `tokens` are their ids.

        `rows` of them are computed, copies of the first where there are fewer, so that one shape is compiled.
        """
        asked = [*prompts, *[prompts[0]] * (rows - len(prompts))]
        unknown = np.zeros((rows, *self.inputs.centre.shape), np.int32)
        embedding = np.concatenate([self._embedding(embedding) for _, embedding in asked])
        ids = [np.asarray(of_prompt, np.int64) for of_prompt in tokens or [()] * len(prompts)]
        ids += [ids[0]] * (rows - len(prompts))
        coming = Prompts(tuple(task for task, _ in asked), embedding, unknown, unknown, tuple(ids))
        return self.predict_many(coming, [self.history] * rows, with_first=False)[: len(prompts)]

    def predict_many(
        self, prompts: Prompts, histories: Sequence[History], with_first: bool
    ) -> Float[np.ndarray, "P M E"]:
        """Distributions of several prompts, each with its own history; `prompts.counts` are not looked at."""
        return self.correct(prompts, self.prior(with_first).predict(prompts), histories, with_first)

    def correct(
        self, prompts: Prompts, prior: Float[np.ndarray, "P M E"], histories: Sequence[History], with_first: bool
    ) -> Float[np.ndarray, "P M E"]:
        """Distributions before the prompts run, given the prior's: by their tokens, then by the networks."""
        start = self.by_tokens(prompts, prior, with_first)
        if self.weights is None or not self.config.members:
            return start
        inputs = self.inputs.build(prompts, start, list(histories), with_first)
        return np.asarray(network.distribution(self.weights, self.config, self.sizes, inputs))

    def by_tokens(
        self, prompts: Prompts, prior: Float[np.ndarray, "P M E"], with_first: bool
    ) -> Float[np.ndarray, "P M E"]:
        """The prior corrected by the prompts' tokens, where these are read and known."""
        if self.tokens is None or prompts.tokens is None:
            return prior
        return self.tokens.predict(prompts.tokens, prior, with_first)

    def given_layers(
        self,
        prompts: Prompts,
        prior: Float[np.ndarray, "P M E"],
        histories: Sequence[History],
        shares: Float[np.ndarray, "P M E"],
        known: int | None = None,
        tokens: float | None = None,
    ) -> Float[np.ndarray, "P M E"]:
        """Each layer's distribution given the true routing `shares` of the layers before it.

        `prior` is what was said before the prompts ran. With `known`, only the first so many layers were routed yet:
        later `shares` are not looked at, and later layers are predicted from these. `tokens` is how many tokens
        `shares` count, where they are not whole prompts.
        """
        if self.layers is None:
            raise PredictorError("this predictor knows nothing of how layers follow each other")
        start = self.layers.predict(prior, shares, known, tokens)
        if self.weights is None or not self.config.members or self.config.variant != "layer-by-layer":
            return start
        inputs = self.inputs.build(prompts, start, list(histories), with_first=False)
        visible = self._earlier(len(prompts), known)
        seen = Known(jnp.asarray(self.inputs.routing(shares)), jnp.asarray(visible))
        return np.asarray(network.distribution(self.weights, self.config, self.sizes, inputs, seen))

    def _earlier(self, rows: int, known: int | None) -> Bool[np.ndarray, "P M M"]:
        layers = self.config.num_layers
        visible = np.tril(np.ones((layers, layers), bool), -1)
        visible[:, layers if known is None else known :] = False
        return np.broadcast_to(visible, (rows, layers, layers))

    def observe(
        self,
        task: str,
        counts: Int[np.ndarray, "M E"],
        embedding: Float[Array | np.ndarray, " d"] | None = None,
        first: Int[np.ndarray, "M E"] | None = None,
    ) -> None:
        """Take in how a finished prompt was routed. The next prediction sees it as the previous prompt; the prior
        learns from it at the next `refit`.
        """
        self.history = self.history.after(counts)
        early = counts if first is None else first
        self._observed.append(Prompts((task,), self._embedding(embedding), counts[None], early[None]))
        del self._observed[:-MAX_MEMORY]

    @property
    def num_unlearned(self) -> int:
        """Prompts observed since the last `refit`."""
        return len(self._observed)

    def refit(self) -> None:
        """Let the prior learn from what was observed; takes as long as `prior` does."""
        self._remember()
        self.prior(with_first=False)

    def _remember(self) -> None:
        for prompt in self._observed:
            self.memory = self.memory.join(prompt)
        self._observed = []
        self.memory = self.memory.routed()
        if len(self.memory) < 2:
            raise PredictorError(f"{len(self.memory)} prompts are too few to predict from")
        self.memory = self.memory.latest(MAX_MEMORY)
        self._priors = {}

    def prior(self, with_first: bool) -> KernelPrior:
        """The prior on what is remembered, before or after the first answer tokens. The first time after `refit`, it
        takes some tenths of a second at 500 prompts; its kernel's width is chosen only once, which takes four times
        as long.
        """
        if with_first not in self._priors:
            width = self._widths.get(with_first)
            self._priors[with_first] = KernelPrior(self.kernel, self.memory, with_first, width)
            self._widths[with_first] = self._priors[with_first].width
        return self._priors[with_first]

    @property
    def priors(self) -> tuple[KernelPrior, KernelPrior]:
        """Before and after the first answer tokens."""
        return self.prior(with_first=False), self.prior(with_first=True)

    def forget_history(self) -> None:
        """As if no prompt had come before; what the prior learned stays."""
        self.history = History.empty(*self.inputs.centre.shape)

    def _embedding(self, embedding: Float[Array | np.ndarray, " d"] | None) -> Float[np.ndarray, "1 d"]:
        dim = self.config.embedding_dim
        if dim == 0:
            return np.zeros((1, 0), np.float32)
        if embedding is None:
            return np.zeros((1, dim), np.float32)
        if np.shape(embedding) != (dim,):
            raise PredictorError(f"the prompt's embedding has shape {list(np.shape(embedding))}, not [{dim}]")
        known = np.asarray(embedding, np.float32)[None]  # waits for one that is still on the device
        return known if np.isfinite(known).all() else np.zeros_like(known)
