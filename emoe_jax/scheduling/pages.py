"""Host-side bookkeeping of the key/value cache's pages. No tensors: a page is a number."""

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable

PAGE_SIZE = 16
"""Tokens per page."""

TRASH_PAGE = 0
"""Rows that only pad a batch write their keys and values here. No sequence reads them."""


def pages_for(tokens: int, page_size: int = PAGE_SIZE) -> int:
    """Pages that so many tokens fill, the last one maybe in part."""
    return math.ceil(tokens / page_size)


class PagePool:
    """Hands out pages `1 .. num_pages - 1` of `page_size` tokens each; page 0 is the trash page.

    Ask `can_allocate(n)` before `allocate(n)`. A page freed once too often, or one that the pool never handed out,
    raises `ValueError` and changes nothing: it means that two sequences were about to write to the same memory.

    A page that was written to its end can be published under a key that tells what is in it. From then on `find`
    finds it and `share` gives it to further users. A published page without users is kept until its memory is needed.
    Then the one used least recently is taken first, and only when no other page is free.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2:
            raise ValueError(f"{num_pages} pages leave none beside the trash page; at least 2 are needed")
        if page_size < 1:
            raise ValueError(f"a page of {page_size} tokens holds nothing; page_size must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._users = [0] * num_pages
        self._blank = list(range(num_pages - 1, TRASH_PAGE, -1))  # a stack: the page freed last is used first
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and without users, least recently used first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_usable(self) -> int:
        """Pages that sequences can have: all but the trash page."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages without users, whether something is published in them or not."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that some sequence uses. Pages that are only kept for their prefix do not count."""
        return self.num_usable - self.num_free

    def needed(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return pages_for(num_tokens, self.page_size)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed now, kept pages given up where necessary."""
        return count <= self.num_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; the caller has asked `can_allocate(count)`."""
        assert 0 <= count <= self.num_free, f"{count} pages asked of {self.num_free} free ones"
        pages = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give up one use of each page, a sequence's last page first: later pages are useless without earlier ones.

        Raises `ValueError`, freeing none, if one of them is not in use or appears twice.
        """
        pages = list(pages)
        for page, times in Counter(pages).items():
            if not TRASH_PAGE < page < self.num_pages:
                raise ValueError(f"page {page} is not one of the pool's pages 1 to {self.num_pages - 1}")
            if not self._users[page] or times > 1:
                raise ValueError(f"page {page} is freed twice")
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def resize(self, num_pages: int) -> dict[int, int]:
        """Have another number of pages; returns where pages went that are kept and had numbers beyond it.

        Published pages without users are forgotten where there is no room, those used least recently first. Raises
        `ValueError`, changing nothing, when the pages in use do not fit.
        """
        if num_pages < 2 or self.num_used >= num_pages:
            raise ValueError(f"{self.num_used} pages are in use; {num_pages} pages cannot hold them and the trash page")
        while self.num_used + len(self._idle) >= num_pages:
            self._blank.append(self._evict())
        kept = [page for page in range(num_pages, self.num_pages) if self._users[page] or page in self._idle]
        blank = [page for page in self._blank if page < num_pages]
        moves = {page: blank.pop() for page in kept}
        added = range(num_pages - 1, self.num_pages - 1, -1)  # none when the pool shrinks
        users = self._users + [0] * len(added)
        for page, target in moves.items():
            users[target] = users[page]
        self._users = users[:num_pages]
        self._blank = [*added, *blank]
        self._idle = OrderedDict((moves.get(page, page), None) for page in self._idle)
        self._key_of = {moves.get(page, page): key for page, key in self._key_of.items()}
        self._page_of = {key: page for page, key in self._key_of.items()}
        self.num_pages = num_pages
        return moves

    def publish(self, page: int, key: bytes) -> None:
        """Let `key` find this page from now on, unless it finds another. The page is in use and complete."""
        assert self._users[page], f"page {page} is free"
        assert page not in self._key_of, f"page {page} is published already"
        if self._page_of.setdefault(key, page) == page:
            self._key_of[page] = key

    def unpublish(self) -> None:
        """Let no page be found any more: what the pages held is gone. Users keep their pages."""
        self._blank += self._idle
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The published pages of the first keys, up to the first key that has none."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of these published pages have no users. Sharing them leaves so many fewer free."""
        return sum(page in self._idle for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Become a user of pages that were found, before the next `allocate`."""
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] += 1

    def _evict(self) -> int:
        """Forget what is in the published page that was used least recently."""
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
