"""OpenMoE in plain NumPy float64, written from its published description and sharing no code with the library.

Tensors are those of the published layout. One call is one uncached forward of right-padded or equally long sequences,
including the published rule that drops tokens over an expert's capacity.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Result(NamedTuple):
    logits: np.ndarray  # [B, T, V]
    hidden: np.ndarray  # [L, B, T, D], after each layer
    chosen: np.ndarray  # [M, B, T, k], first choice first
    kept: np.ndarray  # [M, B, T, k], false where capacity dropped the choice


def forward(
    raw: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tokens: np.ndarray, capacity_factor: float
) -> Result:
    weights = {name: value.astype(np.float64) for name, value in tensors.items()}
    x = weights["model.embed_tokens.weight"][tokens]
    hidden, chosen, kept = [], [], []
    for layer in range(raw["num_hidden_layers"]):
        own = {k.removeprefix(f"model.layers.{layer}."): v for k, v in weights.items() if f".layers.{layer}." in k}
        x = x + _attention(raw, own, _norm(x, own["input_layernorm.weight"]))
        normed = _norm(x, own["post_attention_layernorm.weight"])
        if (layer + 1) % raw["moe_layer_interval"]:
            x = x + _ffn(normed, *(own[f"mlp.{p}_proj.weight"].T for p in ("gate", "up", "down")))
        else:
            out, layer_chosen, layer_kept = _moe(raw, own, normed, capacity_factor)
            x = x + out
            extra = _norm(x, own["pre_extra_mlp_layernorm.weight"])
            x = x + _ffn(extra, *(own[f"extra_mlp.{p}_proj.weight"].T for p in ("gate", "up", "down")))
            chosen.append(layer_chosen)
            kept.append(layer_kept)
        hidden.append(x)
    logits = _norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    return Result(logits, np.stack(hidden), np.stack(chosen), np.stack(kept))


def capacity(raw: Mapping[str, Any], rows: int, factor: float) -> int:
    """Choices that one expert serves in a call of `rows` tokens."""
    slots = math.floor(raw.get("router_topk", 2) * factor * rows / raw["num_experts"])
    return max(slots + slots % 2, raw["router_min_capacity"])


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _ffn(x: np.ndarray, w_gate: np.ndarray, w_up: np.ndarray, w_down: np.ndarray) -> np.ndarray:
    """Weights `[in, out]`; the gate is twice as wide, and its second half goes through silu."""
    first, second = np.split(x @ w_gate, 2, axis=-1)
    return (first * _silu(second) * (x @ w_up)) @ w_down


def _attention(raw: Mapping[str, Any], own: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    B, T, _ = x.shape
    heads, kv_heads, size = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]
    q = _rotate((x @ own["self_attn.q_proj.weight"].T).reshape(B, T, heads, size))
    k = _rotate((x @ own["self_attn.k_proj.weight"].T).reshape(B, T, kv_heads, size))
    v = (x @ own["self_attn.v_proj.weight"].T).reshape(B, T, kv_heads, size)
    out = np.zeros((B, T, heads, size))
    for b in range(B):
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = q[b, :, head] @ k[b, :, kv].T
            scores[np.triu_indices(T, 1)] = -np.inf
            out[b, :, head] = _softmax(scores) @ v[b, :, kv]
    return out.reshape(B, T, -1) @ own["self_attn.o_proj.weight"].T


def _rotate(z: np.ndarray) -> np.ndarray:
    T, size = z.shape[1], z.shape[-1]
    angles = np.arange(T)[:, None] * 10000.0 ** (-2 * np.arange(size // 2) / size)
    cos, sin = (np.concatenate([f(angles)] * 2, axis=-1)[None, :, None, :] for f in (np.cos, np.sin))
    swapped = np.concatenate([-z[..., size // 2 :], z[..., : size // 2]], axis=-1)
    return z * cos + swapped * sin


def _moe(raw: Mapping[str, Any], own: Mapping[str, np.ndarray], x: np.ndarray, capacity_factor: float) -> tuple:
    rows = x.reshape(-1, x.shape[-1])
    probs = _softmax(rows @ own["mlp.gate_weight"].T)
    k = raw.get("router_topk", 2)
    chosen = np.argsort(-probs, axis=-1, kind="stable")[:, :k]
    kept = np.zeros_like(chosen, bool)
    used = dict.fromkeys(range(raw["num_experts"]), 0)
    limit = capacity(raw, len(rows), capacity_factor)
    for choice in range(k):  # all first choices take their places before any second choice
        for row in range(len(rows)):
            expert = int(chosen[row, choice])
            kept[row, choice] = used[expert] < limit
            used[expert] += 1
    out = np.zeros_like(rows)
    for row in range(len(rows)):
        for choice in range(k):
            if kept[row, choice]:
                e = chosen[row, choice]
                stacks = (own[f"mlp.experts.{name}"][e] for name in ("wi_gate", "wi_up", "wo"))
                out[row] += probs[row, e] * _ffn(rows[row], *stacks)
    shape = (*x.shape[:2], k)
    return out.reshape(x.shape), chosen.reshape(shape), kept.reshape(shape)
