"""Stop strings against a brute-force search over the whole text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.stop_strings import StopStringMatcher

SMALL = st.text(alphabet="ab。", max_size=24)


def brute_force(text: str, stops: list[str]) -> tuple[str, bool]:
    """Cut before the stop string that is complete first; of several, before the longest."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(SMALL, max_size=8), stops=st.lists(SMALL.filter(bool), max_size=4))
def test_what_is_shown_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    shown, is_stopped = "", False
    for piece in pieces:
        visible, is_stopped = matcher.feed(piece)
        shown += visible
        if is_stopped:
            break
    assert (shown if is_stopped else shown + matcher.flush(), is_stopped) == brute_force("".join(pieces), stops)


@settings(max_examples=300, deadline=None)
@given(text=SMALL, stops=st.lists(SMALL.filter(bool), min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    visible, is_stopped = matcher.feed(text)
    held = matcher.flush()
    if not is_stopped:
        assert visible + held == text
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_string_over_token_borders_is_neither_shown_nor_followed() -> None:
    matcher = StopStringMatcher(["\n\nUser:"])
    assert [matcher.feed(p) for p in ("Hi", "\n", "\nUs", "er: no")] == [("Hi", False), ("", False), ("", False), ("", True)]
    assert matcher.feed("more") == ("", True) and matcher.flush() == ""


def test_without_stop_strings_text_passes_through() -> None:
    matcher = StopStringMatcher(())
    assert matcher.feed("abc") == ("abc", False) and matcher.flush() == ""
