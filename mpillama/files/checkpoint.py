"""What a checkpoint in a foreign format holds, in Hugging Face's names: everything but the weights themselves.

Rank 0 reads it and gives it to the others, who then read the bytes of their own slices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: its shape as Hugging Face has it, and where its bytes lie.

    `stored` names how the values are written: f32, f16, bf16, or a GGML type (q8_0, q4_0, q4_1, q5_0, q5_1, q2_k to
    q6_k); rows follow each other without gaps. `offset` is the 64-bit byte offset in file number `file`.
    `interleaved` is head_dim where the rows of each head stand as rotary pairs (row 2i of the file is row i of the
    head, row 2i + 1 is row i + head_dim / 2), else 0.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    file: int
    offset: int
    interleaved: int = 0


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
