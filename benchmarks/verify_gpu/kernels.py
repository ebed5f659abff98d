"""The backends of attention and of the MoE op against their references, and against the bytes that they must read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emoe_jax.attention import KVView, LayerKV, attend
from emoe_jax.config import ModelConfig
from emoe_jax.experts.weights import ExpertWeights
from emoe_jax.moe import moe_ffn
from emoe_jax.planning.rates import seconds
from emoe_jax.scheduling.pages import PAGE_SIZE

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
"""Of the largest error, as a share of the largest number of the reference."""


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Rows that attend to pages: `groups` of `rows` rows each, at the end of contexts of about `context` tokens."""

    groups: int
    rows: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    shared: int | None = None
    """Latent attention: the first so many numbers of a key are its value."""

    @property
    def name(self) -> str:
        rule = "" if self.window is None else f", window {self.window}"
        rule += "" if self.shared is None else ", latent"
        return f"attention {self.groups} x {self.rows} rows, {self.context} tokens, {self.heads} heads{rule}"


@dataclasses.dataclass(frozen=True)
class ExpertCase:
    """`rows` rows that each go to `top_k` of `experts` experts, all resident in shuffled slots."""

    rows: int
    experts: int
    top_k: int
    hidden: int
    expert_hidden: int

    @property
    def name(self) -> str:
        return f"experts {self.rows} rows, {self.top_k} of {self.experts}, {self.hidden} x {self.expert_hidden}"


ATTENTION = (
    AttentionCase(1, 1, 32768, 32, 8, 128),
    AttentionCase(8, 1, 4096, 32, 8, 128),
    AttentionCase(64, 1, 1024, 32, 4, 128),
    AttentionCase(16, 32, 4096, 32, 8, 128),
    AttentionCase(8, 1, 4096, 64, 8, 64, window=128),
    AttentionCase(8, 1, 4096, 16, 1, 576, shared=512),
    AttentionCase(8, 1, 4096, 128, 1, 576, shared=512),
    AttentionCase(4, 32, 4096, 16, 1, 576, shared=512),
)
EXPERTS = (
    *(ExpertCase(rows, 8, 2, 4096, 14336) for rows in (1, 8, 64, 512)),
    *(ExpertCase(rows, 32, 4, 2880, 2880) for rows in (1, 64, 512)),
    *(ExpertCase(rows, 128, 8, 2048, 768) for rows in (1, 64, 512)),
)
DRY_ATTENTION = (
    AttentionCase(2, 1, 70, 4, 2, 16),
    AttentionCase(2, 8, 40, 4, 2, 16, window=20),
    AttentionCase(2, 1, 40, 4, 1, 24, shared=16),
)
DRY_EXPERTS = (ExpertCase(5, 4, 2, 32, 48),)


def check_attention(
    case: AttentionCase, backend: str, dtype: str, bandwidth: float, repetitions: int
) -> dict[str, Any]:
    """One backend against `reference`: error, time and floor."""
    rng = np.random.default_rng(0)
    pages_each = -(-case.context // PAGE_SIZE)
    contexts = np.maximum(case.rows, case.context - rng.integers(0, PAGE_SIZE, case.groups))
    tables = 1 + rng.permutation(case.groups * pages_each).reshape(case.groups, pages_each)
    view = KVView.of(
        jnp.asarray(contexts - case.rows, jnp.int32),
        jnp.full(case.groups, case.rows, jnp.int32),
        jnp.asarray(tables, jnp.int32),
        case.rows,
    )
    keys = jax.random.split(jax.random.key(0), 3)
    blank = LayerKV.zeros(1 + case.groups * pages_each, case.kv_heads, case.head_dim, dtype, case.shared)
    leaves, tree = jax.tree.flatten(blank)
    numbers = [jax.random.normal(key, x.shape, dtype) for key, x in zip(keys[:2], leaves, strict=False)]
    cache = jax.tree.unflatten(tree, numbers)
    q = jax.random.normal(keys[2], (case.groups, case.rows, case.heads, case.head_dim), dtype)
    run = jax.jit(
        partial(attend, window=case.window, scale=case.head_dim**-0.5), static_argnames=("backend", "platform")
    )
    with jax.default_matmul_precision("highest"):
        wanted = run(
            q.astype(jnp.float32), jax.tree.map(lambda x: x.astype(jnp.float32), cache), view, backend="reference"
        )
        got = run(q, cache, view, backend=backend)
        taken = seconds(lambda: run(q, cache, view, backend=backend), repetitions)
    seen = contexts if case.window is None else np.minimum(contexts, case.window + case.rows - 1)
    moved = len(leaves) * int(seen.sum()) * case.kv_heads * case.head_dim * cache.k.dtype.itemsize
    return _result(case.name, backend, dtype, got, wanted, taken, moved, bandwidth)


def check_experts(case: ExpertCase, backend: str, dtype: str, bandwidth: float, repetitions: int) -> dict[str, Any]:
    """One backend against `reference`, or against `gather` where that is too large: error, time and floor."""
    config = ModelConfig(
        family="verify_gpu",
        vocab_size=8,
        hidden_size=case.hidden,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        max_position=8,
        num_experts=case.experts,
        top_k=case.top_k,
        expert_hidden=case.expert_hidden,
        moe_layers=(0,),
    )
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(case.experts, case.top_k, replace=False) for _ in range(case.rows)]).astype(np.int32)
    slots = rng.permutation(case.experts).astype(np.int32)
    keys = jax.random.split(jax.random.key(1), 4)
    w_in, w_out = (
        jax.random.normal(key, (case.experts, *shape), dtype) * shape[1] ** -0.5
        for key, shape in zip(keys, (config.expert_in_shape, config.expert_out_shape), strict=False)
    )
    rows = jax.random.normal(keys[2], (case.rows, case.hidden), dtype)
    weights = jax.nn.softmax(jax.random.normal(keys[3], ids.shape))
    run = jax.jit(partial(moe_ffn, config=config), static_argnames=("backend",))
    operands = (rows, jnp.asarray(ids), weights, jnp.asarray(slots), ExpertWeights(w_in, w_out))
    with jax.default_matmul_precision("highest"):
        wanted = _expected(case, operands, config)
        got = run(*operands, backend=backend)
        taken = seconds(lambda: run(*operands, backend=backend), repetitions)
    moved = len(np.unique(ids)) * config.expert_params * rows.dtype.itemsize
    return _result(case.name, backend, dtype, got, wanted, taken, moved, bandwidth)


def _expected(case: ExpertCase, operands: tuple[Any, ...], config: ModelConfig) -> np.ndarray:
    """Expert by expert in float32, so that the card need not hold a copy of the weights."""
    rows, ids, weights, slots, experts = operands
    total = np.zeros((case.rows, case.hidden), np.float32)
    alone = jax.jit(partial(moe_ffn, config=config.replace(num_experts=1, top_k=1), backend="reference"))
    for expert in range(case.experts):
        at, choice = np.nonzero(np.asarray(ids) == expert)
        if len(at) == 0:
            continue
        slot = int(slots[expert])
        one = jax.tree.map(lambda x, slot=slot: x[slot : slot + 1].astype(jnp.float32), experts)
        share = jnp.zeros((case.rows, 1), jnp.float32).at[at, 0].set(weights[at, choice])
        none_or_zero = jnp.where(share > 0, 0, 1).astype(jnp.int32)
        total += np.asarray(alone(rows.astype(jnp.float32), none_or_zero, share, jnp.zeros(1, jnp.int32), one))
    return total


def _result(
    name: str, backend: str, dtype: str, got: Any, wanted: Any, taken: float, moved: int, bandwidth: float
) -> dict[str, Any]:
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    error = float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))
    return {
        "case": name,
        "backend": backend,
        "dtype": dtype,
        "error": error,
        "passes": bool(error <= TOLERANCE[dtype]),
        "seconds": taken,
        "floor_seconds": moved / bandwidth,
        "of_floor": moved / bandwidth / taken,
    }


def backends(dry: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of attention and of the MoE op: those that a GPU runs, and their interpreted twins without one."""
    if dry:
        return ("triton-interpreted",), ("triton-interpreted", "gather")
    return ("triton", "blocks"), ("triton", "ragged", "gather")


def check_all(dry: bool, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Every backend on every case in both dtypes. A backend that raises is a result with its error."""
    attention, experts = (DRY_ATTENTION, DRY_EXPERTS) if dry else (ATTENTION, EXPERTS)
    of_attention, of_experts = backends(dry)
    repetitions = 1 if dry else 10
    for dtype in TOLERANCE:
        for case in attention:
            for backend in of_attention:
                yield _tried(check_attention, case, backend, dtype, bandwidth, repetitions)
        for case in experts:
            for backend in of_experts:
                if backend == "gather" and case.rows * case.top_k > 64:
                    continue  # it copies an expert per assignment
                yield _tried(check_experts, case, backend, dtype, bandwidth, repetitions)


def _tried(check: Any, case: Any, backend: str, dtype: str, bandwidth: float, repetitions: int) -> dict[str, Any]:
    try:
        return check(case, backend, dtype, bandwidth, repetitions)
    except Exception as error:  # on a card that nobody has run this on, one failure must not hide the others
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"case": case.name, "backend": backend, "dtype": dtype, "passes": False, "problem": text}
