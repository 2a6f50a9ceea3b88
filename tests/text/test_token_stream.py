"""TokenStream: whole characters as soon as they are whole, and together what decode gives."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpillama.text.tokenizer import Tokenizer

from .test_tokenizer import BOS, EOS, byte_complete, byte_fallback_json, every, load


@every
@pytest.mark.parametrize("skip_special", [True, False])
@given(ids=st.lists(st.integers(0, 420), max_size=60))
@example(ids=[BOS, 3 + 0xE2, 3 + 0x82, EOS, 3 + 0xAC, 3 + 0xE2, 3 + 0x82])
@example(ids=[3 + 0xE2] * 60)
@example(ids=[3 + 0x82] * 40 + [3 + 0xF0, 3 + 0x9F])
@settings(max_examples=80, deadline=None)
def test_stream_adds_up_to_decode(source, skip_special, ids):
    tokenizer = load(source)
    stream = tokenizer.stream(skip_special)
    text = "".join(stream.push(token) for token in ids) + stream.finish()
    assert text == tokenizer.decode(ids, skip_special)


@byte_complete
@given(text=st.text(st.sampled_from("ab 🙂你é\n\ufffd"), max_size=40))
@settings(max_examples=60, deadline=None)
def test_stream_prints_whole_characters_at_once(source, text):
    tokenizer = load(source)
    ids = tokenizer.encode(text, add_bos=False)
    stream, printed = tokenizer.stream(), ""
    for count, token in enumerate(ids, start=1):
        printed += stream.push(token)
        assert text.startswith(printed)
        reference = tokenizer.decode(ids[:count])
        assert len(printed) >= len(reference.rstrip("\ufffd"))
    assert printed + stream.finish() == text


@byte_complete
def test_emoji_appears_with_its_last_byte_and_not_before(source):
    tokenizer = load(source)
    ids = tokenizer.encode("🦙", add_bos=False)
    assert len(ids) > 1
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in ids]
    assert parts[:-1] == [""] * (len(ids) - 1)
    assert parts[-1].strip() == "🦙"


def test_finish_returns_the_unfinished_character_once():
    stream = load(byte_fallback_json).stream()
    assert stream.push(3 + 0xE2) == ""
    assert (stream.finish(), stream.finish()) == ("\ufffd", "")


@byte_complete
def test_stream_does_not_decode_the_past_again(source, monkeypatch):
    tokenizer = load(source)
    longest = 0

    def join(pieces):
        nonlocal longest
        longest = max(longest, len(pieces))
        return Tokenizer.join(tokenizer, pieces)

    monkeypatch.setattr(tokenizer, "join", join)
    stream = tokenizer.stream()
    for token in [*tokenizer.encode("the lazy dog", add_bos=False), 3 + 0xE2, 3 + 0xFF] * 200:
        stream.push(token)
    assert 0 < longest < 20
