"""The tokenizer file of distributed-llama (`.t`): pairs of int32, a chat template, and the tokens as raw bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpillama.errors import UserError
from mpillama.formats.foreign import Cursor, damaged

MAGIC, OLD_MAGIC = 0x567124, 0x567123
MAGICS = tuple(magic.to_bytes(4, "little") for magic in (MAGIC, OLD_MAGIC))
VERSION = 1
MOST_PAIRS = 1000
VOCABULARY = "dllama_vocabulary.json"
TEMPLATE = "chat_template.jinja"
KEYS = (
    *("version", "vocab_size", "max_token_length", "bos_id", "eos_id", "pad_id"),
    *("chat_eos_id", "chat_template", "chat_stop", "n_eos_tokens", "add_bos"),
)
"""The header's keys by their numbers; those of chat_template and chat_stop are followed by as many bytes."""


@dataclass(frozen=True)
class DllamaTokenizer:
    """What a tokenizer file holds; tokens from id `bos` on are special ones."""

    tokens: list[bytes]
    scores: list[float]
    bos: int | None
    eos: list[int]
    add_bos: bool
    template: bytes

    def vocabulary(self) -> bytes:
        """As JSON; a token's text has one character, U+0000 to U+00FF, for each of its bytes (Latin-1)."""
        regular = len(self.tokens) if self.bos is None else self.bos
        return json.dumps(
            {
                "tokens": [token.decode("latin-1") for token in self.tokens],
                "scores": self.scores,
                "bos": self.bos,
                "eos": self.eos,
                "add_bos": self.add_bos,
                "regular_vocab_size": regular,
            }
        ).encode()


def find_tokenizer(model_path: str) -> str:
    """The tokenizer beside a model: of the same name, the only one, or by how distributed-llama names its files."""
    model = Path(model_path)
    candidates = sorted((path for path in model.parent.glob("*.t") if path.is_file()), key=lambda path: len(path.name))
    same = [path for path in candidates if path.stem == model.stem]
    # dllama_tokenizer_llama3_2.t serves dllama_model_llama3_2_1b_q40.m; the longest such name is the nearest.
    marked = [path for path in candidates if path.stem.startswith("dllama_tokenizer_")]
    wanted = model.stem.removeprefix("dllama_model_")
    nearest = [path for path in marked if wanted.startswith(path.stem.removeprefix("dllama_tokenizer_"))][-1:]
    for found in (same, candidates, nearest, marked):
        if len(found) == 1:
            return str(found[0])
    raise UserError(
        f"{model_path}: {len(candidates) or 'no'} tokenizer files (.t) beside it, and none of the same name: "
        "give the path of the model's tokenizer."
    )


def read_tokenizer(path: str) -> DllamaTokenizer:
    """Read a tokenizer file, of the old form too; UserError if it is damaged or something else."""
    with Cursor(path) as cursor:
        values = _pairs(cursor)
        template = cursor.take(values.get("chat_template", 0), "chat template")
        cursor.take(values.get("chat_stop", 0), "chat stop")
        ends = values.get("n_eos_tokens", 0)
        cursor.expect(ends * 4, "EOS ids")
        eos = [cursor.number("i", "EOS id") for _ in range(ends)]
        tokens, scores = _tokens(cursor, values.get("vocab_size", 0))
        if cursor.place != cursor.size:
            raise damaged(path, f"its tokens end at byte {cursor.place}, but the file has {cursor.size} bytes")
    eos += [values[key] for key in ("eos_id", "chat_eos_id") if key in values]
    bos = values.get("bos_id", -1)
    _check_ids(path, len(tokens), [*eos, *([bos] if bos != -1 else [])])
    stops = list(dict.fromkeys(eos))
    return DllamaTokenizer(tokens, scores, None if bos == -1 else bos, stops, values.get("add_bos", 1) != 0, template)


def _pairs(cursor: Cursor) -> Mapping[str, int]:
    """The header's numbers by name."""
    if _has_old_magic(cursor):
        return _old_header(cursor)
    length = cursor.number("i", "header size")
    count = (length - 8) // 8
    if length % 8 or not 0 <= count <= MOST_PAIRS:
        raise damaged(cursor.path, f"its header has {length} bytes")
    cursor.expect(count * 8, "header")
    pairs = [(cursor.number("i", "key"), cursor.number("i", "value")) for _ in range(count)]
    if len(dict(pairs)) != count or any(not 0 <= key < len(KEYS) for key, _ in pairs):
        raise damaged(cursor.path, f"its header has the keys {', '.join(str(key) for key, _ in pairs)}")
    values = {KEYS[key]: value for key, value in pairs}
    if values.get("version") != VERSION:
        raise UserError(f"{cursor.path}: tokenizer version {values.get('version')}: mpillama reads version {VERSION}.")
    return values


def _old_header(cursor: Cursor) -> Mapping[str, int]:
    """Five fixed numbers, and no chat template; an id of -1 means none."""
    names = ("vocab_size", "max_token_length", "bos_id", "eos_id", "pad_id")
    values = {name: cursor.number("i", name) for name in names}
    return {name: value for name, value in values.items() if value != -1}


def _has_old_magic(cursor: Cursor) -> bool:
    """Whether the file is of the old form; UserError if it is no tokenizer file."""
    found = cursor.take(min(4, cursor.size), "magic")
    if int.from_bytes(found, "little") == OLD_MAGIC and len(found) == 4:
        return True
    if int.from_bytes(found, "little") != MAGIC or len(found) < 4:
        raise UserError(
            f"{cursor.path}: not a distributed-llama tokenizer: it begins with {found.hex(' ') or '(nothing)'}, "
            f"expected {MAGIC.to_bytes(4, 'little').hex(' ')}."
        )
    return False


def _tokens(cursor: Cursor, count: int) -> tuple[list[bytes], list[float]]:
    """The vocabulary: a score, a length and as many bytes for each token."""
    if count < 1:
        raise damaged(cursor.path, f"its header has vocab_size={count}")
    cursor.expect(count * 9, "tokens")
    tokens: list[bytes] = []
    scores: list[float] = []
    for _ in range(count):
        scores.append(float(cursor.number("f", "score")))
        length = cursor.number("I", "token length")
        if length == 0:
            raise damaged(cursor.path, f"token {len(tokens)} is empty")
        tokens.append(cursor.take(length, "token"))
    return tokens, scores


def _check_ids(path: str, count: int, ids: list[int]) -> None:
    for number in ids:
        if not 0 <= number < count:
            raise damaged(path, f"its header names token {number}, but it has {count} tokens")
