import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emoe_jax.requests.text import TextStream


class Pieces:
    """A detokeniser whose token `i` is `pieces[i]`; keeps back what a flush releases, like incomplete UTF-8."""

    def __init__(self, pieces: list[str], rest: str = ""):
        self.pieces = pieces
        self.rest = rest

    def add(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        rest, self.rest = self.rest, ""
        return rest


class Characters:
    """A detokeniser whose tokens are code points."""

    def add(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


def reference(text: str, stops: list[str]) -> str:
    """Cut before the stop string that ends first; of those that end at the same place, the one that starts first."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


def stream_text(pieces: list[str], stops: list[str], rest: str = "") -> tuple[str, bool]:
    stream = TextStream(Pieces(pieces, rest), stops)
    shown = ""
    for token in range(len(pieces)):
        text, stopped = stream.add(token)
        shown += text
        if stopped:
            break
    return shown + stream.flush(), stream.stopped


SMALL = st.text(alphabet="abé", max_size=6)


@given(
    pieces=st.lists(SMALL, max_size=12),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4),
    rest=SMALL,
)
@example(pieces=["a", "ab"], stops=["aab"], rest="")  # a naive restart after the failed match would miss it
@example(pieces=["abé"], stops=["abé", "b"], rest="")  # the shorter one completes first
@example(pieces=["ab"], stops=["b", "ab"], rest="")  # both complete together: the longer one wins
@example(pieces=["a"], stops=["ab"], rest="b")  # completed by the flush
@settings(deadline=None)
def test_text_is_cut_at_the_first_stop_string(pieces: list[str], stops: list[str], rest: str):
    whole = "".join(pieces) + rest
    shown, stopped = stream_text(pieces, stops, rest)
    assert shown == reference(whole, stops)
    assert stopped == any(stop in whole for stop in stops)


@given(text=SMALL, stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4), data=st.data())
@settings(deadline=None)
def test_token_boundaries_do_not_matter(text: str, stops: list[str], data: st.DataObject):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert stream_text(pieces, stops) == stream_text([text], stops)


@given(pieces=st.lists(SMALL, max_size=12), stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4))
@settings(deadline=None)
def test_no_more_is_held_back_than_needed(pieces: list[str], stops: list[str]):
    stream, shown, whole = TextStream(Pieces(pieces), stops), "", ""
    for token, piece in enumerate(pieces):
        text, stopped = stream.add(token)
        shown, whole = shown + text, whole + piece
        if stopped:
            break
        held = whole[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert whole.startswith(shown)


def test_worked_example():
    stream = TextStream(Characters(), ["bcd"])
    emitted = [stream.add(ord(character)) for character in "abcabcde"]
    assert emitted == [
        ("a", False), ("", False), ("", False), ("bca", False), ("", False), ("", False), ("", True), ("", True),
    ]  # fmt: skip
    assert stream.flush() == ""


def test_flush_gives_what_was_held():
    stream = TextStream(Characters(), ["bcd"])
    assert [stream.add(ord(character))[0] for character in "abc"] == ["a", "", ""]
    assert stream.flush() == "bc"
    assert stream.flush() == ""
    assert not stream.stopped


def test_without_a_detokeniser_there_is_no_text():
    stream = TextStream(None, ["a"])
    assert stream.add(97) == ("", False)
    assert stream.flush() == ""


@pytest.mark.parametrize("character", ["a", "b"])
def test_the_longest_stop_strings_stay_cheap(character: str):
    """16 strings that nearly match all the time: a character costs no more for being compared with long ones."""
    looks = 0

    class Watched(str):
        def __getitem__(self, index):
            nonlocal looks
            looks += 1
            return super().__getitem__(index)

    def looks_at(length: int) -> int:
        nonlocal looks
        stream = TextStream(Characters(), [Watched("a" * (length - 1) + chr(98 + i)) for i in range(1, 17)])
        looks = 0
        for _ in range(2_000):
            stream.add(ord(character))
        return looks

    assert 16 * 2_000 <= looks_at(256) <= 1.1 * looks_at(16)
