"""Training batches as a function of the step number: rows packed with pieces of text that do not see each other.

Nothing is kept between steps, so a run that resumes at step `s` sees exactly what an uninterrupted run would have seen.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from emoe_jax.config import ModelConfig
from train.demo import mixture
from train.demo.mixture import GROUPS, Piece
from train.demo.tokenizer import ASSISTANT, BOS, EOS, PAD, SYSTEM, USER

ANSWER_WEIGHTS = {"qa": 3.0, "comp": 4.0, "clsfy": 2.0, "sum": 1.0, "conv": 0.5, "facts": 3.0, "dialogue": 0.5}
TEXT_WEIGHTS = {"facts": 1.0}  # of running text; of other groups:
TEXT_WEIGHT = 0.5
PROMPT_WEIGHT = 0.3
FEWEST_SLOTS, MOST_SLOTS = 1 / 8, 3 / 4  # share of a layer's experts that a row with expert dropout may use
_SHORTEST_TEXT = 8  # tokens
_ROLE_TOKENS = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a batch follows from, beside its step."""

    seed: int
    steps: int  # of the whole run
    loss_positions: int
    expert_dropout: float = 0.0  # share of rows that get by with part of the experts


class Batch(NamedTuple):
    """`B` packed rows of `T` tokens, and the positions (of the B * T flattened) whose next token is learned."""

    tokens: Int[Array | np.ndarray, "B T"]
    positions: Int[Array | np.ndarray, "B T"]
    documents: Int[Array | np.ndarray, "B T"]  # number of the piece within its row, from 1; 0 is padding
    loss_at: Int[Array | np.ndarray, " loss_positions"]
    targets: Int[Array | np.ndarray, " loss_positions"]
    weights: Float[Array | np.ndarray, " loss_positions"]
    groups: Int[Array | np.ndarray, "B T"]  # index into `GROUPS`; that of padding says nothing
    slots: Int[Array | np.ndarray, "B M"]  # experts that a row may use in each layer
    luck: Float[Array | np.ndarray, "B M E"]  # Gumbel noise on which they are


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

    def passage(self, text: str, length: int) -> list[int]:
        """Running text as a document of at most `length` tokens."""
        return [self.special[BOS], *self.text(text[: length * 8])][:length]

    def conversation(self, messages: list[dict[str, str]], group: str) -> tuple[list[int], list[float]]:
        """Token ids, and per token the loss weight of predicting it."""
        ids, weights = [self.special[BOS]], [0.0]
        for message in messages:
            body = self.text(message["content"])
            spoken = message["role"] == "assistant"
            body += [self.special[EOS]] if spoken else []
            ids += [self.special[_ROLE_TOKENS[message["role"]]], *body]
            weights += [0.0, *[ANSWER_WEIGHTS[group] if spoken else PROMPT_WEIGHT] * len(body)]
        return ids, weights

    def piece(self, piece: Piece, key: str, length: int) -> tuple[list[int], list[float]]:
        """A piece's token ids and loss weights; running text is cut to `length` tokens, a conversation is not."""
        if piece.example is not None:
            return self.conversation(mixture.with_answer(piece.example, key), piece.group)
        ids = self.passage(piece.text, length)
        return ids, [0.0, *[TEXT_WEIGHTS.get(piece.group, TEXT_WEIGHT)] * (len(ids) - 1)]


class _Packed(NamedTuple):
    """A piece as it stands in a row."""

    ids: list[int]
    weights: list[float]
    group: int


def make(
    encoder: Encoder, config: ModelConfig, recipe: Recipe, step: int, rows: int, length: int, joined: bool = False
) -> Batch:
    """The batch of a step. Conversations longer than a row are left out; positions of prompts are thinned to fit.

    `joined` makes one document of each row, so that the model also sees long chats and positions up to `length`.
    """
    tokens = np.full((rows, length), encoder.special[PAD], np.int32)
    positions = np.zeros((rows, length), np.int32)
    documents = np.zeros((rows, length), np.int32)
    groups = np.zeros((rows, length), np.int32)
    weight_of_next = np.zeros((rows, length), np.float32)
    for row, pieces in enumerate(_pack(encoder, recipe, step, rows, length)):
        start = 0
        for document, (ids, weights, group) in enumerate(pieces, start=1):
            if joined and document > 1:
                ids, weights = ids[1:], weights[1:]
            end = start + len(ids)
            tokens[row, start:end] = ids
            positions[row, start:end] = np.arange(start, end) if joined else np.arange(len(ids))
            documents[row, start:end] = 1 if joined else document
            groups[row, start:end] = group
            weight_of_next[row, start : end - 1] = weights[1:]
            start = end
    return Batch(
        tokens,
        positions,
        documents,
        *_loss_positions(tokens, weight_of_next, recipe, step),
        groups,
        *_restrictions(config, recipe, rows, step),
    )


def _restrictions(config: ModelConfig, recipe: Recipe, rows: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """`slots` and `luck` of a batch."""
    rng = np.random.default_rng((recipe.seed, step, 1))
    layers, experts = len(config.moe_layers), config.num_experts
    fewest = max(config.top_k, round(FEWEST_SLOTS * experts))
    most = max(fewest, round(MOST_SLOTS * experts))
    few = rng.integers(fewest, most + 1, (rows, layers), np.int32)
    restricted = rng.random((rows, 1)) < recipe.expert_dropout
    slots = np.where(restricted, few, np.int32(experts))
    return slots, rng.gumbel(size=(rows, layers, experts)).astype(np.float32)


def _pack(encoder: Encoder, recipe: Recipe, step: int, rows: int, length: int) -> list[list[_Packed]]:
    """Pieces for every row, first fit, until several in a row found no room; running text fills what is left."""
    packed: list[list[_Packed]] = [[] for _ in range(rows)]
    room = [length] * rows
    misses, number = 0, 0
    stage = mixture.stage_of(step, recipe.steps)
    cut = np.random.default_rng((recipe.seed, step, 2))

    def add(row: int, piece: Piece, ids: list[int], weights: list[float]) -> None:
        packed[row].append(_Packed(ids, weights, GROUPS.index(piece.group)))
        room[row] -= len(ids)

    while misses < 8:
        key = f"{step}/{number}"
        number += 1
        piece = mixture.draw(recipe.seed, key, stage)
        ids, weights = encoder.piece(piece, f"{recipe.seed}/{key}", int(cut.integers(length // 3, length + 1)))
        row = next((row for row in range(rows) if room[row] >= len(ids)), None)
        if row is None:
            misses += 1
        else:
            add(row, piece, ids, weights)
    for row in range(rows):
        if room[row] >= _SHORTEST_TEXT:
            key = f"{step}/{row}"
            piece = mixture.filler(recipe.seed, key, stage)
            add(row, piece, *encoder.piece(piece, key, room[row]))
    return packed


def _loss_positions(
    tokens: Int[np.ndarray, "B T"], weight_of_next: Float[np.ndarray, "B T"], recipe: Recipe, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All answer and text positions and as many random prompt positions as there is room for, padded with weight 0."""
    count, flat = recipe.loss_positions, weight_of_next.reshape(-1)
    rng = np.random.default_rng((recipe.seed, step))
    answers = np.flatnonzero(flat > PROMPT_WEIGHT)
    prompts = np.flatnonzero((flat > 0) & (flat <= PROMPT_WEIGHT))
    chosen = np.concatenate([rng.permutation(answers), rng.permutation(prompts)])[:count].astype(np.int32)
    padding = np.zeros(count - len(chosen), np.int32)
    loss_at = np.concatenate([chosen, padding])
    weights = np.concatenate([flat[chosen], padding.astype(np.float32)])
    return loss_at, np.roll(tokens.reshape(-1), -1)[loss_at], weights
