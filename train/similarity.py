"""How alike two answers are, by their tokens and by their words."""

from __future__ import annotations

from collections.abc import Sequence


def token_agreement(reference: Sequence[int], candidate: Sequence[int]) -> float:
    """The share of positions with equal tokens, of those of the longer answer; 1 for two empty ones.

    Worked example: [5, 6, 7] and [5, 9, 7, 8] agree at 2 of 4 positions, 0.5. A token too many shifts all that follow.
    """
    longer = max(len(reference), len(candidate))
    equal = sum(ours == theirs for ours, theirs in zip(reference, candidate, strict=False))
    return equal / longer if longer else 1.0


def rouge_l(reference: str, candidate: str) -> float:
    """F1 of the longest common subsequence of words, lower-cased (Lin 2004); 1 for two answers without words."""
    wanted, given = reference.lower().split(), candidate.lower().split()
    if not wanted or not given:
        return float(wanted == given)
    longest = [0] * (len(given) + 1)
    for word in wanted:
        before = 0
        for index, other in enumerate(given, start=1):
            above = longest[index]
            longest[index] = before + 1 if word == other else max(above, longest[index - 1])
            before = above
    return 2 * longest[-1] / (len(wanted) + len(given))
