"""What a checkpoint in a foreign format holds, in Hugging Face's names: everything but the weights themselves.

Rank 0 reads it and gives it to the others, who then read the bytes of their own slices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpillama.quant.registry import STORED_TYPES
from mpillama.quant.weight_type import StoredType


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: its shape as Hugging Face has it, and where its bytes lie.

    `stored` names the type of the values, one of STORED_TYPES; rows follow each other without gaps. `offset` is the
    64-bit byte offset in file number `file`.
    `interleaved` is head_dim where the rows of each head stand as rotary pairs (row 2i of the file is row i of the
    head, row 2i + 1 is row i + head_dim / 2), else 0. `added` is what a vector's stored values lack, as those of norms
    that count from 1.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    file: int
    offset: int
    interleaved: int = 0
    added: float = 0.0

    @property
    def type(self) -> StoredType:
        return STORED_TYPES[self.stored]

    @property
    def bytes(self) -> int:
        """ValueError if the shape is impossible, or rows are no whole number of blocks."""
        return self.type.tensor_bytes(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration in Hugging Face's spelling, its texts by file name, and the table of its tensors."""

    path: str
    kind: str
    config_json: Mapping[str, Any]
    texts: Mapping[str, bytes] = field(repr=False)
    files: tuple[str, ...]
    file_sizes: tuple[int, ...]
    tensors: Mapping[str, StoredTensor] = field(repr=False)


# -- Which of several chat templates counts, for models that come with a list of them ---------------------------------


DEFAULT = "default"


def named_templates(found: Any) -> dict[str, str]:
    """Templates by name, of a tokenizer_config.json's `chat_template`: one text, or a list with names."""
    if isinstance(found, str):
        return {DEFAULT: found} if found else {}
    entries = [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str) and text}


def only_template(templates: Mapping[str, str]) -> str:
    """The default one, or the only one; "" if somebody would have to choose."""
    return templates.get(DEFAULT) or (next(iter(templates.values())) if len(templates) == 1 else "")
