"""What is kept of responses stays within its bounds, whatever is asked of it."""

from hypothesis import given
from hypothesis import strategies as st

from serve.responses.store import ResponseStore, StoredResponse

MOST, BYTES = 3, 60
NAMES = st.sampled_from("abcd")
OWNERS = st.sampled_from([None, None, b"k"])
CALLS = st.lists(
    st.tuples(st.just("add"), OWNERS, NAMES, st.integers(0, 40) | st.just(80))
    | st.tuples(st.sampled_from(["get", "remove"]), OWNERS, NAMES, st.just(0)),
    max_size=40,
)


@given(CALLS)
def test_the_least_recently_used_goes_first(calls: list[tuple[str, bytes | None, str, int]]) -> None:
    """Against a list with the last used at its end."""
    store, kept = ResponseStore(MOST, BYTES), list[tuple[tuple[bytes | None, str], StoredResponse]]()
    for action, owner, name, size in calls:
        key = (owner, name)
        at = next((at for at, (other, _) in enumerate(kept) if other == key), None)
        if action == "add":
            if at is not None:
                continue  # ids are new
            response = StoredResponse(b"x" * (size // 2), b"y" * (size - size // 2))
            store.add(owner, name, response)
            if size <= BYTES:
                kept.append((key, response))
                while len(kept) > MOST or sum(each.size for _, each in kept) > BYTES:
                    kept.pop(0)
        elif action == "get":
            assert store.get(owner, name) == (None if at is None else kept[at][1])
            if at is not None:
                kept.append(kept.pop(at))
        else:
            assert store.remove(owner, name) == (at is not None)
            if at is not None:
                kept.pop(at)
        assert len(store) == len(kept) <= MOST
        assert store.size == sum(each.size for _, each in kept) <= BYTES


def test_what_was_asked_for_stays_longest() -> None:
    store = ResponseStore(2)
    for name in "ab":
        store.add(None, name, StoredResponse(b"", b""))
    assert store.get(None, "a") is not None
    store.add(None, "c", StoredResponse(b"", b""))
    assert [store.get(None, name) is not None for name in "abc"] == [True, False, True]


def test_nothing_is_kept_where_nothing_may_be() -> None:
    store = ResponseStore(0)
    store.add(None, "a", StoredResponse(b"", b""))
    assert (len(store), store.get(None, "a")) == (0, None)
