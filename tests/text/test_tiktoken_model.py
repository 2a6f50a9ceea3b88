"""Ranks of byte-level BPE become the tokenizer that merges by them."""

import base64
import json
from itertools import pairwise

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, trainers

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint
from mpillama.loading.model_file import with_tokenizer
from mpillama.text.pre_tokenizers import PRE_TOKENIZERS
from mpillama.text.tiktoken_model import RESERVED, tokenizer_json_of_tiktoken
from mpillama.text.tokenizer import BYTE_LEVEL, Tokenizer

TEXTS = [
    "Once upon a time a llama waited; it WasPatient, it'll wait: 12345 nights!\n\n",
    "等一等, the 中文words and Straße, naïve\u0301 — don't  stop\r\n  \t🙂🙃",
    'aaaaaaa aaaa aa HelloWorld helloWORLD 3.14159 {"a": [1, 22, 333]}',
]


def ranks() -> list[bytes]:
    """Bytes first, then what was merged, in that order."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = PRE_TOKENIZERS["kimi-k2"].build()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        TEXTS * 2, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    vocabulary = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return [bytes(BYTE_LEVEL[char] for char in token) for token, _ in vocabulary]


def written(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))


def merged(word: bytes, rank: dict[bytes, int]) -> list[int]:
    """Of all neighbours those with the lowest rank first; a word that is a token is one."""
    parts = [word] if word in rank else [word[i : i + 1] for i in range(len(word))]
    while True:
        found = [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]
        if not found:
            return [rank[part] for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("text", TEXTS)
def test_neighbours_are_merged_by_rank(text):
    tokens = ranks()
    made = tokenizer_json_of_tiktoken(written(tokens), "tiktoken.model", {})
    tokenizer = Tokenizer(made, bos_token_id=None, eos_token_ids=(), add_bos=False)
    rank = {token: i for i, token in enumerate(tokens)}
    words = [word for word, _ in PRE_TOKENIZERS["kimi-k2"].build().pre_tokenize_str(text)]
    expected = [i for word in words for i in merged(bytes(BYTE_LEVEL[char] for char in word), rank)]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text


def test_words_are_cut_at_han_and_inside_camel_case():
    cut = PRE_TOKENIZERS["kimi-k2"].build().pre_tokenize_str("HelloWorld 中文ABc it'll 12345")
    assert ["".join(chr(BYTE_LEVEL[c]) for c in word).encode("latin-1").decode() for word, _ in cut] == [
        "Hello", "World", " ", "中文", "ABc", " it'll", " ", "123", "45",
    ]  # fmt: skip


def test_special_tokens_follow_on_the_ranks():
    tokens = ranks()
    end = AddedToken("<|im_end|>", normalized=False, special=True)
    made = tokenizer_json_of_tiktoken(written(tokens), "tiktoken.model", {len(tokens) + 2: end, 5: end})
    tokenizer = Tokenizer(made, bos_token_id=None, eos_token_ids=(len(tokens) + 2,), add_bos=False)
    assert tokenizer.vocab_size == len(tokens) + RESERVED
    assert tokenizer.encode("a<|im_end|>")[-1] == len(tokens) + 2
    assert tokenizer.token(len(tokens) + 3) == f"<|reserved_token_{len(tokens) + 3}|>"


def test_a_folder_with_ranks_has_a_tokenizer():
    tokens = ranks()
    settings = {"added_tokens_decoder": {str(len(tokens)): {"content": "[BOS]", "special": True}}, "eos_token": "[EOS]"}
    texts = {"tiktoken.model": written(tokens), "tokenizer_config.json": json.dumps(settings).encode()}
    found = with_tokenizer(Checkpoint("folder", "hugging_face", {}, texts, (), (), {})).texts
    assert set(found) == {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads(found["tokenizer_config.json"]) == {"add_bos_token": False, **settings}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"YQ== 0\nYg== 2\n", "ranks are not"),
        (b"YQ== 0\nYQ== 1\n", "a token twice"),
        (b"YQ== 0\n", "lacks the token of a byte"),
        (b"Y? 0\n", "a line of it"),
        (b"YQ==\n", "a line of it"),
    ],
)
def test_damaged_ranks_are_told(content, what):
    with pytest.raises(UserError, match=what):
        tokenizer_json_of_tiktoken(content, "tiktoken.model", {})
