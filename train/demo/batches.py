"""Training batches as a function of the step number: rows packed with whole conversations that do not see each other.

Nothing is kept between steps, so a run that resumes at step `s` sees exactly what an uninterrupted run would have seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from emoe_jax.config import ModelConfig
from train.demo import mixture
from train.demo.tokenizer import ASSISTANT, BOS, EOS, PAD, SYSTEM, USER
from train.tasks import TASKS

ANSWER_WEIGHTS = {"qa": 3.0, "comp": 4.0, "clsfy": 2.0, "sum": 1.0, "conv": 0.5}
PROMPT_WEIGHT = 0.3
FEWEST_SLOTS, MOST_SLOTS = 2, 12  # of a row that gets by with part of the experts, in each layer
_ROLE_TOKENS = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}


class Batch(NamedTuple):
    """`B` packed rows of `T` tokens, and the `P` positions (of the B * T flattened) whose next token is learned."""

    tokens: Int[Array | np.ndarray, "B T"]
    positions: Int[Array | np.ndarray, "B T"]
    documents: Int[Array | np.ndarray, "B T"]  # number of the conversation within its row, from 1; 0 is padding
    loss_at: Int[Array | np.ndarray, " P"]
    targets: Int[Array | np.ndarray, " P"]
    weights: Float[Array | np.ndarray, " P"]
    tasks: Int[Array | np.ndarray, "B T"]  # index into `TASKS`; that of padding says nothing
    slots: Int[Array | np.ndarray, "B L"]  # experts that a row may use in each layer
    luck: Float[Array | np.ndarray, "B L E"]  # Gumbel noise on which they are


class Encoder:
    """Turns chat messages into token ids exactly as the chat template does, and marks what the assistant says."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special: dict[str, int] = {}
        for token in (BOS, EOS, PAD, USER, ASSISTANT, SYSTEM):
            number = tokenizer.token_to_id(token)
            if number is None:
                raise ValueError(f"the tokenizer has no {token} token; it is not the demo model's")
            self.special[token] = number

    def text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def conversation(self, messages: list[dict[str, str]], task: str) -> tuple[list[int], list[float]]:
        """Token ids, and per token the loss weight of predicting it."""
        ids, weights = [self.special[BOS]], [0.0]
        for message in messages:
            body = self.text(message["content"])
            spoken = message["role"] == "assistant"
            body += [self.special[EOS]] if spoken else []
            ids += [self.special[_ROLE_TOKENS[message["role"]]], *body]
            weights += [0.0, *[ANSWER_WEIGHTS[task] if spoken else PROMPT_WEIGHT] * len(body)]
        return ids, weights


def make(
    encoder: Encoder,
    config: ModelConfig,
    seed: int,
    step: int,
    rows: int,
    length: int,
    loss_positions: int,
    joined: bool = False,
) -> Batch:
    """The batch of a step. Conversations longer than a row are left out; positions of prompts are thinned to fit.

    `joined` makes one conversation of each row, so that the model also sees long chats and positions up to `length`.
    """
    packed = _pack(encoder, seed, step, rows, length)
    tokens = np.full((rows, length), encoder.special[PAD], np.int32)
    positions = np.zeros((rows, length), np.int32)
    documents = np.zeros((rows, length), np.int32)
    tasks = np.zeros((rows, length), np.int32)
    weight_of_next = np.zeros((rows, length), np.float32)
    for row, conversations in enumerate(packed):
        start = 0
        for document, (ids, weights, task) in enumerate(conversations, start=1):
            if joined and document > 1:
                ids, weights = ids[1:], weights[1:]
            end = start + len(ids)
            tokens[row, start:end] = ids
            positions[row, start:end] = np.arange(start, end) if joined else np.arange(len(ids))
            documents[row, start:end] = 1 if joined else document
            tasks[row, start:end] = TASKS.index(task)
            weight_of_next[row, start : end - 1] = weights[1:]
            start = end
    return Batch(
        tokens,
        positions,
        documents,
        *_loss_positions(tokens, weight_of_next, loss_positions, seed, step),
        tasks,
        *_restrictions(config, rows, seed, step),
    )


def _restrictions(config: ModelConfig, rows: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """`slots` and `luck` of a batch."""
    rng = np.random.default_rng((seed, step, 1))
    layers, experts = len(config.moe_layers), config.num_experts
    few = rng.integers(min(FEWEST_SLOTS, experts), min(MOST_SLOTS, experts) + 1, (rows, layers), np.int32)
    restricted = rng.random((rows, 1)) < mixture.stage_of(step).restricted
    slots = np.where(restricted, few, np.int32(experts))
    return slots, rng.gumbel(size=(rows, layers, experts)).astype(np.float32)


def _pack(
    encoder: Encoder, seed: int, step: int, rows: int, length: int
) -> list[list[tuple[list[int], list[float], str]]]:
    """Conversations for every row, first fit, until several in a row found no room."""
    packed: list[list[tuple[list[int], list[float], str]]] = [[] for _ in range(rows)]
    room = [length] * rows
    misses, number = 0, 0
    stage = mixture.stage_of(step)
    while misses < 8:
        key = f"{step}/{number}"
        number += 1
        example = mixture.draw(seed, key, stage)
        ids, weights = encoder.conversation(mixture.with_answer(example, f"{seed}/{key}"), example.task)
        row = next((row for row in range(rows) if room[row] >= len(ids)), None)
        if row is None:
            misses += 1
            continue
        packed[row].append((ids, weights, example.task))
        room[row] -= len(ids)
    return packed


def _loss_positions(
    tokens: Int[np.ndarray, "B T"], weight_of_next: Float[np.ndarray, "B T"], count: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All answer positions and as many random prompt positions as there is room for, padded with weight 0."""
    flat = weight_of_next.reshape(-1)
    rng = np.random.default_rng((seed, step))
    answers = np.flatnonzero(flat > PROMPT_WEIGHT)
    prompts = np.flatnonzero((flat > 0) & (flat <= PROMPT_WEIGHT))
    chosen = np.concatenate([rng.permutation(answers), rng.permutation(prompts)])[:count].astype(np.int32)
    padding = np.zeros(count - len(chosen), np.int32)
    loss_at = np.concatenate([chosen, padding])
    weights = np.concatenate([flat[chosen], padding.astype(np.float32)])
    return loss_at, np.roll(tokens.reshape(-1), -1)[loss_at], weights
