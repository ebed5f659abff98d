"""What a prompt asks for, told by keywords: eMoE's task type extraction (section 1.1)."""

import re
from typing import Any

from emoe_jax.tasks.profile import OTHER, TaskProfile

END_CHARS = 12_000
"""Longer texts are read at both ends, where instructions are, so that a classification takes bounded time."""

_WORD = re.compile(r"\w+|[?!]")


def words_of(text: str) -> list[str]:
    """The words that keywords consist of: lower case, question and exclamation marks count as words."""
    if len(text) > 2 * END_CHARS:
        text = text[:END_CHARS] + "\n" + text[-END_CHARS:]
    return _WORD.findall(text.lower())


class TaskClassifier:
    """Adds up the weights of the keywords that occur in a text, each once; the task with the highest score wins.

    A text whose best score stays below the profile's threshold is of no known task: `other`.
    """

    def __init__(self, profile: TaskProfile):
        self._threshold = profile.threshold
        self._tasks = [name for name, task in profile.tasks.items() if task.keywords]
        # A trie by words; at "" what a keyword that ends there adds: (number of the task, weight) pairs.
        self._trie: dict[str, Any] = {}
        for number, name in enumerate(self._tasks):
            for keyword, weight in profile.tasks[name].keywords.items():
                node = self._trie
                for word in words_of(keyword):
                    node = node.setdefault(word, {})
                node.setdefault("", []).append((number, weight))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that it knows keywords of."""
        return tuple(self._tasks)

    def classify(self, text: str) -> str:
        """The task of a prompt, or `other`."""
        scores = self.scores(text)
        if not scores:
            return OTHER
        best = max(scores, key=lambda name: scores[name])
        return best if scores[best] >= self._threshold else OTHER

    def scores(self, text: str) -> dict[str, float]:
        """The evidence for each task."""
        words, trie = words_of(text), self._trie
        words.append("")  # the end: no keyword goes on with it, and looking one word ahead stays in range
        scores = [0.0] * len(self._tasks)
        found: set[int] = set()
        for start, word in enumerate(words[:-1]):
            node = trie.get(word)
            position = start
            while node is not None:
                matched = node.get("")
                if matched is not None and id(node) not in found:
                    found.add(id(node))
                    for number, weight in matched:
                        scores[number] += weight
                position += 1
                following = words[position]
                node = node.get(following) if following else None
        return dict(zip(self._tasks, scores, strict=True))
