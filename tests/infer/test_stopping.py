"""Stop strings: the same end however the text is cut, and nothing shown that is taken back later."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openzaya.infer.stopping import StopStrings

TEXT = st.text(alphabet="ab\n", max_size=25)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Letter by letter, all of the text looked at each time."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    search, shown = StopStrings(stops, include_stop=include), ""
    for piece in pieces:
        text, stop = search.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + search.flush(), None


@given(TEXT, STOPS, st.booleans(), st.lists(st.integers(0, 25), max_size=8))
def test_the_end_does_not_depend_on_the_pieces(text, stops, include, cuts) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    assert run(pieces, stops, include) == expected(text, stops, include)


@given(TEXT, STOPS)
def test_as_much_is_shown_as_can_be(text, stops) -> None:
    """Held back is only what could still begin a stop string, and at once all of the rest is shown."""
    search, shown = StopStrings(stops), ""
    for place, letter in enumerate(text):
        new, stop = search.push(letter)
        shown += new
        if stop is not None:
            return
        held = text[len(shown) : place + 1]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(text[start : place + 1]) for stop in stops for start in range(len(shown)))


@pytest.mark.parametrize(
    ("pieces", "stops", "end"),
    [
        (["one two", " three"], ["o th"], ("one tw", "o th")),
        (["one tw", "o three"], ["o t"], ("one tw", "o t")),
        (["aab"], ["ab", "aab"], ("", "aab")),
        (["xab"], ["abc", "b"], ("xa", "b")),
        (["ab", "", "c"], ["abc"], ("", "abc")),
        (["ab"], ["abc"], ("ab", None)),
        (["a🙂b"], ["🙂"], ("a", "🙂")),
    ],
)
def test_cases(pieces, stops, end) -> None:
    assert run(pieces, stops) == end


def test_text_that_is_passed_by_ends_nothing() -> None:
    search = StopStrings(["ab"])
    assert search.push("xa") == ("x", None)
    assert search.pass_by("b ab a") == "ab ab a"
    assert search.push("b") == ("b", None)
    assert search.push("ab") == ("", "ab")


def test_long_and_repetitive_stop_strings_stay_cheap() -> None:
    search = StopStrings(["a" * 999 + str(digit) for digit in range(10)])
    shown = "".join(search.push("a" * 10)[0] for _ in range(500))
    assert len(shown) == 5000 - 999
    assert search.push("a3") == ("a", "a" * 999 + "3")
