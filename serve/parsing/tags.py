"""Looking for tags in a text that comes in pieces."""

from collections.abc import Sequence
from typing import NamedTuple


class Found(NamedTuple):
    """The first of some tags in a text. Without one, `start` is where the text may still turn into a tag."""

    start: int
    tag: str | None = None

    @property
    def end(self) -> int:
        """Where the text goes on behind the tag."""
        return self.start + len(self.tag or "")


def find_first(text: str, tags: Sequence[str]) -> Found:
    """The tag that stands first. No tag may begin inside another one."""
    places = [(place, tag) for tag in tags if (place := text.find(tag)) >= 0]
    return Found(*min(places)) if places else Found(len(text) - begun(text, tags))


def begun(text: str, tags: Sequence[str]) -> int:
    """How many characters at the end of the text may still become one of the tags."""
    longest = max(map(len, tags))
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(tag.startswith(text[start:]) for tag in tags):
            return len(text) - start
    return 0


def may_become(text: str, tags: Sequence[str]) -> bool:
    """Whether the text is a proper beginning of one of the tags; an empty text is."""
    return any(len(text) < len(tag) and tag.startswith(text) for tag in tags)
