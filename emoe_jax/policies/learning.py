"""What policies learn from the prompts of a trace, in closed form; offline work of seconds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from emoe_jax.policies.dynamics import HALF_LIVES, LATENT_HALF_LIVES, Dynamics
from emoe_jax.policies.refresh import Refresh, RefreshState
from emoe_jax.policies.registry import PolicyWeights
from emoe_jax.policies.rivals import activation_matrices
from emoe_jax.policies.rule import ExpectedWishes
from emoe_jax.traces import RoutingTrace

# Chosen on the third quarter of the gpt-oss-20b trace, trained on its first half.
HORIZON = 6.0
"""Steps, on average, that a forecast looks ahead."""
NUM_DIRECTIONS = 128
_RIDGE_TOKENS = (300.0, 3_000.0, 10_000.0, 30_000.0, 100_000.0)  # what predicts tokens of other prompts best is taken
_PLANNED_ALIKE = 0.25
_MAX_TOKENS = 1 << 17
_MAX_NUMBERS = 10**8  # of targets that are held at once
_WEIGHT_TOKENS = 1 << 14
_CHUNK = 4096
_DIRECTION_TOKENS = 1 << 13


class _Prompts(NamedTuple):
    """Tokens of a trace in order, with each prompt's planned rates."""

    experts: Int[np.ndarray, "tokens M k"]
    rank: Int[np.ndarray, " tokens"]
    prompt: Int[np.ndarray, " tokens"]
    rates: Float[np.ndarray, "P M E"]


class _Step(NamedTuple):
    """One token."""

    experts: Int[Array, "M k"]
    rank: Int[Array, ""]
    prompt: Int[Array, ""]


class Seen(NamedTuple):
    """What a forecast goes by before each of some tokens, and what it should say: wishes in the next steps."""

    own: Float[np.ndarray, "tokens ME"]  # see `Refresh.own`
    latent: Float[np.ndarray, "tokens latent"]
    planned: Float[np.ndarray, "tokens ME"]
    target: Float[np.ndarray, "tokens ME"]
    prompt: Int[np.ndarray, " tokens"]
    chosen: Int[np.ndarray, "tokens M k"]


def learn(trace: RoutingTrace, start: Float[np.ndarray, "P M E"], seed: int = 0) -> PolicyWeights:
    """Everything there is to know, but for the network. `start` is what a predictor that has not seen the prompt says
    of it (`KernelPrior.left_out`): one that has seen it would be trusted too much.
    """
    return PolicyWeights(
        learn_dynamics(trace, start, seed), learn_transitions(trace), activation_matrices(trace.counts())
    )


def learn_transitions(trace: RoutingTrace) -> Float[np.ndarray, "M1 E E"]:
    """See `NextLayerRouter`; an expert never chosen is followed by what its layer's mean is."""
    M, E = trace.num_layers, trace.num_experts
    counts = np.zeros((M - 1, E, E))
    for layer in range(M - 1):
        counts[layer] = co_occurrences(trace.experts[:, layer], trace.experts[:, layer + 1], E)
    counts += 1e-3 * counts.mean(1, keepdims=True) + 1e-9
    return (trace.top_k * counts / counts.sum(-1, keepdims=True)).astype(np.float32)


def co_occurrences(
    first: Integer[np.ndarray, "tokens k"], second: Integer[np.ndarray, "tokens k"], num_experts: int
) -> Int[np.ndarray, "E E"]:
    """How many tokens chose each expert of one layer and each of another."""
    pairs = first[:, :, None].astype(np.int64) * num_experts + second[:, None, :]
    return np.bincount(pairs.ravel(), minlength=num_experts**2).reshape(num_experts, num_experts)


def learn_dynamics(trace: RoutingTrace, start: Float[np.ndarray, "P M E"], seed: int = 0) -> Dynamics:
    """Least squares of the wishes in the steps that follow (a mean with weights falling by 1 - 1 / `HORIZON`).

    First the weights of planned rates and decayed means, the same for all experts, none of them negative; then, for
    what those leave over, ridge regression on the latent means. The penalty is the one by which each half of the tokens
    tells most of the other half. A share of the prompts (`_PLANNED_ALIKE`) has the mean routing of all as its plan:
    requests that the predictor does not know are planned so, and what is learned must hold for them too.
    """
    tokens = _tokens(trace, start, seed)
    M, E = trace.num_layers, trace.num_experts
    untrained = Dynamics.untrained(M, E)
    directions = _directions(tokens, E, seed)
    draft = untrained._replace(
        top_k=trace.top_k,
        directions=directions,
        readout=np.zeros((len(LATENT_HALF_LIVES) * directions.shape[1], M * E), np.float32),
    )
    targets = _targets(tokens, E)
    part, features = targets[:_WEIGHT_TOKENS], 1 + len(HALF_LIVES)
    products = np.sum([*_run(draft, tokens, part, _own_products)], axis=0)
    own, own_target = products[:, :features], products[:, features]
    weights = non_negative(own + 1e-6 * np.trace(own) * np.eye(features), own_target).astype(np.float32)
    draft = draft._replace(weights=weights)
    halves = [np.zeros(()), np.zeros(())]
    for number, products in enumerate(_run(draft, tokens, targets, _latent_products)):
        halves[number % 2] = halves[number % 2] + products
    return draft._replace(readout=_readout(halves, len(draft.readout), len(targets)))


def non_negative(
    squares: Float[np.ndarray, "features features"], cross: Float[np.ndarray, " features"]
) -> Float[np.ndarray, " features"]:
    """The `w >= 0` of least `w @ squares @ w - 2 w @ cross`, for few features: every set of them is tried.

    The planned rate and the slowest mean are nearly alike within a short prompt. Without a bound least squares takes a
    multiple of their difference, which is wrong wherever they differ for another reason.
    """
    best, least = np.zeros(len(cross)), 0.0
    for kept in itertools.product((False, True), repeat=len(cross)):
        features = np.flatnonzero(kept)
        if not len(features):
            continue
        weights = np.zeros(len(cross))
        weights[features] = np.linalg.solve(squares[np.ix_(features, features)], cross[features])
        loss = float(weights @ squares @ weights - 2 * weights @ cross)
        if weights.min() >= 0 and loss < least:
            best, least = weights, loss
    return best


def _readout(halves: list[np.ndarray], features: int, num_tokens: int) -> Float[np.ndarray, "latent ME"]:
    """Ridge regression from the products of both halves of the tokens."""

    def solve(products: np.ndarray, tokens: float) -> np.ndarray:
        squares, cross = products[:, :features], products[:, features:]
        ridge = tokens * squares.diagonal().mean() / num_tokens
        return np.linalg.solve(squares + (ridge + 1e-9) * np.eye(features, dtype=squares.dtype), cross)

    def gain(tokens: float) -> float:
        total = 0.0
        for one, other in (halves, halves[::-1]):
            if not np.ndim(other):
                return tokens  # a single chunk: nothing to judge by, so the strongest penalty
            readout = solve(one, tokens)
            squares, cross = other[:, :features], other[:, features:]
            total += float(2 * (readout * cross).sum() - (readout * (squares @ readout)).sum())
        return total

    return solve(halves[0] + halves[1], max(_RIDGE_TOKENS, key=gain)).astype(np.float32)


def seen(trace: RoutingTrace, start: Float[np.ndarray, "P M E"], dynamics: Dynamics, seed: int = 0) -> Seen:
    """Tokens of a trace as its `dynamics` see them, in half precision, at most so many that they fit into memory."""
    tokens = _tokens(trace, start, seed)
    targets = _targets(tokens, trace.num_experts)
    rule = Refresh(dynamics)

    def parts(state: RefreshState, targets: Array, dynamics: Dynamics) -> Array:
        flat = (len(targets), -1)
        return jnp.concatenate([rule.own(state).reshape(flat), state.latent.reshape(flat)], 1).astype(jnp.float16)

    both = np.concatenate([*_run(dynamics, tokens, targets, parts)])
    size = targets.shape[1]
    planned = tokens.rates.reshape(-1, size)[tokens.prompt].astype(np.float16)
    return Seen(both[:, :size], both[:, size:], planned, targets, tokens.prompt, tokens.experts)


def _tokens(trace: RoutingTrace, start: Float[np.ndarray, "P M E"], seed: int) -> _Prompts:
    """As many as fit, of prompts drawn at random."""
    most = min(_MAX_TOKENS, _MAX_NUMBERS // (trace.num_layers * trace.num_experts))
    lengths = np.bincount(trace.sample, minlength=trace.num_prompts)
    drawn = np.random.default_rng(seed).permutation(trace.num_prompts)
    drawn = drawn[np.cumsum(lengths[drawn]) <= max(most, lengths[drawn[0]])]
    order = np.lexsort((trace.token_pos, trace.sample))
    order = order[np.isin(trace.sample[order], drawn)]
    rates = (trace.top_k * start).astype(np.float32)
    rates[drawn[:: round(1 / _PLANNED_ALIKE)]] = rates.mean(0)
    return _Prompts(
        trace.experts[order].astype(np.int16),
        trace.rank()[order].astype(np.int32),
        trace.sample[order].astype(np.int32),
        rates,
    )


def _directions(tokens: _Prompts, num_experts: int, seed: int) -> Float[np.ndarray, "ME r"]:
    """The leading principal directions of how tokens deviate from their plan, by subspace iteration."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(tokens.prompt))[:_DIRECTION_TOKENS])
    chosen = (tokens.experts[rows][..., None] == np.arange(num_experts)).any(2)
    deviation = chosen - tokens.rates[tokens.prompt[rows]]
    deviation = deviation.reshape(len(rows), -1).astype(np.float32)
    r = min(NUM_DIRECTIONS, *deviation.shape)
    basis = rng.standard_normal((deviation.shape[1], r)).astype(np.float32)
    for _ in range(6):
        basis, _ = np.linalg.qr(deviation.T @ (deviation @ basis))
    return basis


def _targets(tokens: _Prompts, num_experts: int) -> Float[np.ndarray, "tokens ME"]:
    """Of every token, the weighted mean of wishes from it on to the end of its prompt."""
    keep = np.float32(1 - 1 / HORIZON)
    ends = np.append(tokens.prompt[1:] != tokens.prompt[:-1], True)

    def step(carry: tuple[Array, Array], token: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (total, weight), (experts, is_last) = carry, token
        goes_on = jnp.where(is_last, 0, keep)
        total = goes_on * total + _chosen(experts, num_experts).any(1).astype(jnp.float32)
        weight = goes_on * weight + 1
        return (total, weight), (total / weight).astype(jnp.float16).ravel()

    start = (jnp.zeros((tokens.experts.shape[1], num_experts)), jnp.zeros(()))
    return np.asarray(jax.lax.scan(step, start, (jnp.asarray(tokens.experts), jnp.asarray(ends)), reverse=True)[1])


def _chosen(experts: Int[Array, "M k"], num_experts: int) -> Bool[Array, "M k E"]:
    """Which expert each choice of a token is."""
    return experts.astype(jnp.int32)[..., None] == jnp.arange(num_experts)[None, None]


def _run(
    dynamics: Dynamics,
    tokens: _Prompts,
    targets: Float[np.ndarray, "tokens ME"],
    made_of: Callable[[RefreshState, Float[Array, "tokens ME"], Dynamics], Array],
) -> Iterator[np.ndarray]:
    """`made_of` the states before each of the tokens that have `targets`, by chunks, each prompt followed alone."""
    rule, planned = Refresh(dynamics), jnp.asarray(tokens.rates)

    def follow(state: RefreshState, step: _Step) -> tuple[RefreshState, RefreshState]:
        rates, is_first = planned[step.prompt], step.rank == 0
        state = rule.plan(state, ExpectedWishes(rates, jnp.where(is_first, rates, 0), jnp.where(is_first, 0.0, 1.0)))
        return rule.observe(state, _chosen(step.experts, rates.shape[-1]).sum(1)), state

    @jax.jit
    def part(state: RefreshState, steps: _Step, targets: Float[Array, "tokens ME"]) -> tuple[RefreshState, Array]:
        state, states = jax.lax.scan(follow, state, steps)
        return state, made_of(states, targets.astype(jnp.float32), dynamics)

    state = rule.start(jnp.zeros(planned.shape[1:], jnp.float32))
    chunk = min(_CHUNK, max(1, -(-len(targets) // 4)))
    for begin in range(0, len(targets), chunk):
        rows = slice(begin, min(begin + chunk, len(targets)))
        steps = _Step(*(jnp.asarray(array[rows]) for array in tokens[:3]))
        state, made = part(state, steps, jnp.asarray(targets[rows]))
        yield np.asarray(made)


def _own(seen: RefreshState) -> Float[Array, "tokens features ME"]:
    """What weights are learned for: the planned rate and the decayed means of every expert."""
    return jnp.concatenate([seen.rates[:, None], seen.recent], 1).reshape(len(seen.rates), seen.recent.shape[1] + 1, -1)


def _own_products(
    seen: RefreshState, targets: Float[Array, "tokens ME"], dynamics: Dynamics
) -> Float[Array, "features features_and_target"]:
    own = _own(seen)
    squares, cross = jnp.einsum("nfx,ngx->fg", own, own), jnp.einsum("nfx,nx->f", own, targets)
    return jnp.concatenate([squares, cross[:, None]], 1)


def _latent_products(
    seen: RefreshState, targets: Float[Array, "tokens ME"], dynamics: Dynamics
) -> Float[Array, "latent latent_and_ME"]:
    latent = seen.latent.reshape(len(targets), -1)
    rest = targets - jnp.einsum("f,nfx->nx", dynamics.weights, _own(seen))
    return latent.T @ jnp.concatenate([latent, rest], 1)
