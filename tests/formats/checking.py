"""What the tests of foreign checkpoints share: reading values back, and reading damaged files within bounds."""

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint

MOST_MEMORY = 50_000_000
MOST_SECONDS = 5
Read = Callable[[], Checkpoint]


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor's values as Hugging Face has them: its bytes decoded, its heads' rows in their order."""
    tensor = checkpoint.tensors[name]
    columns = tensor.shape[-1]
    count = int(np.prod(tensor.shape[:-1], dtype=int)) * tensor.type.row_bytes(columns)
    with Path(checkpoint.files[tensor.file]).open("rb") as file:
        file.seek(tensor.offset)
        raw = np.frombuffer(file.read(count), np.uint8)
    rows = tensor.type.decode(raw.reshape(-1, tensor.type.row_bytes(columns))).reshape(tensor.shape)
    if not tensor.interleaved:
        return rows
    pairs = rows.reshape(-1, tensor.interleaved // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def as_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of heads as GGUF and distributed-llama store them for Llama: pairs of channels that rotate together."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def refusal(read: Read, path: Path | str = "") -> str:
    """The sentence that a checkpoint is refused with; `path` is what it must begin with."""
    with pytest.raises(UserError) as caught:
        read()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith(str(path))
    return sentence


def within_bounds(read: Read) -> Checkpoint | None:
    """Read what may be damaged: a checkpoint, or None if it was refused; no other exception, little memory and time."""
    found: Checkpoint | UserError
    tracemalloc.start()
    start = time.process_time()
    try:
        found = read()
    except UserError as error:
        found = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_MEMORY
    assert time.process_time() - start < MOST_SECONDS
    if isinstance(found, UserError):
        assert "\n" not in str(found)
        assert str(found).encode()  # it can be printed
        return None
    check_inside(found)
    return found


def check_inside(checkpoint: Checkpoint) -> None:
    """Every tensor lies within its file, and no two share bytes."""
    ends: dict[int, int] = {}
    for tensor in sorted(checkpoint.tensors.values(), key=lambda t: (t.file, t.offset)):
        assert tensor.offset >= ends.get(tensor.file, 0)
        rows = int(np.prod(tensor.shape[:-1], dtype=object))
        ends[tensor.file] = tensor.offset + rows * tensor.type.row_bytes(tensor.shape[-1])
    assert all(end <= checkpoint.file_sizes[file] for file, end in ends.items())


HUGE = (2**64 - 1, 2**63, 2**63 - 1, 2**40, 2**32, 2**31 - 1, 10**9, 0)


@st.composite
def mangled(draw: st.DrawFn, data: bytes, header: int) -> bytes:
    """The bytes of a file after some damage to its first `header` bytes, or cut short, or both."""
    damaged = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        damaged[draw(st.integers(0, header - 1))] = draw(st.integers(0, 255))
    for _ in range(draw(st.integers(0, 2))):
        width = draw(st.sampled_from([4, 8]))
        place = draw(st.integers(0, header - width))
        huge = draw(st.sampled_from(HUGE)) % 256**width
        damaged[place : place + width] = huge.to_bytes(width, "little")
    if draw(st.integers(0, 3)) == 0:
        del damaged[draw(st.integers(0, len(damaged))) :]
    return bytes(damaged)
