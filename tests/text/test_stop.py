"""StopStrings against a definition that looks at every prefix of the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillama.engine.answer import StopStrings
from mpillama.errors import UserError


def stopped(text: str, stops: list[str]) -> tuple[str, bool]:
    """Text before the stop string that is complete first, the longest of those complete at once."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


letters = st.text("ab", max_size=12)


@given(st.lists(letters, max_size=12), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_any_cut_gives_the_definition(chunks, stops):
    stream, printed, reached = StopStrings(stops), "", False
    for chunk in chunks:
        text, reached = stream.push(chunk)
        printed += text
    printed += stream.finish()
    assert (printed, reached) == stopped("".join(chunks), stops)


@given(st.lists(letters, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_nothing_is_printed_too_early_or_held_too_long(chunks, stops):
    stream, seen, printed = StopStrings(stops), "", ""
    for chunk in chunks:
        text, reached = stream.push(chunk)
        seen, printed = seen + chunk, printed + text
        if reached:
            break
        held = seen[len(printed) :]
        assert seen == printed + held
        assert not held or any(stop.startswith(held) for stop in stops)
        tails = [seen[at:] for at in range(len(seen) - len(held)) if any(s.startswith(seen[at:]) for s in stops)]
        assert tails == []


def test_text_after_the_stop_is_dropped():
    stream = StopStrings(["\n\n", "User:"])
    assert stream.push("Hello Us") == ("Hello ", False)
    assert stream.push("er: more") == ("", True)
    assert stream.push("and more") == ("", True)
    assert stream.finish() == ""


def test_first_completed_stop_wins():
    assert StopStrings(["late", "b"]).push("a b late") == ("a ", True)
    assert StopStrings(["b", "ab"]).push("xab") == ("x", True)
    assert StopStrings(["abc", "b"]).push("abc") == ("a", True)


def test_without_stops_everything_passes():
    assert StopStrings([]).push("abc") == ("abc", False)


def test_empty_stop_is_refused():
    with pytest.raises(UserError, match="empty"):
        StopStrings(["a", ""])
