"""Learns the keywords of each task from labelled prompts: n-grams that are frequent there and rare everywhere else."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from emoe_jax.errors import ConfigError
from emoe_jax.tasks import TaskClassifier, TaskProfile
from emoe_jax.tasks.classifier import words_of
from emoe_jax.tasks.profile import MAX_KEYWORD_WORDS
from train.tasks import examples, unrelated
from train.tasks.example import Split

MIN_SHARE = 0.001  # of a task's prompts that a keyword occurs in
FLOOR = 0.0001  # nothing counts as rarer than this elsewhere
MIN_WEIGHT = 1.0  # nats
TRUST = (0.6, 0.85, 1.0, 1.0)  # of n-grams by length: the shorter, the likelier in texts of sorts never seen here
ENOUGH = 16.0  # nats of evidence that the keywords of a prompt are chosen to reach
MIN_GAIN = 3.0  # nats that a keyword must add over all prompts
MANY = 500
MAX_KEYWORDS = 800
NEARLY = 0.98  # of the texts that decide where the threshold is
HELD_OUT = 5  # one prompt in so many sets the threshold instead of teaching keywords


def with_demo_keywords(profile: TaskProfile, tasks: Sequence[str], seed: int, count: int) -> TaskProfile:
    """The profile with keywords of demo tasks, from `count` prompts each (more of short ones) of the training split;
    `facts` are prompts of `qa`."""
    prompts: dict[str, list[str]] = {}
    for drawn in tasks:
        task = examples(drawn, "train", seed, 1)[0].task
        some = demo_prompts(drawn, "train", seed, count * (5 if task == "conv" else 1))
        prompts[task] = prompts.get(task, []) + some
    return with_keywords(profile, prompts, unrelated.REQUESTS, unrelated.prose())


def demo_prompts(task: str, split: Split, seed: int, count: int) -> list[str]:
    """Prompts of a demo task: all turns of a chat, as the engine sees it, and where that is more, its last turn."""
    drawn = examples(task, split, seed, count)
    chats = ["\n".join(message["content"] for message in example.messages) for example in drawn]
    return chats + [example.prompt for example in drawn if example.history]


def with_keywords(
    profile: TaskProfile, prompts: Mapping[str, Sequence[str]], *unrelated_texts: Sequence[str]
) -> TaskProfile:
    """The profile with keywords learned from prompts by task, contrasted with several sorts of unrelated texts.

    A keyword's weight is the log-odds (nats) of its share of the task's prompts against the largest share anywhere
    else. Of these, keywords are chosen greedily until most prompts hold `ENOUGH` evidence, so that what prompts of a
    task have in common, their instruction, comes before what they happen to be about.
    """
    for task, texts in prompts.items():
        if len(texts) < HELD_OUT:
            raise ConfigError(
                f"task {task!r} has {len(texts)} prompts to learn keywords from; {HELD_OUT} are the least"
            )
    taught = {task: [text for n, text in enumerate(texts) if n % HELD_OUT] for task, texts in prompts.items()}
    judged = {task: texts[::HELD_OUT] for task, texts in prompts.items()}
    documents = {task: [_ngrams(text) for text in texts] for task, texts in taught.items()}
    shares = {task: _shares(found) for task, found in documents.items()}
    others = [_shares([_ngrams(text) for text in texts]) for texts in unrelated_texts]
    for task, found in documents.items():
        rivals = [shares[other] for other in shares if other != task] + others
        weights = {}
        for ngram, share in shares[task].items():
            rival = max(FLOOR, *(shares_there.get(ngram, 0.0) for shares_there in rivals))
            weight = math.log(share / rival) * TRUST[ngram.count(" ")]
            if share >= MIN_SHARE and weight >= MIN_WEIGHT:
                weights[ngram] = weight
        profile = profile.with_task(task, keywords=_choose(found, weights))
    return dataclasses.replace(profile, threshold=_threshold(profile, judged, list(itertools.chain(*unrelated_texts))))


def _ngrams(text: str) -> frozenset[str]:
    words = words_of(text)
    lengths = range(1, MAX_KEYWORD_WORDS + 1)
    return frozenset(" ".join(words[start : start + n]) for n in lengths for start in range(len(words) - n + 1))


def _shares(documents: Sequence[frozenset[str]]) -> dict[str, float]:
    """In which share of the documents each n-gram occurs; of many documents, one alone does not count."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document)
    least = 1 + len(documents) // MANY
    return {ngram: count / len(documents) for ngram, count in counts.items() if count >= least}


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


def _threshold(keywords: TaskProfile, prompts: Mapping[str, Sequence[str]], unrelated_texts: Sequence[str]) -> float:
    """Halfway between what nearly no unrelated text reaches and what nearly all prompts reach, those of each task.

    `prompts` must not be those that taught the keywords.
    """
    classifier = TaskClassifier(keywords)
    lowest = min(
        float(np.quantile([classifier.scores(text)[task] for text in texts], 1 - NEARLY))
        for task, texts in prompts.items()
    )
    highest = np.quantile([max(classifier.scores(text).values()) for text in unrelated_texts], NEARLY)
    return round(max(0.0, (lowest + float(highest)) / 2), 3)
