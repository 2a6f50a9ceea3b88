"""tokenizer_json_of_gguf against the tokenizers from which the metadata were made."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillama.errors import UserError
from mpillama.models.families import FAMILIES
from mpillama.text.gguf_vocabulary import tokenizer_json_of_gguf
from mpillama.text.pre_tokenizers import PRE_TOKENIZERS
from mpillama.text.tokenizer import Tokenizer

from .vocabularies import BEGIN, END, NASTY, USER, byte_level, gguf, gguf_sentencepiece, sentencepiece

# As in the models' own tokenizer.json, written out once more.
CONTRACTION, BLANKS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"
QWEN2 = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ORIGINALS = {
    "llama-bpe": byte_level((LLAMA3,), True),
    "qwen2": byte_level((QWEN2,), False),
    "gpt-2": byte_level((GPT2,), False),
    "smollm": byte_level((r"\p{N}", GPT2), False),
    "tekken": byte_level((TEKKEN,), True),
}
SMALL = {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "ab", "<e>"], "merges": ["a b"], "eos_token_id": 3}
PIECES = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"], "scores": [0.0, 0, 0, -2, -3, -1]}

every_pre = pytest.mark.parametrize("pre", ORIGINALS)


def load(metadata) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(tokenizer_json_of_gguf(metadata).tokenizer_json)


def assert_same(made: tokenizers.Tokenizer, original: tokenizers.Tokenizer, text: str) -> None:
    for literally in (True, False):
        made.encode_special_tokens = original.encode_special_tokens = literally
        ids = original.encode(text).ids
        assert made.encode(text).ids == ids
        assert made.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)
        assert made.decode(ids) == original.decode(ids)


@every_pre
@pytest.mark.parametrize("text", NASTY)
def test_byte_level(pre, text):
    assert_same(load(gguf(ORIGINALS[pre], model="gpt2", pre=pre)), ORIGINALS[pre], text)


@every_pre
@given(text=st.text(max_size=40) | st.text("aeE1 .'\n\t<|>é你\u0301🦙", max_size=40))
@settings(max_examples=40, deadline=None)
def test_byte_level_any_text(pre, text):
    assert_same(load(gguf(ORIGINALS[pre], model="gpt2", pre=pre)), ORIGINALS[pre], text)


@pytest.mark.parametrize("text", NASTY)
def test_sentencepiece(text):
    assert_same(load(gguf_sentencepiece()), sentencepiece(), text)


@given(text=st.text(max_size=40) | st.text("thequick brown▁<s>/é你🦙\n", max_size=40))
@settings(max_examples=60, deadline=None)
def test_sentencepiece_any_text(text):
    assert_same(load(gguf_sentencepiece()), sentencepiece(), text)


def test_sentencepiece_without_prefix():
    tokenizer = load(gguf_sentencepiece(add_space_prefix=False))
    for text in ("the dog", " the dog", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    with_prefix = load(gguf_sentencepiece())
    assert tokenizer.encode(" the dog").ids == with_prefix.encode("the dog").ids


def test_sentencepiece_without_types():
    metadata = gguf_sentencepiece()
    del metadata["token_type"], metadata["unknown_token_id"]
    for text in ("the dog <s> é 🦙", "<0x41>"):
        assert load(metadata).encode(text).ids == sentencepiece().encode(text).ids


def test_arrays_will_do():
    metadata = gguf_sentencepiece()
    arrays = {key: np.array(metadata[key], dtype) for key, dtype in (("scores", np.float32), ("token_type", np.int32))}
    assert tokenizer_json_of_gguf(metadata | arrays) == tokenizer_json_of_gguf(metadata)


def test_every_pre_tokenizer_is_a_valid_expression():
    assert {"llama3", "llama-v3", "deepseek-r1-qwen", "default"} <= set(PRE_TOKENIZERS)
    for text in NASTY:
        for pre_tokenizer in PRE_TOKENIZERS.values():
            pieces = pre_tokenizer.build().pre_tokenize_str(text)
            assert [span for _, span in pieces if span[0] == span[1]] == []
            assert sum(end - start for _, (start, end) in pieces) >= len(text)


def test_words_of_the_pre_tokenizers():
    def words(name, text):
        return [text[slice(*span)] for _, span in PRE_TOKENIZERS[name].build().pre_tokenize_str(text)]

    assert words("llama-bpe", "it'S 12345") == ["it", "'S", " ", "123", "45"]
    assert words("qwen2", "it'S 123") == ["it", "'S", " ", "1", "2", "3"]
    assert words("gpt-2", "it's 123\n\nx") == ["it", "'s", " 123", "\n", "\n", "x"]
    assert words("smollm", "a 12") == ["a", " ", "1", "2"]
    assert words("tekken", "don't HTTPServer") == ["don", "'t", " HTTPServer"]
    assert words("gpt-4o", "don't 2024") == ["don't", " ", "202", "4"]
    assert words("deepseek-v3", "1234你好 x") == ["123", "4", "你好", " x"]
    assert words("default", "a+b 1234") == ["a", "+", "b", " ", "123", "4"]

    assert words("deepseek-llm", "It's 12345 你好,\n x") == ["It", "'", "s", " ", "12345", " ", "你好", ",", "\n", " x"]
    assert words("deepseek-llm", "ÀΩ ώж ª  ") == ["ÀΩ", " ώж", " ª", "  "]
    assert words("viking", "Hei, maailma 123") == ["Hei", ",", " maailma", " ", "1", "2", "3"]
    assert words("poro-chat", "Hei, 123") == ["Hei", ",", " 123"]
    assert words("falcon", "a+b 12345") == ["a", "+", "b", " ", "123", "45"]
    assert words("minicpm5", "it's 1234") == ["it", "'s", " ", "123", "4"]
    assert words("tiny_aya", "1234567 don't") == ["1", "234", "567", " don't"]
    assert words("youtu", "안녕 12 don't你好") == ["안녕", " ", "1", "2", " don't", "你好"]
    assert words("ufakzeka", "Ali'nin 12") == ["Ali", "'nin", " ", "1", "2"]
    assert words("laguna", "a\n\nb c") == ["a", "\n\n", "b", " c"]
    assert words("exaone-moe", "how are you 12?") == ["how are you", " ", "1", "2", "?"]
    assert words("jais-2", "a     b") == ["a", "    ", " b"]


@pytest.mark.parametrize(
    ("tokens", "architecture", "name"),
    [
        (["<|begin_of_text|>", "<|eot_id|>"], "llama", "llama-bpe"),
        (["<|reserved_special_token_0|>", "<｜begin▁of▁sentence｜>"], "llama", "llama-bpe"),
        (["a"], "qwen2", "qwen2"),
        (["<｜begin▁of▁sentence｜>"], "qwen3_moe", "qwen2"),
        (["<｜begin▁of▁sentence｜>", *map(str, range(32_000))], "llama", "deepseek-coder"),
        (["<｜begin▁of▁sentence｜>", *map(str, range(102_000))], "llama", "deepseek-llm"),
        (["<｜begin▁of▁sentence｜>", *map(str, range(129_000))], "llama", "deepseek-v3"),
        (["[INST]"], "llama", "tekken"),
        (["<|im_start|>", "<repo_name>"], "llama", "smollm"),
        (["<|im_start|>"], "llama", "qwen2"),
        (["a"], "llama", "default"),
    ],
)
def test_rules_that_a_file_does_not_name_are_guessed(tokens, architecture, name, caplog):
    rules = FAMILIES[architecture].pre_tokenizer
    vocabulary = {"model": "gpt2", "tokens": tokens, "merges": [], "pre_of_family": rules}
    assert tokenizer_json_of_gguf(vocabulary) == tokenizer_json_of_gguf(vocabulary | {"pre": name})
    assert [name in record.message and "tokenizer.ggml.pre" in record.message for record in caplog.records] == [True]


def test_phi_3s_tokens_take_white_space_along():
    pieces = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "<|user|>", "▁", "a", "▁a"],
        "token_type": [2, 3, 3, 1, 1, 1],
    }
    plain, stripping = (load(pieces | {"scores": [0.0] * 6, "strips_of_family": strips}) for strips in (False, True))
    assert plain.encode("<|user|>  a").ids == [2, 3, 3, 5]
    assert stripping.encode("<|user|>  a").ids == stripping.encode("<|user|>a").ids == [2, 5]
    assert stripping.encode("<s> a").ids == plain.encode("<s> a").ids
    assert FAMILIES["phi3"].tokens_strip


@pytest.mark.parametrize("role", ["bos", "eos", "eot", "eom"])
@pytest.mark.parametrize("value", [4, -1, 2**32 - 1])
def test_roles_outside_the_vocabulary_are_ignored_with_one_warning(role, value, caplog):
    files = tokenizer_json_of_gguf(SMALL | {f"{role}_token_id": value})
    usual = tokenizer_json_of_gguf({k: v for k, v in SMALL.items() if k != f"{role}_token_id"})
    assert files == usual
    assert [f"{role}_token_id is {value}" in record.message for record in caplog.records] == [True]


def test_roles_of_pieces_outside_the_vocabulary_are_those_of_llama(caplog):
    files = tokenizer_json_of_gguf(PIECES | {"bos_token_id": 6, "eos_token_id": -1, "unknown_token_id": 7})
    assert files == tokenizer_json_of_gguf(PIECES)
    assert len(caplog.records) == 3


def test_pieces_without_scores_are_taken_in_their_order(caplog):
    metadata = gguf_sentencepiece()
    del metadata["scores"]
    for text in NASTY:
        assert load(metadata).encode(text).ids == load(gguf_sentencepiece()).encode(text).ids
    assert all("no scores" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("changes", "bos", "eos", "add_bos"),
    [
        ({}, None, (3,), False),
        ({"bos_token_id": 0}, 0, (3,), False),
        ({"bos_token_id": 0, "pre": "llama-bpe"}, 0, (3,), True),
        ({"bos_token_id": 0, "pre": "tekken"}, 0, (3,), True),
        ({"bos_token_id": 0, "pre": "llama-bpe", "add_bos_token": False}, 0, (3,), False),
        ({"bos_token_id": 0, "add_bos_token": True}, 0, (3,), True),
        ({"pre": "llama-bpe"}, None, (3,), False),
        ({"eot_token_id": 2, "eom_token_id": 3}, None, (3, 2), False),
        (
            {"tokens": ["a", "b", "ab", "<|im_end|>"], "eos_token_id": 2, "token_type": [1, 1, 1, 3]},
            None,
            (2, 3),
            False,
        ),
        ({"tokens": ["a", "b", "ab", "<|im_end|>"], "eos_token_id": 2, "token_type": [1, 1, 1, 1]}, None, (2,), False),
        (
            {
                "tokens": ["a", "b", "ab", "<|end|>", "<|call|>", "<|return|>"],
                "eos_token_id": 5,
                "token_type": [1, 1, 1, 3, 3, 3],
            },
            None,
            (5, 4),
            False,
        ),
    ],
)
def test_roles(changes, bos, eos, add_bos):
    files = tokenizer_json_of_gguf(SMALL | changes)
    assert (files.bos_token_id, files.eos_token_ids, files.add_bos) == (bos, eos, add_bos)


def test_roles_of_sentencepiece():
    files = tokenizer_json_of_gguf(PIECES)
    assert (files.bos_token_id, files.eos_token_ids, files.add_bos) == (1, (2,), True)
    files = tokenizer_json_of_gguf(PIECES | {"bos_token_id": 4, "eos_token_id": 5, "add_bos_token": False})
    assert (files.bos_token_id, files.eos_token_ids, files.add_bos) == (4, (5,), False)


def test_special_and_user_defined_tokens():
    original = ORIGINALS["llama-bpe"]
    bos, end = original.token_to_id(BEGIN), original.token_to_id(END)
    files = tokenizer_json_of_gguf(gguf(original, model="gpt2", pre="llama-bpe", bos_token_id=bos, eos_token_id=end))
    tokenizer = Tokenizer(
        files.tokenizer_json,
        bos_token_id=files.bos_token_id,
        eos_token_ids=files.eos_token_ids,
        add_bos=files.add_bos,
    )
    ids = tokenizer.encode(f"hi{END}{USER}")
    assert (ids[0], ids[-2], tokenizer.decode(ids)) == (bos, end, f"hi{USER}")
    assert end not in tokenizer.encode(f"hi{END}", parse_special=False)


def test_empty_tokens_get_a_name():
    assert load(SMALL | {"tokens": ["a", "b", "ab", "<e>", "", ""]}).id_to_token(5) == "[EMPTY_5]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "bert"),
        ({"model": None}, "missing"),
        ({"model": 3}, "model"),
        ({"pre": "nobody-knows"}, "nobody-knows"),
        ({"pre": ["qwen2"]}, "pre"),
        ({"tokens": None}, "tokens"),
        ({"tokens": []}, "tokens"),
        ({"tokens": "abc"}, "tokens"),
        ({"tokens": 10**9}, "tokens"),
        ({"tokens": ["a", 1, "ab", "c"]}, "tokens"),
        ({"tokens": ["a", "\ud800", "ab", "c"]}, "tokens"),
        ({"tokens": ["a", "b", "ab", "a"]}, "twice, as 0 and 3"),
        ({"token_type": [1, 1, 1]}, "3 token_type"),
        ({"token_type": [1, 1, 1, "x"]}, "token_type"),
        ({"merges": None}, "merges"),
        ({"merges": ["a c"]}, "a c"),
        ({"merges": ["b a"]}, "b a"),
        ({"merges": ["ab"]}, "ab"),
        ({"merges": [""]}, "merges"),
        ({"merges": [3]}, "merges"),
        ({"eot_token_id": 1.0}, "eot_token_id"),
        ({"add_bos_token": "yes"}, "add_bos_token"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError) as caught:
        tokenizer_json_of_gguf(SMALL | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "6 tokens, but 1 scores"),
        ({"scores": [0.0] * 5 + ["high"]}, "scores"),
        ({"scores": [0] * 5 + [10**400]}, "scores"),
        ({"tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab" * 20_000]}, "absurd"),
        ({"unknown_token_id": "six"}, "unknown_token_id"),
        ({"add_space_prefix": 2}, "add_space_prefix"),
    ],
)
def test_refused_pieces(changes, message):
    with pytest.raises(UserError) as caught:
        tokenizer_json_of_gguf(PIECES | changes)
    assert message in str(caught.value)


def test_all_tokens_special():
    tokens = [f"<{index}>" for index in range(30_000)]
    with pytest.raises(UserError, match="30000 special tokens"):
        tokenizer_json_of_gguf({"model": "gpt2", "tokens": tokens, "token_type": [3] * 30_000, "merges": []})


junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
words = st.text("ab<>▁\ud800 ", max_size=4)
values = junk | st.lists(words | st.integers(-1, 7) | st.floats() | junk, max_size=7)
KEYS = "tokens scores token_type merges pre bos_token_id eos_token_id unknown_token_id add_bos_token add_space_prefix"


@given(
    vocabulary=st.fixed_dictionaries(
        {"model": st.sampled_from(["gpt2", "llama"])}, optional=dict.fromkeys(KEYS.split(), values)
    ),
    whole=st.sampled_from([{}, SMALL, PIECES]),
)
@settings(max_examples=400, deadline=None)
def test_hostile_metadata(vocabulary, whole):
    try:
        files = tokenizer_json_of_gguf(whole | vocabulary)
    except UserError:
        return
    Tokenizer(files.tokenizer_json, bos_token_id=None, eos_token_ids=(), add_bos=False).encode("ab <s> ▁b")
