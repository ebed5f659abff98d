"""Texts and requests that belong to none of the five tasks: what keywords are contrasted with, so that they abstain."""

from __future__ import annotations

from train.tasks.lists import read

REQUESTS: tuple[str, ...] = read("unrelated")
_PARAGRAPH_WORDS = 120


def prose() -> list[str]:
    """Paragraphs of English that comes with every Python: its language reference."""
    from pydoc_data.topics import topics

    words = " ".join(topics[name] for name in sorted(topics)).split()
    paragraphs = [words[start : start + _PARAGRAPH_WORDS] for start in range(0, len(words), _PARAGRAPH_WORDS)]
    return [" ".join(paragraph) for paragraph in paragraphs]
