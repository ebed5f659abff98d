"""What the trained model knows, on the test splits, with every expert resident, through the op that serves it.

Exact match needs no generation: greedy decoding yields the reference answer if and only if every token of it, the end
included, is the most probable one after those before it, which one forward over prompt and answer shows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.models.decoder import Decoder
from emoe_jax.models.routing import Routing
from emoe_jax.moe import moe_ffn
from train.demo import objective
from train.demo.batches import Encoder
from train.demo.mixture import answered
from train.demo.objective import Parameters
from train.demo.tokenizer import ASSISTANT, EOS, PAD
from train.similarity import rouge_l
from train.tasks import TASKS, examples, facts, qa, texts
from train.tasks.example import Example

EXACT_TASKS = ("clsfy", "comp", "qa")
_ROWS = 32  # sequences per forward
_LENGTH = 192  # tokens; longer examples are cut off and count as wrong
_NEW_TOKENS = 64
TEXT_LENGTH = 128  # tokens of a stretch of real text: as long as a row of training

T = TypeVar("T")


class Scored(NamedTuple):
    """Token ids, and how many of them are given before the first that is scored."""

    ids: list[int]
    given: int


class Scores(NamedTuple):
    """Of some examples of one task: whether greedy decoding gives all scored tokens, their nats, their number, and how
    often each expert was chosen (`usage`, all tokens)."""

    exact: Bool[np.ndarray, " examples"]
    nats: Float[np.ndarray, " examples"]
    tokens: Int[np.ndarray, " examples"]
    usage: Float[np.ndarray, "M E"]

    @property
    def shares(self) -> Float[np.ndarray, "M E"]:
        return self.usage / self.usage.sum(axis=1, keepdims=True)

    @property
    def perplexity(self) -> float:
        """Per scored token."""
        return float(np.exp(self.nats.sum() / self.tokens.sum()))


def _hidden(
    parameters: Parameters, tokens: Int[Array, "B T"], used: Bool[Array, "B T"], config: ModelConfig
) -> tuple[Decoder, Float[Array, "B T D"], list[Routing]]:
    model = objective.decoder(config, parameters.dense)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    slots = jnp.arange(config.num_experts)

    def moe(rows: Array, ids: Array, weights: Array, experts: ExpertWeights) -> Array:
        return moe_ffn(rows, ids, weights, slots, experts, config)

    x, routings = objective.packed_forward(model, parameters.experts, tokens, positions, used.astype(int), moe)
    return model, x, routings


@functools.partial(jax.jit, static_argnames="config")
def _forward(
    parameters: Parameters, tokens: Int[Array, "B T"], used: Bool[Array, "B T"], config: ModelConfig
) -> tuple[Int[Array, "B T"], Float[Array, "B T"], Float[Array, "M E"]]:
    """The most probable next token everywhere, the nats of the actual next token, and the experts' use."""
    model, x, routings = _hidden(parameters, tokens, used, config)
    logits = model.logits(x)
    following = jnp.roll(tokens, -1, axis=1)
    nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    usage = jnp.stack([jnp.bincount(routing.ids.reshape(-1), length=config.num_experts) for routing in routings])
    return jnp.argmax(logits, axis=-1), nats, usage.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def _next(
    parameters: Parameters, tokens: Int[Array, "B T"], ends: Int[Array, " B"], config: ModelConfig
) -> Int[Array, " B"]:
    """The most probable token after the first `ends` ones of each sequence."""
    model, x, _ = _hidden(parameters, tokens, jnp.arange(tokens.shape[1])[None] < ends[:, None], config)
    return jnp.argmax(model.logits(x[jnp.arange(len(ends)), ends - 1]), axis=-1)


def score(parameters: Parameters, config: ModelConfig, encoder: Encoder, chosen: Sequence[Example]) -> Scores:
    """Exact match, nats and routing of examples, with the reference answers given."""
    return score_ids(parameters, config, encoder, [_answered(encoder, example) for example in chosen])


def score_ids(parameters: Parameters, config: ModelConfig, encoder: Encoder, chosen: Sequence[Scored]) -> Scores:
    """The same of token ids."""
    exact, nats, counts = [], [], []
    usage = np.zeros((config.num_layers, config.num_experts))
    for group in _groups(chosen):
        tokens = np.full((_ROWS, _LENGTH), encoder.special[PAD], np.int32)
        scored = np.zeros((_ROWS, _LENGTH), bool)  # positions whose next token is scored
        used = np.zeros((_ROWS, _LENGTH), bool)
        for row, (whole, given) in enumerate(group):
            ids = whole[:_LENGTH]
            tokens[row, : len(ids)] = ids
            used[row, : len(ids)] = True
            scored[row, given - 1 : len(ids) - 1] = True
        best, surprise, use = (np.asarray(part) for part in _forward(parameters, tokens, used, config))
        usage += use
        right = (best == np.roll(tokens, -1, axis=1)) | ~scored
        whole_rows = [len(ids) <= _LENGTH for ids, _ in group]
        exact += list(right.all(axis=1)[: len(group)] & whole_rows)
        nats += list((surprise * scored).sum(axis=1)[: len(group)])
        counts += list(scored.sum(axis=1)[: len(group)])
    return Scores(np.array(exact), np.array(nats), np.array(counts), usage)


def _answered(encoder: Encoder, example: Example) -> Scored:
    prompt = prompt_ids(encoder, example)
    return Scored([*prompt, *encoder.text(example.answer), encoder.special[EOS]], len(prompt))


def held_out_text(encoder: Encoder, kind: str, seed: int, count: int, length: int = TEXT_LENGTH) -> list[list[int]]:
    """Token ids of `count` stretches of test documents of a kind, at most `length` each, the first of them `<s>`."""
    if kind == "dialogue":
        chats = [texts.dialogue("test", f"{seed}/{index}") for index in range(count)]
        return [encoder.conversation(answered(chat), "dialogue")[0][:length] for chat in chats]
    passages = [texts.passage(kind, "test", f"{seed}/{index}", length * 8) for index in range(count)]
    return [encoder.passage(passage, length) for passage in passages]


def prompt_ids(encoder: Encoder, example: Example) -> list[int]:
    """The chat up to where the assistant begins to answer."""
    return [*encoder.conversation(example.messages, example.task)[0], encoder.special[ASSISTANT]]


def generate(parameters: Parameters, config: ModelConfig, encoder: Encoder, chosen: Sequence[Example]) -> list[str]:
    """Greedy answers, of at most 64 tokens. Without a cache: meant for some dozens of examples."""
    answers = []
    for group in _groups(chosen):
        tokens = np.full((_ROWS, _LENGTH), encoder.special[PAD], np.int32)
        ends = np.full(_ROWS, 1)
        for row, example in enumerate(group):
            ids = prompt_ids(encoder, example)[: _LENGTH - _NEW_TOKENS]
            tokens[row, : len(ids)] = ids
            ends[row] = len(ids)
        starts = ends.copy()
        growing = np.arange(_ROWS) < len(group)
        while growing.any():
            chosen_next = np.asarray(_next(parameters, tokens, ends, config))
            growing &= (chosen_next != encoder.special[EOS]) & (ends - starts < _NEW_TOKENS) & (ends < _LENGTH)
            tokens[growing, ends[growing]] = chosen_next[growing]
            ends[growing] += 1
        answers += [
            encoder.tokenizer.decode(tokens[row, starts[row] : ends[row]].tolist()) for row in range(len(group))
        ]
    return answers


def evaluate(
    parameters: Parameters, config: ModelConfig, encoder: Encoder, seed: int, count: int, generated: int
) -> dict[str, Any]:
    """Per task and of facts on `count` test examples, ROUGE-L on `generated` of them, perplexity of `count` stretches
    of each kind of text, and how all of these use the experts."""
    tasks: dict[str, dict[str, Any]] = {}
    usage = {}

    def scored(name: str, chosen: Sequence[Example]) -> Scores:
        scores = score(parameters, config, encoder, chosen)
        usage[name] = scores.shares
        tasks[name] = {"examples": count, "perplexity": scores.perplexity}
        return scores

    for task in TASKS:
        chosen = examples(task, "test", seed, count)
        scores = scored(task, chosen)
        if task in EXACT_TASKS:
            tasks[task]["exact_match"] = float(scores.exact.mean())
        else:
            tasks[task] |= _generated(parameters, config, encoder, chosen[:generated])
    exact = scored("facts", examples("facts", "test", seed, count)).exact
    fields = np.array([facts.field_of(f"{seed}/{index}").name for index in range(count)])
    tasks["facts"]["exact_match"] = float(exact.mean())
    tasks["facts"]["by_field"] = {
        str(name): {"examples": int((fields == name).sum()), "exact_match": float(exact[fields == name].mean())}
        for name in np.unique(fields)
    }
    read = {}
    for kind in texts.KINDS:
        stretches = [Scored(ids, 1) for ids in held_out_text(encoder, kind, seed, count)]
        scores = score_ids(parameters, config, encoder, stretches)
        usage[kind] = scores.shares
        read[kind] = {"stretches": count, "tokens": int(scores.tokens.sum()), "perplexity": scores.perplexity}
    rivals = score(parameters, config, encoder, [qa.rival_example("test", f"{seed}/{index}") for index in range(count)])
    for name, shares in usage.items():
        (tasks.get(name) or read[name])["routing_entropy_bits"] = float(entropy_bits(shares).mean())
    divergence = {
        f"{first}-{second}": divergence_bits(usage[first], usage[second]).tolist()
        for first, second in itertools.combinations(usage, 2)
    }
    return {
        "tasks": tasks,
        "texts": read,
        "qa_rivals_exact_match": float(rivals.exact.mean()),
        "js_divergence_bits_by_layer": divergence,
        "mean_js_divergence_bits": float(np.mean(list(divergence.values()))),
    }


def _generated(
    parameters: Parameters, config: ModelConfig, encoder: Encoder, chosen: Sequence[Example]
) -> dict[str, Any]:
    """ROUGE-L of greedy answers, and the first of them."""
    answers = generate(parameters, config, encoder, chosen)
    pairs = list(zip(chosen, answers, strict=True))
    return {
        "rouge_l": float(np.mean([rouge_l(example.answer, answer) for example, answer in pairs])),
        "generated": len(pairs),
        "samples": [
            {"prompt": example.prompt, "reference": example.answer, "answer": answer} for example, answer in pairs[:5]
        ],
    }


def entropy_bits(shares: Float[np.ndarray, "... E"]) -> Float[np.ndarray, ...]:
    """Shannon entropy over the last axis: 5 bits when 32 experts are used alike."""
    return -np.sum(np.where(shares > 0, shares * np.log2(np.where(shares > 0, shares, 1)), 0), axis=-1)


def divergence_bits(first: Float[np.ndarray, "M E"], second: Float[np.ndarray, "M E"]) -> Float[np.ndarray, " M"]:
    """Jensen-Shannon divergence per layer: 0 for the same use of experts, 1 for disjoint use."""
    return entropy_bits((first + second) / 2) - (entropy_bits(first) + entropy_bits(second)) / 2


def _groups(chosen: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(chosen), _ROWS):
        yield chosen[start : start + _ROWS]
