"""The table of tensors of one safetensors file.

Format: https://huggingface.co/docs/safetensors#format
"""

import json
from typing import Any

from mpillama.errors import UserError
from mpillama.formats.checkpoint import StoredTensor
from mpillama.formats.cursor import Cursor
from mpillama.formats.foreign import damaged, one_line
from mpillama.quant.registry import STORED_TYPES

STORED = {t.safetensors: t.name for t in STORED_TYPES.values() if t.safetensors}
MOST_HEADER = 100_000_000
"""Bytes that the safetensors package itself takes for a header at the most."""
IGNORED = "rotary_emb.inv_freq"
"""Old checkpoints carry the rotary frequencies, which follow from the configuration."""


def read_safetensors_table(path: str, number: int) -> list[StoredTensor]:
    """The tensors of a file, which is number `number` of its checkpoint, by the names they have there."""
    with Cursor(path, MOST_HEADER + 8) as cursor:
        length = cursor.number("Q", "the length of its header")
        cursor.expect(length, "header")
        header = _parse(path, cursor.take(length, "header"))
        _refuse_dtypes(path, header)
        _validate(path)
    named = ((name, info) for name, info in header.items() if name != "__metadata__" and not name.endswith(IGNORED))
    return [_stored_tensor(path, name, info, number, 8 + length) for name, info in named]


def _validate(path: str) -> None:
    """Let the safetensors package check that the tensors fill the file without gaps."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(
            f"{path}: read with the package safetensors, which is not installed: pip install 'mpillama[convert]'."
        ) from error
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise damaged(path, one_line(error)) from error


def _parse(path: str, header: bytes) -> dict[str, Any]:
    """The header's JSON; a name that appears twice is refused, which JSON readers pass over."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"a name appears twice among {sorted(name for name, _ in pairs)}")
        return found

    try:
        value = json.loads(header.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise damaged(path, one_line(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, f"its header holds a {type(value).__name__}")
    return value


def _refuse_dtypes(path: str, header: dict[str, Any]) -> None:
    """Refuse other types by name, also those that the installed safetensors package does not know."""
    for name, info in header.items():
        dtype = info.get("dtype") if isinstance(info, dict) else None
        if not isinstance(dtype, str) or not dtype.isidentifier() or dtype in STORED:
            continue
        if name != "__metadata__" and not name.endswith(IGNORED):
            raise UserError(
                f"{path}: tensor {name!r} is stored as {dtype[:32]}: mpillama reads {', '.join(STORED)}, "
                "take the model in one of these, or a GGUF file of it."
            )


def _stored_tensor(path: str, name: str, info: Any, number: int, start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, _) = info["dtype"], tuple(int(n) for n in info["shape"]), info["data_offsets"]
        offset = start + int(begin)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"tensor {name!r}: {one_line(error)}") from error
    return StoredTensor(name, shape, STORED[dtype], number, offset)
