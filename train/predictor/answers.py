"""The network of the within-answer forecast: trained on single tokens, kept where it helps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from emoe_jax.policies.answer import AnswerNetwork, log_own
from emoe_jax.policies.dynamics import Dynamics
from emoe_jax.policies.learning import Seen, learn_dynamics, seen
from emoe_jax.traces import RoutingTrace
from train.predictor.objective import BUDGETS, slots

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class AnswerHyperparameters:
    """Chosen on the first and on the third quarter of the gpt-oss-20b trace, trained on the rest of its first three."""

    steps: int = 400
    rows: int = 768  # tokens of a step
    hidden: int = 256
    peak_rate: float = 1e-3
    weight_decay: float = 0.3
    input_dropout: float = 0.2
    hidden_dropout: float = 0.3
    average: float = 0.98
    held_out: float = 0.1
    evaluate_every: int = 50


def learn_answers(
    trace: RoutingTrace,
    start: Float[np.ndarray, "P M E"],
    plan: AnswerHyperparameters | None = None,
    seed: int = 0,
    report: Report = lambda line: None,
) -> Dynamics:
    """Dynamics with their network, or without one where it does not help on prompts that it was not trained on."""
    dynamics = learn_dynamics(trace, start, seed)
    return with_network(
        dynamics, seen(trace, start, dynamics, seed), trace, plan or AnswerHyperparameters(), seed, report
    )


def with_network(
    dynamics: Dynamics, tokens: Seen, trace: RoutingTrace, plan: AnswerHyperparameters, seed: int, report: Report
) -> Dynamics:
    """The step of least cross entropy on held-out prompts is taken; no network where none beats the linear forecast."""
    rng = np.random.default_rng(seed)
    prompts = rng.permutation(np.unique(tokens.prompt))
    is_held = np.isin(tokens.prompt, prompts[: round(plan.held_out * len(prompts))])
    train, held = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    held = held[:: max(1, len(held) // 4096)]
    if len(prompts) < 2 or not len(held) or not tokens.latent.shape[1]:
        return dynamics
    shape = (trace.num_layers, trace.num_experts)
    scale = 1 / np.maximum(np.asarray(tokens.latent[train[: 1 << 14]], np.float32).std(), 1e-6)
    network, optimizer = _start(dynamics, tokens, plan, seed), _optimizer(plan)
    state: Any = (network, jax.tree.map(jnp.copy, network), optimizer.init(network))
    best, network_of_best = _entropy(dynamics, None, tokens, held, shape, scale), None
    report(f"linear forecast: cross entropy {best:.4f} of held-out prompts' next steps")
    for step in range(plan.steps):
        rows = rng.choice(train, plan.rows)
        batch = [array[rows].astype(np.float32) for array in (tokens.own, tokens.latent, tokens.target)]
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), step)
        state = _step(state, *batch, scale, key, step, plan, shape, trace.top_k)
        if (step + 1) % plan.evaluate_every == 0 or step + 1 == plan.steps:
            now = _entropy(dynamics, state[1], tokens, held, shape, scale)
            report(f"answer network, step {step + 1}: cross entropy {now:.4f}")
            if now < best:
                best, network_of_best = now, jax.tree.map(np.array, state[1])
    if network_of_best is None:
        return dynamics
    return dynamics._replace(network=_unscaled(network_of_best, scale))


def _unscaled(network: AnswerNetwork, scale: float) -> AnswerNetwork:
    """The same for latent means as they are."""
    return network._replace(linear=network.linear * np.float32(scale), up=network.up * np.float32(scale))


def _start(dynamics: Dynamics, tokens: Seen, plan: AnswerHyperparameters, seed: int) -> AnswerNetwork:
    latent, size = tokens.latent.shape[1], tokens.own.shape[1]
    up = np.random.default_rng(seed).normal(0, latent**-0.5, (latent, plan.hidden))
    arrays = (np.ones(size), np.zeros(size), np.zeros((latent, size)), up, np.zeros(plan.hidden))
    return AnswerNetwork(*(jnp.asarray(array, jnp.float32) for array in (*arrays, np.zeros((plan.hidden, size)))))


@functools.cache
def _optimizer(plan: AnswerHyperparameters) -> optax.GradientTransformation:
    warmup = max(1, plan.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, plan.peak_rate, warmup, max(plan.steps, warmup + 1), 1e-5)
    return optax.adamw(rate, b2=0.99, weight_decay=plan.weight_decay, mask=lambda net: jax.tree.map(_is_matrix, net))


def _is_matrix(leaf: Array) -> bool:
    return leaf.ndim > 1


@functools.partial(jax.jit, static_argnames=("plan", "shape", "top_k"), donate_argnames="state")
def _step(
    state: Any,
    own: Float[Array, "B ME"],
    latent: Float[Array, "B latent"],
    target: Float[Array, "B ME"],
    scale: float,
    key: PRNGKeyArray,
    step: int,
    plan: AnswerHyperparameters,
    shape: tuple[int, int],
    top_k: int,
) -> Any:
    network, averaged, moments = state
    input_key, hidden_key = jax.random.split(key)
    seen_latent = _dropped(latent * scale, plan.input_dropout, input_key)
    logs = log_own(own.reshape(-1, *shape), jnp.ones(len(own)), top_k)

    def loss(network: AnswerNetwork) -> Array:
        hidden = jax.nn.relu(seen_latent @ network.up + network.up_bias[None])
        hidden = _dropped(hidden, plan.hidden_dropout, hidden_key)
        logits = network.scale[None] * logs + network.bias[None] + seen_latent @ network.linear + hidden @ network.down
        return _cross_entropy(jax.nn.log_softmax(logits.reshape(-1, *shape)), target, top_k)

    updates, moments = _optimizer(plan).update(jax.grad(loss)(network), moments, network)
    network: Any = optax.apply_updates(network, updates)
    decay = jnp.minimum(plan.average, (1 + step) / (10 + step))
    averaged = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, averaged, network)
    return network, averaged, moments


def _dropped(x: Array, rate: float, key: PRNGKeyArray) -> Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _cross_entropy(log_shares: Float[Array, "B M E"], target: Float[Array, "B ME"], top_k: int) -> Array:
    return -(target.reshape(log_shares.shape) / top_k * log_shares).sum(-1).mean()


def forecast(
    dynamics: Dynamics, tokens: Seen, rows: np.ndarray, shape: tuple[int, int], linear_only: bool = False
) -> Float[np.ndarray, "tokens M E"]:
    """What `Refresh.scores` says at these tokens."""
    network = None if linear_only else dynamics.network
    return _scores(dynamics, network, tokens, rows, shape, 1.0)


def _scores(
    dynamics: Dynamics,
    network: AnswerNetwork | None,
    tokens: Seen,
    rows: np.ndarray,
    shape: tuple[int, int],
    scale: Any,
) -> Float[np.ndarray, "tokens M E"]:
    own, latent = tokens.own[rows].astype(np.float32), tokens.latent[rows].astype(np.float32)
    linear = (own + latent @ dynamics.readout).reshape(-1, *shape)
    if network is None:
        return linear
    logs = log_own(own.reshape(-1, *shape), np.ones(len(own), np.float32), dynamics.top_k)
    scaled = latent * np.float32(scale)
    logits = np.asarray(network.logits(logs, scaled @ np.asarray(network.linear), scaled @ np.asarray(network.up)))
    powers = np.exp(logits.reshape(linear.shape) - logits.reshape(linear.shape).max(-1, keepdims=True))
    return (linear + dynamics.top_k * powers / powers.sum(-1, keepdims=True)) / 2


def _entropy(
    dynamics: Dynamics, network: Any, tokens: Seen, rows: np.ndarray, shape: tuple[int, int], scale: Any
) -> float:
    """Cross entropy of the forecast that counts: the mean of the linear one and the network's."""
    network = None if network is None else jax.tree.map(np.asarray, network)
    shares = np.maximum(_scores(dynamics, network, tokens, rows, shape, scale), 1e-3)
    log_shares = np.log(shares / shares.sum(-1, keepdims=True))
    target = tokens.target[rows].astype(np.float32)
    return float(_cross_entropy(jnp.asarray(log_shares), jnp.asarray(target), dynamics.top_k))


def judge(trace: RoutingTrace, start: Float[np.ndarray, "P M E"], dynamics: Dynamics, seed: int = 0) -> dict[str, Any]:
    """Coverage of the wishes in the next steps, and the share of the next token's choices among the `top_k` foremost,
    with the best experts chosen anew at each token. `start` is what was predicted of each prompt.
    """
    tokens = seen(trace, start, dynamics, seed)
    shape = (trace.num_layers, trace.num_experts)
    rows = np.arange(len(tokens.prompt))[:: max(1, len(tokens.prompt) // (1 << 14))]
    kinds = {
        "predictor": forecast(dynamics, tokens, rows, shape),
        "linear": forecast(dynamics, tokens, rows, shape, linear_only=True),
        "prior": tokens.planned[rows].astype(np.float32).reshape(-1, *shape),
    }
    numbers = {name: _judged(scores, tokens, rows, trace.top_k) for name, scores in kinds.items()}
    result = numbers.pop("predictor")
    return {**result, "tokens": len(rows), "network": dynamics.network is not None, "baselines": numbers}


def _judged(scores: Float[np.ndarray, "tokens M E"], tokens: Seen, rows: np.ndarray, top_k: int) -> dict[str, Any]:
    target, order = tokens.target[rows].astype(np.float32).reshape(scores.shape), np.argsort(-scores, axis=-1)
    ranked = np.take_along_axis(target, order, -1).cumsum(-1)
    E = scores.shape[-1]
    covered = {str(share): float(ranked[..., slots(share, E) - 1].sum() / target.sum()) for share in BUDGETS}
    place = np.argsort(order, axis=-1)
    found = np.take_along_axis(place, tokens.chosen[rows].astype(np.int64), -1)
    nearest = {str(share): float((found < slots(share, E)).mean()) for share in BUDGETS}
    return {"coverage": covered, "coverage_of_next_token": nearest, "top_k": float((found < top_k).mean())}
