"""The ranks of a byte-level BPE (`tiktoken.model`) as a Hugging Face `tokenizer.json`.

A line of the file is a token in base64 and its rank, which is its id as well: of all neighbours those are merged first
whose token has the lowest rank.
"""

import base64
import binascii
from collections.abc import Mapping

from tokenizers import AddedToken

from mpillama.errors import UserError
from mpillama.text.bpe import VISIBLE, byte_level_json, merges_by_score
from mpillama.text.pre_tokenizers import PRE_TOKENIZERS

RULES = "kimi-k2"
"""How words are cut; the file does not tell, and only Kimi's models come with one of this name."""
RESERVED = 256
"""Ids behind the ranks that are special tokens, whether the files beside it name them or not."""


def tokenizer_json_of_tiktoken(content: bytes, path: str, added: Mapping[int, AddedToken]) -> bytes:
    """`added` are special tokens by id, which the files beside it name; UserError for a file that cannot be read."""
    tokens = ["".join(VISIBLE[byte] for byte in token) for token in _tokens(content, path)]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise _damaged(path, "it has a token twice")
    if any(char not in ids for char in VISIBLE.values()):
        raise _damaged(path, "it lacks the token of a byte")
    merges = merges_by_score(ids, [-float(rank) for rank in range(len(tokens))], range(len(tokens)))
    unnamed = {i: AddedToken(f"<|reserved_token_{i}|>", normalized=False, special=True) for i in _behind(tokens)}
    special = {**unnamed, **{i: token for i, token in added.items() if i in unnamed}}
    return byte_level_json(ids, merges, special.values(), PRE_TOKENIZERS[RULES].build(), ignore_merges=True)


def _behind(tokens: list[str]) -> range:
    return range(len(tokens), len(tokens) + RESERVED)


def _tokens(content: bytes, path: str) -> list[bytes]:
    """The tokens in the order of their ranks, which leave no gap."""
    found: dict[int, bytes] = {}
    for line in content.splitlines():
        token, _, rank = line.partition(b" ")
        if not line:
            continue
        if not rank.isdigit() or len(rank) > 9:
            raise _damaged(path, f"a line of it is {line[:40]!r}")
        try:
            found[int(rank)] = base64.b64decode(token, validate=True)
        except binascii.Error as error:
            raise _damaged(path, f"a line of it is {line[:40]!r}") from error
    if sorted(found) != list(range(len(found))):
        raise _damaged(path, f"its {len(found)} ranks are not 0 to {len(found) - 1}")
    return [found[rank] for rank in range(len(found))]


def _damaged(path: str, problem: str) -> UserError:
    return UserError(f"{path}: no ranks of tiktoken that can be read: {problem}. Download it again.")
