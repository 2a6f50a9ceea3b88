"""Builds a `tokenizer.json` for the two kinds of BPE: of bytes (GPT-2) and of characters (SentencePiece)."""

import math
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers.pre_tokenizers import PreTokenizer

from mpillama.errors import UserError
from mpillama.text.tokenizer import BYTE_LEVEL
from mpillama.text.vocabulary import MOST_ADDED_TOKENS, MOST_SPLITS, VocabularyValues

SPACE = "▁"
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]

VISIBLE = {byte: character for character, byte in BYTE_LEVEL.items()}
"""GPT-2's visible character for every byte."""

Merges = list[tuple[str, str]]


def byte_level_json(
    ids: Mapping[str, int],
    merges: Merges,
    added: Iterable[AddedToken],
    pre_tokenizer: PreTokenizer,
    ignore_merges: bool = False,
) -> bytes:
    """BPE of bytes, written as GPT-2's visible characters; `added` tokens are in `ids` as well."""
    tokenizer = tokenizers.Tokenizer(models.BPE(dict(ids), merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer, added)


def sentencepiece_json(
    ids: Mapping[str, int],
    merges: Merges,
    added: Iterable[AddedToken],
    *,
    unknown: str | None,
    space_prefix: bool,
) -> bytes:
    """BPE of characters with ▁ for the space and a token for every byte of a character that has none."""
    model = models.BPE(dict(ids), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    prefix = [normalizers.Prepend(SPACE)] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = sentencepiece_decoder(space_prefix)
    return finished(tokenizer, added)


def sentencepiece_decoder(space_prefix: bool) -> decoders.Decoder:
    """▁ to the space, tokens of bytes to characters; a text that had a space put before it loses that."""
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def merges_by_score(ids: Mapping[str, int], scores: Sequence[float], mergeable: Container[int]) -> Merges:
    """Every way to put a mergeable token together from two others, the highest score first.

    As transformers orders them: of two ways to the same token, the one with the longer left part first. SentencePiece
    takes the leftmost instead, which differs only where both overlap, as in a-aba-ba.
    """
    if sum(len(token) ** 2 for token in ids) > MOST_SPLITS:
        raise UserError("The tokenizer has tokens of absurd length; download or convert the model again.")
    parts = {token: index for token, index in ids.items() if index in mergeable}
    ways = [
        (scores[index], len(left), len(right), left, right)
        for token, index in parts.items()
        if scores[index] > -math.inf
        for left, right in _splits(token)
        if left in parts and right in parts
    ]
    # The texts are no part of the order: ways that agree in all else stay as the ids have them.
    ways.sort(key=lambda way: way[:3], reverse=True)
    return [way[3:] for way in ways]


def unique_ids(tokens: Sequence[str], values: VocabularyValues) -> dict[str, int]:
    """Id by token; UserError if two tokens are the same."""
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        index, token = next((i, token) for i, token in enumerate(tokens) if ids[token] != i)
        raise values.refuse(f"has {token!r:.40} twice, as {index} and {ids[token]}")
    return ids


def added_tokens(
    special: Mapping[str, bool], values: VocabularyValues, strip: Collection[str] = ()
) -> list[AddedToken]:
    """Tokens that are looked for in the text before all else; `special` tells which are control tokens.

    Those in `strip` take the white space behind them along.
    """
    if len(special) > MOST_ADDED_TOKENS:
        raise values.refuse(f"has {len(special)} special tokens")
    return [
        AddedToken(token, normalized=False, special=control, rstrip=token in strip)
        for token, control in special.items()
    ]


def _splits(token: str) -> Iterator[tuple[str, str]]:
    return ((token[:at], token[at:]) for at in range(1, len(token)))


def finished(tokenizer: tokenizers.Tokenizer, added: Iterable[AddedToken]) -> bytes:
    """The `tokenizer.json`, with the tokens that are looked for in the text first."""
    tokenizer.add_tokens(list(added))
    return tokenizer.to_str().encode()
