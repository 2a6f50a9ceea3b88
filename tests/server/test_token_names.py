"""Names of tokens: joined they are the text, and text_offset is where they stand, whatever the tokenizer does."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillama.engine.answer import Answer, TokenLogprob
from mpillama.server.token_names import NamedToken, TokenNames, alternatives, prompt_logprobs
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import PART_OF_CHARACTER, Tokenizer
from tests.text import vocabularies

STORY = "A 🐫 said: “naïve”, 你好, e\u0301 \\x41 bytes: 👩‍👩‍👧‍👦"


def _tokenizer(kind: str) -> Tokenizer:
    if kind == "byte-level":
        library = vocabularies.byte_level((r"\p{N}{1,3}", r" ?\p{L}+"), False)
        begin, end = map(library.token_to_id, (vocabularies.BEGIN, vocabularies.END))
        json, ids = library.to_str(), {"bos_token_id": begin, "eos_token_ids": (end,)}
    else:
        json, ids = vocabularies.sentencepiece().to_str(), {"bos_token_id": 1, "eos_token_ids": (2,)}
    return Tokenizer(json.encode(), add_bos=True, **ids)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request) -> Tokenizer:
    return _tokenizer(request.param)


def found(token: int) -> TokenLogprob:
    return TokenLogprob(token, -1.0, [(token, -1.0)], 1)


def data_of(token: NamedToken) -> bytes:
    """What a name stands for."""
    if not token.is_part:
        return token.name.encode()
    return ast.literal_eval(f'b"{token.name.removeprefix(PART_OF_CHARACTER)}"'.replace('"""', '"\\""'))


def joined(tokens: list[NamedToken]) -> str:
    return b"".join(map(data_of, tokens)).decode(errors="replace")


def answered(tokenizer: Tokenizer, ids: list[int], stops=(), after=(), keep_special=False):
    """The answer of these tokens, and their names as a stream gives them."""
    answer = Answer(tokenizer, SamplingParams(max_tokens=len(ids), stop=stops), keep_special, after=after)
    names, given = TokenNames(tokenizer, keep_special, after), []
    for token in ids:
        text = answer.push(token, 1)
        new = names.push([found(token)], text, answer.finish_reason is not None)
        assert all(one.end <= len(answer.text) or answer.finish_reason for one in new), "a name comes with its text"
        given += new
        if answer.finish_reason:
            break
    return answer.text, given


def test_joined_names_are_the_text(tokenizer):
    text, names = answered(tokenizer, tokenizer.encode(STORY, add_bos=False))
    assert text == STORY == joined(names)
    assert any(one.is_part for one in names)
    for one in names:
        assert one.is_part or STORY[one.start :].startswith(one.name)


def test_parts_of_a_character_stand_where_it_stands(tokenizer):
    ids = tokenizer.encode("ab🐫c", add_bos=False)
    _, names = answered(tokenizer, ids)
    parts = [one for one in names if one.is_part]
    assert "".join(one.name.removeprefix(PART_OF_CHARACTER) for one in parts) == r"\xf0\x9f\x90\xab"
    assert {one.start for one in parts} == {2}
    assert names[-1] == NamedToken(ids[-1], "c", 3, 4, found=found(ids[-1]))


def test_a_name_has_no_letters_of_gpt2(tokenizer):
    for token in range(tokenizer.vocab_size):
        name = tokenizer.token_text(token)
        assert name.startswith(PART_OF_CHARACTER) == tokenizer.is_part(token)
        assert not tokenizer.is_part(token) or name.isascii()
        assert "\ufffd" not in name
    assert tokenizer.token_text(tokenizer.encode("x the", add_bos=False)[1])[0] == " "


def test_what_the_text_does_not_show_has_no_name(tokenizer):
    ids = [*tokenizer.encode("Well said.", add_bos=False), tokenizer.eos_token_ids[0]]
    text, names = answered(tokenizer, ids)
    assert text == "Well said." == joined(names)
    assert (names[-1].token, names[-1].name, names[-1].start) == (tokenizer.eos_token_ids[0], "", 10)
    assert alternatives(tokenizer, names[-1])[0][1] == tokenizer.eos_token


@pytest.mark.parametrize("stop", ["said", "ll sa", " ", "."])
def test_names_end_with_the_text_at_a_stop_string(tokenizer, stop):
    text, names = answered(tokenizer, tokenizer.encode("Well said. And done", add_bos=False), [stop])
    assert text == "Well said. And done".split(stop)[0] == joined(names)
    assert all(one.start <= len(text) for one in names)


def test_an_answer_goes_on_with_the_space_of_its_first_word(tokenizer):
    """After a prompt it is there; at the beginning of a message some decoders take it away, from the name as well."""
    prompt, rest = tokenizer.encode("Once upon"), tokenizer.encode("x the dog", add_bos=False)
    rest = rest[next(i for i, one in enumerate(rest) if i and tokenizer.token_text(one)[0] == " ") :]
    text, names = answered(tokenizer, rest, after=prompt)
    assert text == " the dog" == joined(names)
    text, names = answered(tokenizer, rest)
    assert text.lstrip() == "the dog"
    assert joined(names) == text
    assert alternatives(tokenizer, names[0])[0][1] == names[0].name


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_tokens_add_up(data):
    tokenizer = _tokenizer(data.draw(st.sampled_from(["byte-level", "sentencepiece"])))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), min_size=1, max_size=30))
    text, names = answered(
        tokenizer, ids, data.draw(st.sampled_from([(), ("e",)])), keep_special=data.draw(st.booleans())
    )
    assert "".join(one.name for one in names if not one.is_part) in text or any(one.is_part for one in names)
    if not any(one.is_part for one in names):
        assert joined(names) == text
    assert [one.start for one in names] == sorted(one.start for one in names)
    for one in names:
        assert one.is_part or text[one.start :].startswith(one.name)


def test_a_prompt_is_told_in_the_form_of_vllm(tokenizer):
    a, b, c = tokenizer.encode("x the dog", add_bos=False)[-3:]
    told = prompt_logprobs(tokenizer, [TokenLogprob(b, -3.0, [(a, -0.5), (c, float("-inf"))], 7)], 2)
    assert told[0] is None
    assert told[1] == {
        str(b): {"logprob": -3.0, "rank": 7, "decoded_token": tokenizer.token_text(b)},
        str(a): {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_text(a)},
        str(c): {"logprob": -9999.0, "rank": 2, "decoded_token": tokenizer.token_text(c)},
    }
