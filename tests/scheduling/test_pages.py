import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emoe_jax.scheduling.pages import TRASH_PAGE, PagePool


def test_pages_cover_tokens():
    pool = PagePool(num_pages=8, page_size=16)
    assert [pool.needed(tokens) for tokens in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]
    assert (pool.num_usable, pool.num_free, pool.num_used) == (7, 7, 0)


def test_the_trash_page_is_never_handed_out():
    pool = PagePool(num_pages=5, page_size=4)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert not pool.can_allocate(1)
    assert pool.can_allocate(0)


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 16), (0, 16), (4, 0)])
def test_absurd_pools_are_refused(num_pages: int, page_size: int):
    with pytest.raises(ValueError, match="at least"):
        PagePool(num_pages, page_size)


@pytest.mark.parametrize("pages", [[TRASH_PAGE], [-1], [8], [3], [1, 1], [1, 2, 3]])
def test_wrong_frees_raise_and_change_nothing(pages: list[int]):
    pool = PagePool(num_pages=8, page_size=16)
    assert sorted(pool.allocate(2)) == [1, 2]
    with pytest.raises(ValueError, match="page"):
        pool.free(pages)
    assert pool.num_used == 2
    pool.free([1, 2])
    assert pool.num_free == pool.num_usable


def test_double_free_raises():
    pool = PagePool(num_pages=8, page_size=16)
    pages = pool.allocate(3)
    pool.free(pages)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(pages[:1])


@given(st.lists(st.integers(0, 5), max_size=30))
@settings(deadline=None)
def test_pages_are_unique_and_all_come_back(sizes: list[int]):
    pool = PagePool(num_pages=64, page_size=16)
    held = [pool.allocate(size) for size in sizes if pool.can_allocate(size)]
    flat = [page for pages in held for page in pages]
    assert len(set(flat)) == len(flat) == pool.num_used
    for pages in held:
        pool.free(pages)
    assert sorted(pool.allocate(63)) == list(range(1, 64))


def test_a_published_page_is_found_and_shared_until_its_memory_is_needed():
    pool = PagePool(num_pages=4, page_size=16)
    pages = pool.allocate(2)
    pool.publish(pages[0], b"first")
    pool.publish(pages[1], b"second")
    pool.free(pages)
    assert pool.num_free == 3
    assert pool.find([b"first", b"other", b"second"]) == pages[:1]
    pool.share(pages[:1])
    assert pool.allocate(1)[0] not in pages  # what holds nothing goes first
    assert pool.allocate(1) == pages[1:]
    assert pool.find([b"second"]) == []
    assert not pool.can_allocate(1)
    pool.free(pages[:1])
    assert pool.allocate(1) == pages[:1]
    assert pool.find([b"first"]) == []


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning():
    pool = PagePool(num_pages=4, page_size=16)
    pages = pool.allocate(3)
    keys = [b"0", b"1", b"2"]
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    pool.free(pages)
    for left in (2, 1, 0):
        pool.allocate(1)
        assert pool.find(keys) == pages[:left]


class PoolMachine(RuleBasedStateMachine):
    """Any interleaving of allocating, publishing, sharing and freeing, beside a plain model of the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(num_pages=24, page_size=8)
        self.held: list[list[int]] = []  # by sequence
        self.published: dict[bytes, int] = {}
        self.idle: list[int] = []  # published pages without users, least recently used first

    @property
    def used(self) -> set[int]:
        return {page for pages in self.held for page in pages}

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        if not self.pool.can_allocate(count):
            assert count > self.pool.num_free
            return
        used, blank = self.used, self.pool.num_free - len(self.idle)
        pages = self.pool.allocate(count)
        evicted, self.idle = self.idle[: max(0, count - blank)], self.idle[max(0, count - blank) :]
        assert len(set(pages)) == count
        assert not used & set(pages)
        assert set(evicted) <= set(pages)
        self.published = {key: page for key, page in self.published.items() if page not in evicted}
        self.held.append(pages)

    @rule(number=st.integers(0, 12), data=st.data())
    def publish(self, number: int, data: st.DataObject) -> None:
        private = sorted(self.used - set(self.published.values()))
        if private:
            page, key = data.draw(st.sampled_from(private)), bytes([number])
            self.pool.publish(page, key)
            self.published.setdefault(key, page)

    @rule(numbers=st.lists(st.integers(0, 12), unique=True))
    def share(self, numbers: list[int]) -> None:
        keys = [bytes([number]) for number in numbers]
        known = list(itertools.takewhile(lambda key: key in self.published, keys))
        pages, free = self.pool.find(keys), self.pool.num_free
        assert pages == [self.published[key] for key in known]
        idle = self.pool.num_idle(pages)
        self.pool.share(pages)
        assert self.pool.num_free == free - idle
        self.idle = [page for page in self.idle if page not in pages]
        self.held.append(pages)

    @rule(num_pages=st.integers(2, 32))
    def resize(self, num_pages: int) -> None:
        used = self.used
        if len(used) >= num_pages:
            with pytest.raises(ValueError, match="cannot hold them"):
                self.pool.resize(num_pages)
            return
        self.idle, forgotten = self.idle[(n := max(0, len(used) + len(self.idle) + 1 - num_pages)) :], self.idle[:n]
        moves = self.pool.resize(num_pages)
        kept = used | set(self.idle)
        assert set(moves) == {page for page in kept if page >= num_pages}
        assert not set(moves.values()) & kept
        assert len(set(moves.values())) == len(moves)
        assert all(TRASH_PAGE < page < num_pages for page in moves.values())
        self.held = [[moves.get(page, page) for page in pages] for pages in self.held]
        self.idle = [moves.get(page, page) for page in self.idle]
        published = {key: page for key, page in self.published.items() if page not in forgotten}
        self.published = {key: moves.get(page, page) for key, page in published.items()}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(pages)
        unused = set(self.published.values()) - self.used
        self.idle += [page for page in reversed(pages) if page in unused]

    @invariant()
    def a_page_is_in_use_or_free(self) -> None:
        used = self.used
        assert self.pool.num_used == len(used)
        assert self.pool.num_free == self.pool.num_usable - len(used) >= len(self.idle)
        assert all(TRASH_PAGE < page < self.pool.num_pages for page in used)
        assert set(self.idle) == set(self.published.values()) - used
        assert self.pool.num_idle(self.published.values()) == len(self.idle)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(deadline=None, max_examples=50)
