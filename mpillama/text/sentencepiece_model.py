"""A SentencePiece model (`tokenizer.model`) as a Hugging Face `tokenizer.json`.

The file is a protobuf message, of which a few fields are wanted:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, normalizers
from tokenizers.normalizers import Normalizer

from mpillama.errors import UserError
from mpillama.text.bpe import BYTE_NAMES, SPACE, finished, merges_by_score, sentencepiece_decoder
from mpillama.text.vocabulary import MOST_ADDED_TOKENS, PieceKind, TokenizerFiles

UNIGRAM, BPE = 1, 2
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")

NAMED_RULES = ("nfkc", "nmt_nfkc")
"""Tables of characters that are NFKC but for blanks; the library applies a table to graphemes, and so loses accents."""
BLANKS = [*range(0x21), *range(0x7F, 0xA1), 0x1680, *range(0x2000, 0x2070), 0x2581, 0x3000, 0xFEFF, 0xFFFD]

Fields = Mapping[int, list[bytes | int]]


@dataclass(frozen=True)
class Pieces:
    names: list[str]
    scores: list[float]
    kinds: list[int]
    kind: int
    bos: int
    eos: int
    rule: str
    charsmap: bytes
    dummy_prefix: bool
    one_space: bool


def tokenizer_json_of_sentencepiece(content: bytes, path: str, added: Mapping[int, AddedToken]) -> TokenizerFiles:
    """`added` are tokens by id which the files beside it name; those that follow the pieces are taken. UserError."""
    pieces = _pieces(content, path)
    ids = {name: index for index, name in enumerate(pieces.names)}
    if len(ids) < len(pieces.names):
        raise _damaged(path, "it has a piece twice")
    unknown = next((index for index, kind in enumerate(pieces.kinds) if kind == PieceKind.UNKNOWN), None)
    if unknown is None:
        raise _damaged(path, "it has no piece for what is unknown")
    tokenizer = tokenizers.Tokenizer(_model(pieces, ids, unknown))
    tokenizer.normalizer = normalizers.Sequence(list(_normalizers(pieces, path)))
    tokenizer.decoder = sentencepiece_decoder(pieces.dummy_prefix)
    bos, eos = (index if 0 <= index < len(ids) else None for index in (pieces.bos, pieces.eos))
    tokens = [*_own_added(pieces, path), *_following(added, len(ids))]
    return TokenizerFiles(finished(tokenizer, tokens), bos, () if eos is None else (eos,), bos is not None)


def added_by_id(by_name: Mapping[str, Any], decoder: Any) -> dict[int, AddedToken]:
    """The tokens of an added_tokens.json, and of tokenizer_config.json's added_tokens_decoder, which tells more."""
    found = {
        index: AddedToken(name, normalized=False, special=True)
        for name, index in by_name.items()
        if isinstance(index, int) and name
    }
    for index, token in decoder.items() if isinstance(decoder, Mapping) else ():
        if index.isdecimal() and isinstance(token, Mapping) and isinstance(token.get("content"), str):
            is_special = token.get("special") is not False
            found[int(index)] = AddedToken(token["content"], normalized=False, special=is_special)
    return found


def _model(pieces: Pieces, ids: dict[str, int], unknown: int) -> models.Model:
    has_bytes = ids.keys() >= set(BYTE_NAMES)
    if pieces.kind == UNIGRAM:
        # The names of bytes are no text: with such a score another way to write them is always better.
        lowest = min(pieces.scores) - 1e6
        known = zip(pieces.names, pieces.scores, pieces.kinds, strict=True)
        scored = [(name, lowest if kind == PieceKind.BYTE else score) for name, score, kind in known]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=has_bytes)
    mergeable = {index for index, kind in enumerate(pieces.kinds) if kind in (PieceKind.NORMAL, PieceKind.UNUSED)}
    merges = merges_by_score(ids, pieces.scores, mergeable)
    return models.BPE(ids, merges, unk_token=pieces.names[unknown], fuse_unk=True, byte_fallback=has_bytes)


def _normalizers(pieces: Pieces, path: str) -> Iterator[Normalizer]:
    if pieces.charsmap:
        try:
            table = normalizers.Precompiled(pieces.charsmap)
        except Exception as error:  # the library's own panics are of no narrower kind
            raise _damaged(path, f"its table of characters cannot be read ({error})") from error
        yield from _nfkc(table) if pieces.rule in NAMED_RULES else [table]
    if pieces.one_space:
        yield normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    if pieces.dummy_prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)


def _nfkc(table: Normalizer) -> Iterator[Normalizer]:
    """NFKC, and before it what a table does with blanks and invisible characters."""
    for becomes in ("", " "):
        found = [f"\\x{{{code:04X}}}" for code in BLANKS if table.normalize_str(chr(code)) == becomes != chr(code)]
        if found:
            yield normalizers.Replace(tokenizers.Regex(f"[{''.join(found)}]"), becomes)
    yield normalizers.NFKC()


def _own_added(pieces: Pieces, path: str) -> list[AddedToken]:
    """The pieces that are looked for in the text before all else."""
    special = [
        AddedToken(name, normalized=False, special=kind != PieceKind.USER_DEFINED)
        for name, kind in zip(pieces.names, pieces.kinds, strict=True)
        if kind in (PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.USER_DEFINED)
    ]
    if len(special) > MOST_ADDED_TOKENS:
        raise _damaged(path, f"it has {len(special)} special tokens")
    return special


def _following(added: Mapping[int, AddedToken], size: int) -> Iterator[AddedToken]:
    """The added tokens whose ids go on where the pieces end."""
    while size in added:
        yield added[size]
        size += 1


# -- the file -------------------------------------------------------------------------------------------------------


def _pieces(content: bytes, path: str) -> Pieces:
    if TIKTOKEN.match(content):
        raise UserError(
            f"{path}: a vocabulary of tiktoken, whose rules for cutting words are not in it: "
            "put the model's tokenizer.json beside it."
        )
    try:
        whole = _fields(content)
        pieces = [_fields(_bytes(piece)) for piece in whole.get(1, [])]
        trainer, normalizer = (_fields(_bytes(whole.get(n, [b""])[-1])) for n in (2, 3))
        found = Pieces(
            names=[_bytes(piece[1][-1]).decode() for piece in pieces],
            scores=[_float(piece) for piece in pieces],
            kinds=[_int(piece, 3, PieceKind.NORMAL) for piece in pieces],
            kind=_int(trainer, 3, UNIGRAM),
            bos=_int(trainer, 41, 1),
            eos=_int(trainer, 42, 2),
            rule=_bytes(normalizer.get(1, [b""])[-1]).decode(),
            charsmap=_bytes(normalizer.get(2, [b""])[-1]),
            dummy_prefix=bool(_int(normalizer, 3, 1)),
            one_space=bool(_int(normalizer, 4, 1)),
        )
    except (ValueError, LookupError, struct.error) as error:
        raise _damaged(path, str(error) or "it ends too early") from error
    if not found.names or not all(found.names):
        raise _damaged(path, "it has no pieces, or an empty one")
    if found.kind not in (UNIGRAM, BPE):
        raise UserError(f"{path}: its pieces are words or characters: mpillama reads SentencePiece's BPE and Unigram.")
    return found


def _fields(message: bytes) -> Fields:
    """A message's fields by number; ValueError or IndexError if it is none."""
    fields: dict[int, list[bytes | int]] = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(message, at)
            fields.setdefault(key >> 3, []).append(value)
            continue
        if wire not in (EIGHT_BYTES, LENGTH, FOUR_BYTES):
            raise ValueError(f"it has the unknown kind of field {wire}")
        size, at = _varint(message, at) if wire == LENGTH else ({EIGHT_BYTES: 8, FOUR_BYTES: 4}[wire], at)
        if at + size > len(message):
            raise ValueError("it ends too early")
        fields.setdefault(key >> 3, []).append(message[at : at + size])
        at += size
    return fields


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number and the place after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("it has a number that is too long")


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("it has a number in place of a text")
    return value


def _int(fields: Fields, number: int, default: int) -> int:
    """A number, negative ones in two's complement."""
    value = fields.get(number, [default])[-1]
    if not isinstance(value, int):
        raise ValueError("it has a text in place of a number")
    return value - (1 << 64) if value >= 1 << 63 else value


def _float(piece: Fields) -> float:
    value: float = struct.unpack("<f", _bytes(piece[2][-1]))[0] if 2 in piece else 0.0
    return -math.inf if math.isnan(value) else value


def _damaged(path: str, problem: str) -> UserError:
    return UserError(f"{path}: no SentencePiece model that can be read: {problem}. Download it again.")
