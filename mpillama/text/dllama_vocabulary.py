"""The vocabulary of a distributed-llama `.t` file as a Hugging Face `tokenizer.json`.

A `.t` file does not tell how the model's own tokenizer cuts text into words, so none of it is cut: ids are those of
distributed-llama, which may differ from the original's at the borders of words. Nor does it tell which of the added
tokens are control tokens; all are taken for such.
"""

import math
from collections.abc import Mapping
from typing import Any

from mpillama.text.bpe import (
    BYTE_NAMES,
    SPACE,
    VISIBLE,
    added_tokens,
    byte_level_json,
    merges_by_score,
    sentencepiece_json,
    unique_ids,
)
from mpillama.text.pre_tokenizers import byte_level
from mpillama.text.vocabulary import TokenizerFiles, VocabularyValues

LOWEST_SCORE = -1e10
"""Tokens with this score or less are never merged."""


def tokenizer_json_of_dllama(vocabulary: Mapping[str, Any]) -> TokenizerFiles:
    """`vocabulary` has tokens (bytes as Latin-1 text), scores, bos, eos, add_bos and regular_vocab_size.

    UserError if it cannot be used. A vocabulary that came from SentencePiece is encoded as SentencePiece does, with a
    space before the text; any other by joining bytes to the token of the highest score, again and again.
    """
    values = VocabularyValues(_without_negative_bos(vocabulary), "the .t file")
    bos = values.token_id("bos")
    ends = tuple(dict.fromkeys(values.checked_id(index, "eos") for index in values.items("eos")))
    tokens, scores = _raw_tokens(values), _scores(values)
    first_byte = _first_byte_token(tokens)
    if first_byte is None:
        content = _byte_level(values, tokens, scores)
    else:
        roles = {*ends, *([] if bos is None else [bos])}
        content = _sentencepiece(values, tokens, scores, first_byte, roles)
    return TokenizerFiles(content, bos, ends, values.flag("add_bos", False) and bos is not None)


def _without_negative_bos(vocabulary: Mapping[str, Any]) -> Mapping[str, Any]:
    """A file without BOS has -1 for it, and hence for the number of regular tokens."""
    bos = vocabulary.get("bos")
    if not isinstance(bos, int) or bos >= 0:
        return vocabulary
    return {**vocabulary, "bos": None, "regular_vocab_size": None}


def _raw_tokens(values: VocabularyValues) -> list[bytes]:
    try:
        return [token.encode("latin-1") for token in values.tokens]
    except UnicodeEncodeError as error:
        raise values.refuse("has tokens that are no bytes") from error


def _scores(values: VocabularyValues) -> list[float]:
    return [score if score > LOWEST_SCORE else -math.inf for score in values.numbers("scores")]


def _first_byte_token(tokens: list[bytes]) -> int | None:
    """Id of byte 0 if all bytes stand in a row, as in SentencePiece's vocabularies and no others."""
    for names in ([bytes([byte]) for byte in range(256)], [name.encode() for name in BYTE_NAMES]):
        starts = (index for index, token in enumerate(tokens) if token == names[0])
        found = next((start for start in starts if tokens[start : start + 256] == names), None)
        if found is not None:
            return found
    return None


def _byte_level(values: VocabularyValues, tokens: list[bytes], scores: list[float]) -> bytes:
    size = values.count("regular_vocab_size")
    names = ["".join(VISIBLE[byte] for byte in token) for token in tokens[:size]]
    special = [_text(values, token) for token in tokens[size:]]
    ids = unique_ids([*names, *special], values)
    added = added_tokens(dict.fromkeys(special, True), values)
    return byte_level_json(ids, merges_by_score(ids, scores, range(size)), added, byte_level())


def _sentencepiece(
    values: VocabularyValues, tokens: list[bytes], scores: list[float], first_byte: int, roles: set[int]
) -> bytes:
    """Undo what the converter did: spaces become ▁ again, and bytes <0xNN>."""
    bytes_end = first_byte + 256
    names = [_text(values, token).replace(" ", SPACE) for token in tokens[bytes_end:]]
    first_names = [_text(values, token) for token in tokens[:first_byte]]
    ids = unique_ids([*first_names, *BYTE_NAMES, *names], values)
    # distributed-llama takes all ids from BOS on for control tokens; with BOS before the bytes that means nothing.
    size = values.count("regular_vocab_size")
    control = {*range(first_byte), *roles, *(range(size, len(tokens)) if size >= bytes_end else ())}
    special = {token: True for token, index in ids.items() if index in control}
    mergeable = set(range(bytes_end, len(tokens))) - control
    merges, added = merges_by_score(ids, scores, mergeable), added_tokens(special, values)
    unknown = "<unk>" if "<unk>" in first_names else None
    return sentencepiece_json(ids, merges, added, unknown=unknown, space_prefix=True)


def _text(values: VocabularyValues, token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError as error:
        raise values.refuse(f"has the token {token!r:.40}, which is not UTF-8") from error
