"""Learns the keywords of each task from labelled prompts: n-grams that are frequent there and rare everywhere else."""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from emoe_jax.errors import ConfigError
from emoe_jax.tasks import TaskClassifier, TaskProfile
from emoe_jax.tasks.classifier import words_of
from emoe_jax.tasks.profile import MAX_KEYWORD_WORDS
from train.tasks import TASKS, examples, unrelated
from train.tasks.example import Split

MIN_SHARE = 0.001  # of a task's prompts that a keyword occurs in
FLOOR = 0.0001  # nothing counts as rarer than this elsewhere
MIN_WEIGHT = 1.0  # nats
TRUST = (0.6, 0.85, 1.0, 1.0)  # of n-grams by length: the shorter, the likelier in texts of sorts never seen here
ENOUGH = 16.0  # nats of evidence that the keywords of a prompt are chosen to reach
MIN_GAIN = 3.0  # nats that a keyword must add over all prompts
MAX_KEYWORDS = 800
KEPT = 0.98  # of each task's prompts that must not be mistaken for unrelated ones


def with_demo_keywords(profile: TaskProfile, seed: int, count: int) -> TaskProfile:
    """The profile with keywords of the demo tasks, from `count` prompts each of the training split."""
    return with_keywords(
        profile,
        {task: demo_prompts(task, "train", seed, count) for task in TASKS},
        unrelated.REQUESTS,
        unrelated.prose(),
    )


def demo_prompts(task: str, split: Split, seed: int, count: int) -> list[str]:
    """Prompts of a demo task: all turns of a chat, as the engine sees it, and where that is more, its last turn."""
    drawn = examples(task, split, seed, count)
    chats = ["\n".join(message["content"] for message in example.messages) for example in drawn]
    return chats + [example.prompt for example in drawn if example.history]


def with_keywords(profile: TaskProfile, prompts: Mapping[str, Sequence[str]], *unrelated: Sequence[str]) -> TaskProfile:
    """The profile with keywords learned from prompts by task, contrasted with several sorts of unrelated texts.

    A keyword's weight is the log-odds (nats) of its share of the task's prompts against the largest share anywhere
    else. Of these, keywords are chosen greedily until most prompts hold `ENOUGH` evidence, so that what prompts of a
    task have in common, their instruction, comes before what they happen to be about.
    """
    for task, texts in prompts.items():
        if not texts:
            raise ConfigError(f"task {task!r} has no prompts to learn keywords from")
    documents = {task: [_ngrams(text) for text in texts] for task, texts in prompts.items()}
    shares = {task: _shares(found) for task, found in documents.items()}
    others = [_shares([_ngrams(text) for text in texts]) for texts in unrelated]
    for task, found in documents.items():
        rivals = [shares[other] for other in shares if other != task] + others
        weights = {}
        for ngram, share in shares[task].items():
            rival = max(FLOOR, *(shares_there.get(ngram, 0.0) for shares_there in rivals))
            weight = math.log(share / rival) * TRUST[ngram.count(" ")]
            if share >= MIN_SHARE and weight >= MIN_WEIGHT:
                weights[ngram] = weight
        profile = profile.with_task(task, keywords=_choose(found, weights))
    return _with_threshold(profile, prompts)


def _ngrams(text: str) -> frozenset[str]:
    words = words_of(text)
    lengths = range(1, MAX_KEYWORD_WORDS + 1)
    return frozenset(" ".join(words[start : start + n]) for n in lengths for start in range(len(words) - n + 1))


def _shares(documents: Sequence[frozenset[str]]) -> dict[str, float]:
    """In which share of the documents each n-gram occurs."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document)
    return {ngram: count / len(documents) for ngram, count in counts.items()}


def _choose(documents: Sequence[frozenset[str]], weights: Mapping[str, float]) -> dict[str, float]:
    """Greedy cover: the keyword that brings the prompts closest to `ENOUGH` evidence comes next."""
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for index, document in enumerate(documents):
        for ngram in document & weights.keys():
            holders[ngram].append(index)
    rows = {ngram: np.array(indices) for ngram, indices in holders.items()}
    missing = np.full(len(documents), ENOUGH)
    # Upper bounds, largest first: the more is chosen, the less a keyword adds.
    heap = [(-weights[ngram] * len(indices), ngram) for ngram, indices in rows.items()]
    heapq.heapify(heap)
    chosen: dict[str, float] = {}
    while heap and len(chosen) < MAX_KEYWORDS:
        bound, ngram = heapq.heappop(heap)
        gain = float(np.minimum(missing[rows[ngram]], weights[ngram]).sum())
        if gain >= MIN_GAIN and gain < -bound:
            heapq.heappush(heap, (-gain, ngram))
        elif gain >= MIN_GAIN:
            chosen[ngram] = weights[ngram]
            missing[rows[ngram]] = np.maximum(missing[rows[ngram]] - weights[ngram], 0)
    return chosen


def _with_threshold(profile: TaskProfile, prompts: Mapping[str, Sequence[str]]) -> TaskProfile:
    """The profile with the highest threshold that `KEPT` of each task's prompts still pass."""
    classifier = TaskClassifier(profile)
    passed = [
        np.quantile([classifier.scores(text)[task] for text in texts], 1 - KEPT) for task, texts in prompts.items()
    ]
    return TaskProfile(
        profile.num_layers, profile.num_experts, profile.top_k, max(1.0, round(float(min(passed)), 3)), profile.tasks
    )
