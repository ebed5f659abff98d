"""A trace as steps of an engine: `R` requests side by side, one token of each per step, prompts in arrival order."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from emoe_jax.traces import RoutingTrace


class Plans(NamedTuple):
    """Plans one after the other (see `emoe_jax.policies.rule.ExpectedWishes`)."""

    rates: Float[np.ndarray, "plans M E"]
    joined: Float[np.ndarray, "plans M E"]
    kept: Float[np.ndarray, " plans"]


class Stream(NamedTuple):
    """A step without a token in some place has expert `E` there, which does not exist, and mass 0."""

    experts: Int[np.ndarray, "steps R M k"]
    probs: Float[np.ndarray, "steps R M k"]
    prompt: Int[np.ndarray, "steps R"]  # -1 where there is none
    is_new: Bool[np.ndarray, " steps"]  # whether a plan begins with this step
    plan: Int[np.ndarray, " steps"]  # the plan in force

    @property
    def num_tokens(self) -> int:
        return int((self.prompt >= 0).sum())


def make_stream(trace: RoutingTrace, concurrency: int) -> Stream:
    """A prompt takes the place of the first of the `concurrency` running ones that is done."""
    order = np.lexsort((trace.token_pos, trace.sample))
    sample = trace.sample[order].astype(np.int64)
    lengths = np.bincount(sample, minlength=trace.num_prompts)
    start, place = _schedule(lengths, concurrency)
    step = start[sample] + np.arange(len(sample)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    T, M, k = int((start + lengths).max()), trace.num_layers, trace.top_k
    experts = np.full((T, concurrency, M, k), trace.num_experts, np.int16)
    probs = np.zeros((T, concurrency, M, k), np.float16)
    prompt = np.full((T, concurrency), -1, np.int32)
    at = step, place[sample]
    experts[at], probs[at], prompt[at] = trace.experts[order], trace.probs[order], sample
    is_new = np.zeros(T, bool)
    for steps in (start[lengths > 0], start + lengths):
        is_new[steps[steps < T]] = True
    return Stream(experts, probs, prompt, is_new, np.cumsum(is_new) - 1)


def make_plans(stream: Stream, shares: Float[np.ndarray, "P M E"], top_k: int) -> Plans:
    """The sum of the running prompts' expected shares, at every step where that changes."""
    steps = np.flatnonzero(stream.is_new)
    shape = (len(steps), *shares.shape[1:])
    rates, joined, kept = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(len(steps), np.float32)
    for v, step in enumerate(steps.tolist()):
        running = stream.prompt[step][stream.prompt[step] >= 0].tolist()
        before = stream.prompt[step - 1][stream.prompt[step - 1] >= 0].tolist() if step else []
        for prompt in running:
            rates[v] += top_k * shares[prompt]
            if prompt not in before:
                joined[v] += top_k * shares[prompt]
        kept[v] = len(set(running) & set(before)) / max(1, len(before))
    return Plans(rates, joined, kept)


def _schedule(lengths: Int[np.ndarray, " P"], places: int) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    """When and where each prompt starts."""
    start, place = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    free = [(0, index) for index in range(places)]
    for prompt, length in enumerate(lengths):
        start[prompt], place[prompt] = heapq.heappop(free)
        heapq.heappush(free, (int(start[prompt] + length), int(place[prompt])))
    return start, place
