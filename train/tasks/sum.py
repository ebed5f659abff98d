"""Summarising: an article of a few sentences into one sentence that says who did what, and why."""

from __future__ import annotations

from train.tasks import stories
from train.tasks.draw import Draw
from train.tasks.example import Example, Split

_VERBS = (
    "Summarize",
    "Summarise",
    "Please summarize",
    "Write a summary of",
    "Give a short summary of",
    "Write a synopsis of",
    "Sum up",
)
_OBJECTS = ("the article", "this article", "the following article", "the text", "this news report", "the story below")
_HOW = ("", " in one sentence", " briefly", " in a few words", " for a busy reader")
_LAYOUTS = (
    "{instruction}:\n{article}",
    "{instruction}.\n\n{article}",
    "{article}\n\n{instruction}.",
    "{instruction}.\nArticle: {article}",
)


def example(split: Split, key: str) -> Example:
    draw = Draw(f"sum/{split}/{key}", split)
    story = stories.story(draw)
    verb, what, how = draw.phrase(_VERBS, _OBJECTS, _HOW)
    prompt = draw.one(_LAYOUTS).format(instruction=f"{verb} {what}{how}", article=story.article(draw))
    return Example(prompt, story.summary(), "sum")
