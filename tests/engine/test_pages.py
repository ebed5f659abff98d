import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emoe_jax.engine.pages import TRASH_PAGE, PagePool


def test_pages_cover_tokens():
    pool = PagePool(num_pages=8, page_size=16)
    assert [pool.pages_for(tokens) for tokens in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]
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


class PoolMachine(RuleBasedStateMachine):
    """Any interleaving of allocations and frees: free + used = all, no page with two owners."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(num_pages=24, page_size=8)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        if self.pool.can_allocate(count):
            pages = self.pool.allocate(count)
            assert len(pages) == count
            self.held.append(pages)
        else:
            assert count > self.pool.num_free

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_page_has_one_owner(self) -> None:
        used = [page for pages in self.held for page in pages]
        assert len(set(used)) == len(used) == self.pool.num_used
        assert self.pool.num_free + self.pool.num_used == self.pool.num_usable
        assert all(TRASH_PAGE < page < 24 for page in used)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(deadline=None, max_examples=50)
