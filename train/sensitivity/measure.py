"""What a model answers, and how sure it is of its own answers, while the routing of some layers is random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from train.sensitivity.forward import RandomisedModel, TextInputs, page_room

_ROUND = 64  # tokens that lengths are rounded up to, so that few shapes compile


class Deviation(NamedTuple):
    """How the model with random layers takes the resident model's answers, token by token, one number per prompt."""

    kl: Float[np.ndarray, " examples"]  # KL(resident || random), nats per token, mean over the answer
    nats: Float[np.ndarray, " examples"]  # surprise at the answer's tokens, sum
    agreement: Float[np.ndarray, " examples"]  # share of its tokens that are still the most probable ones


def generate(
    model: RandomisedModel,
    prompts: Sequence[list[int]],
    random_layers: Bool[np.ndarray, " M"],
    max_tokens: int,
    batch: int,
) -> list[list[int]]:
    """The greedy answer to every prompt, without the token that ends it."""
    answers: list[list[int]] = [[] for _ in prompts]
    ends = set(model.config.eos_token_ids)
    for chosen in _batches([len(prompt) for prompt in prompts], batch):
        width = _width([len(prompts[x]) for x in chosen], model.max_tokens)
        tokens, lengths = _padded([prompts[x] for x in chosen], batch, width)
        sequences = np.resize(np.array(chosen, np.int32), batch)
        cache, tables = model.new_cache(batch, page_room(width + max_tokens))
        starts, last = np.zeros(batch, np.int32), np.maximum(lengths - 1, 0)[:, None]
        growing = np.arange(batch) < len(chosen)
        for _ in range(max_tokens):
            inputs = TextInputs(tokens, starts, lengths, tables)
            cache, logits = model.run(cache, inputs, last, sequences, random_layers)
            best = np.asarray(jnp.argmax(logits[:, 0], axis=-1)).astype(np.int32)
            for row, x in enumerate(chosen):
                growing[row] &= best[row] not in ends
                if growing[row]:
                    answers[x].append(int(best[row]))
            if not growing.any():
                break
            starts = starts + lengths
            tokens, lengths, last = best[:, None], growing.astype(np.int32), np.zeros((batch, 1), np.int32)
    return answers


class Follower:
    """Lets a model with random layers read the resident model's own answers: no generation, hence smooth numbers.

    The token after the answer, which ends it or would have come next, counts as its last.
    """

    def __init__(self, model: RandomisedModel, prompts: Sequence[list[int]], answers: Sequence[list[int]], batch: int):
        self._model, self._batch, self._number = model, batch, len(prompts)
        self._texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        self._answers = [len(answer) + 1 for answer in answers]
        self._longest = max(self._answers)

    def deviations(self, patterns: Sequence[Bool[np.ndarray, " M"]]) -> list[Deviation]:
        """One for each pattern of random layers."""
        found = [Deviation(*np.zeros((3, self._number))) for _ in patterns]
        calm = np.zeros_like(patterns[0])
        for chosen in _batches([len(text) for text in self._texts], self._batch):
            reference = self._logits(chosen, calm)
            count = np.zeros(self._batch, np.int32)
            count[: len(chosen)] = [self._answers[x] for x in chosen]
            for pattern, deviation in zip(patterns, found, strict=True):
                numbers = _compare(reference, self._logits(chosen, pattern), count)
                for field, values in zip(deviation, numbers, strict=True):
                    field[chosen] = np.asarray(values)[: len(chosen)]
        return found

    def num_tokens(self) -> Int[np.ndarray, " examples"]:
        """Of each answer, its end included."""
        return np.array(self._answers)

    def _logits(self, chosen: list[int], random_layers: Bool[np.ndarray, " M"]) -> Float[Array, "B answer V"]:
        """Logits that decide the answers' tokens, left-aligned; what comes after an answer is padding."""
        width = _width([len(self._texts[x]) for x in chosen], self._model.max_tokens)
        tokens, lengths = _padded([self._texts[x] for x in chosen], self._batch, width)
        at = np.zeros((self._batch, self._longest), np.int32)
        for row, x in enumerate(chosen):
            first = len(self._texts[x]) - self._answers[x]
            at[row] = np.minimum(first + np.arange(self._longest), len(self._texts[x]) - 1)
        cache, tables = self._model.new_cache(self._batch, page_room(width))
        inputs = TextInputs(tokens, np.zeros(self._batch, np.int32), lengths, tables)
        sequences = np.resize(np.array(chosen, np.int32), self._batch)
        return self._model.run(cache, inputs, at, sequences, random_layers)[1]


@jax.jit
def _compare(
    resident: Float[Array, "B answer V"], random: Float[Array, "B answer V"], count: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Mean KL, summed nats and agreement over the first `count` places of each row."""
    used = jnp.arange(resident.shape[1])[None] < count[:, None]
    wanted, given = jax.nn.log_softmax(resident), jax.nn.log_softmax(random)
    kl = jnp.sum(jnp.exp(wanted) * (wanted - given), axis=-1)
    best = jnp.argmax(wanted, axis=-1)
    nats = -jnp.take_along_axis(given, best[..., None], axis=-1)[..., 0]
    agree = jnp.argmax(given, axis=-1) == best
    mean, counted = jnp.maximum(count, 1).astype(jnp.float32), used.astype(jnp.float32)
    agreed = jnp.sum(agree & used, 1).astype(jnp.float32)
    return jnp.sum(kl * counted, 1) / mean, jnp.sum(nats * counted, 1), agreed / mean


def _batches(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Numbers of sequences of like length, `batch` at a time."""
    order = sorted(range(len(lengths)), key=lambda x: lengths[x])
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def _width(lengths: Sequence[int], limit: int) -> int:
    """The longest, rounded up as far as the model goes."""
    return max(max(lengths), min(-(-max(lengths) // _ROUND) * _ROUND, limit))


def _padded(texts: Sequence[list[int]], rows: int, width: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        lengths[row] = len(text)
    return tokens, lengths
