"""Host-side bookkeeping of the key/value cache's pages. No tensors: a page is a number."""

from collections.abc import Iterable

TRASH_PAGE = 0
"""Rows that only pad a batch write their keys and values here; nobody reads them."""


class PagePool:
    """Hands out pages `1 .. num_pages - 1` of `page_size` tokens each; page 0 is the trash page.

    Ask `can_allocate(n)` before `allocate(n)`. A page freed twice, or one that the pool never handed out, raises
    `ValueError` and changes nothing: it means that two sequences were about to share memory.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2:
            raise ValueError(f"{num_pages} pages leave none beside the trash page; at least 2 are needed")
        if page_size < 1:
            raise ValueError(f"a page of {page_size} tokens holds nothing; page_size must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, TRASH_PAGE, -1))  # a stack: the page freed last is used first
        self._used = bytearray(num_pages)

    @property
    def num_usable(self) -> int:
        """Pages that sequences can have: all but the trash page."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_usable - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; the caller has asked `can_allocate(count)`."""
        assert 0 <= count <= len(self._free), f"{count} pages asked of {len(self._free)} free ones"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._used[page] = 1
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises `ValueError`, freeing none, if one of them is not in use or appears twice."""
        pages = list(pages)
        seen: set[int] = set()
        for page in pages:
            if not TRASH_PAGE < page < self.num_pages:
                raise ValueError(f"page {page} is not one of the pool's pages 1 to {self.num_pages - 1}")
            if not self._used[page] or page in seen:
                raise ValueError(f"page {page} is freed twice")
            seen.add(page)
        for page in pages:
            self._used[page] = 0
        self._free.extend(reversed(pages))
