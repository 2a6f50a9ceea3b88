"""tokenizer_json_of_dllama against the greedy merging of distributed-llama, written out here, and the originals."""

from functools import cache
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillama.errors import UserError
from mpillama.text.dllama_vocabulary import tokenizer_json_of_dllama
from mpillama.text.tokenizer import Tokenizer

from .vocabularies import BEGIN, END, NASTY, USER, byte_level, dllama_byte_level, dllama_sentencepiece, sentencepiece

ORIGINAL = byte_level((r"\s*\S+",), False)
SMALL = {"tokens": ["a", "b", "c", "ab", "<s>", "</s>"], "scores": [0.0, -1, -2, -3, -4, -5], "bos": 4, "eos": [5]}
SMALL |= {"add_bos": True, "regular_vocab_size": 4}


@cache
def made() -> tokenizers.Tokenizer:
    return load(dllama_byte_level(ORIGINAL))


def load(vocabulary) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(tokenizer_json_of_dllama(vocabulary).tokenizer_json)


@cache
def regular_tokens() -> tuple[dict[bytes, int], list[float]]:
    vocabulary = dllama_byte_level(ORIGINAL)
    regular = vocabulary["tokens"][: vocabulary["regular_vocab_size"]]
    return {token.encode("latin-1"): index for index, token in enumerate(regular)}, vocabulary["scores"]


def greedy(text: str) -> list[int]:
    """Join the two neighbours whose token has the highest score, the leftmost of equals, until none are left."""
    ids, scores = regular_tokens()
    tokens = [bytes([byte]) for byte in text.encode()]
    while True:
        ways = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(tokens)) if a + b in ids]
        if not ways:
            return [ids[token] for token in tokens]
        at = -max(ways)[1]
        tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]


@pytest.mark.parametrize("text", [text for text in NASTY if "<|" not in text])
def test_merges_as_distributed_llama(text):
    assert made().encode(text).ids == greedy(text)
    assert made().decode(greedy(text)) == text


@given(text=st.text(max_size=40) | st.text("theqandx 1.'\n\té你\u0301🦙", max_size=60))
@settings(max_examples=100, deadline=None)
def test_merges_any_text(text):
    assert made().encode(text).ids == greedy(text)
    assert made().decode(greedy(text)) == text


@pytest.mark.parametrize("text", ["word", " word", "你好世界", "🦙"])
def test_one_word_is_encoded_as_by_the_original(text):
    assert made().encode(text).ids == ORIGINAL.encode(text).ids


def test_tokens_from_bos_on_are_special():
    text = f"hi{END}you{USER}"
    ids = made().encode(text).ids
    assert [ORIGINAL.token_to_id(END), ORIGINAL.token_to_id(USER)] == [i for i in ids if i >= regular_count()]
    assert made().decode(ids) == "hiyou"
    assert made().decode(ids, skip_special_tokens=False) == text


def regular_count() -> int:
    return ORIGINAL.token_to_id(BEGIN)


def test_roles():
    files = tokenizer_json_of_dllama(dllama_byte_level(ORIGINAL))
    assert (files.bos_token_id, files.eos_token_ids) == (regular_count(), (regular_count() + 1,))
    assert files.add_bos
    tokenizer = Tokenizer(
        files.tokenizer_json, bos_token_id=files.bos_token_id, eos_token_ids=files.eos_token_ids, add_bos=True
    )
    assert tokenizer.encode("hi") == [regular_count(), *greedy("hi")]


@pytest.mark.parametrize("text", [text for text in NASTY if "<|" not in text])
def test_sentencepiece_as_the_original(text):
    tokenizer = load(dllama_sentencepiece())
    ids = sentencepiece().encode(text).ids
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == sentencepiece().decode(ids)


def test_sentencepiece_written_from_a_tokenizer_json():
    """The converter leaves ▁ and <0xNN> as they are then."""
    vocabulary = dllama_sentencepiece()
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = vocabulary["tokens"][:3] + names + vocabulary["tokens"][259:]
    tokens[259:] = [token.replace(" ", "▁".encode().decode("latin-1")) for token in tokens[259:]]
    for text in ("the quick dog", "é 🦙\n", "</s>"):
        assert load(vocabulary | {"tokens": tokens}).encode(text).ids == sentencepiece().encode(text).ids


def test_sentencepiece_keeps_added_tokens_apart():
    vocabulary = dllama_sentencepiece()
    count = len(vocabulary["tokens"])
    vocabulary["tokens"] += ["<|bos|>", "<|eos|>"]
    vocabulary["scores"] += [0.0, 0.0]
    tokenizer = load(vocabulary | {"bos": count, "eos": [count + 1], "regular_vocab_size": count})
    assert tokenizer.encode("<|bos|>the<|eos|>").ids[0] == count
    assert tokenizer.decode([count, count + 1]) == ""


def test_tokens_without_a_score_are_not_merged():
    for score in (-2e10, float("-inf"), float("nan")):
        assert load(SMALL | {"scores": [0.0, 0, 0, score, 0, 0]}).encode("ab").ids == [0, 1]
    assert load(SMALL).encode("ab<s>c").ids == [3, 4, 2]


def test_without_bos():
    files = tokenizer_json_of_dllama(SMALL | {"bos": -1, "regular_vocab_size": -1, "eos": []})
    assert (files.bos_token_id, files.eos_token_ids, files.add_bos) == (None, (), False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "no tokens"),
        ({"tokens": None}, "tokens"),
        ({"tokens": 10**9}, "tokens"),
        ({"tokens": ["a", "b", "c", "ab", "<s>", 5]}, "tokens"),
        ({"tokens": ["a", "b", "c", "ab", "<s>", "你"]}, "no bytes"),
        ({"tokens": ["a", "b", "c", "ab", "<s>", "\xff"]}, "not UTF-8"),
        ({"tokens": ["a", "b", "c", "a", "<s>", "</s>"]}, "'a' twice, as 0 and 3"),
        ({"tokens": ["a", "b", "c", "ab" * 20_000, "<s>", "</s>"]}, "absurd"),
        ({"scores": [0.0] * 5}, "6 tokens, but 5 scores"),
        ({"scores": ["x"] * 6}, "scores"),
        ({"bos": 6}, "bos is 6"),
        ({"bos": 10**9}, "bos"),
        ({"bos": "4"}, "bos"),
        ({"eos": [6]}, "eos is 6"),
        ({"eos": [-1]}, "eos is -1"),
        ({"eos": 5}, "eos"),
        ({"add_bos": 1}, "add_bos"),
        ({"regular_vocab_size": 7}, "regular_vocab_size"),
        ({"regular_vocab_size": -1}, "regular_vocab_size"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError) as caught:
        tokenizer_json_of_dllama(SMALL | changes)
    assert message in str(caught.value)


junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
words = st.text("ab<>\xff你\ud800 ", max_size=4)
values = junk | st.lists(words | st.integers(-1, 7) | st.floats() | junk, max_size=7)


@given(changes=st.fixed_dictionaries({}, optional=dict.fromkeys(SMALL, values)), whole=st.sampled_from([{}, SMALL]))
@settings(max_examples=400, deadline=None)
def test_hostile_file(changes, whole):
    try:
        files = tokenizer_json_of_dllama(whole | changes)
    except UserError:
        return
    Tokenizer(files.tokenizer_json, bos_token_id=None, eos_token_ids=(), add_bos=False).encode("ab <s> b")
