"""Packed integers and scales, read in any rows and columns, against packing by hand."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillama.formats.foreign import PathSource
from mpillama.formats.stored_arrays import Integers, Scales, StoredArray
from tests.packing import pack_words

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
LAYOUTS = {
    "nibbles along columns": ((19, 40), tuple(range(8)), "columns", False),
    "nibbles along rows": ((24, 13), tuple(range(8)), "rows", False),
    "rows that end within a word": ((19, 13), tuple(range(8)), "rows", False),
    "bytes along columns": ((5, 12), tuple(range(4)), "columns", False),
    "two in a byte": ((7, 10), (0, 1), "columns", False),
    "gptq": ((13, 40), tuple(range(8)), "columns", True),
    "awq": ((24, 11), AWQ_ORDER, "rows", True),
    "one each": ((6, 9), (), "columns", False),
}


def write(folder: Path, array: np.ndarray, dtype: str) -> tuple[PathSource, StoredArray]:
    path = folder / "file"
    path.write_bytes(b"\x55" * 7 + array.tobytes() + b"\x55")
    return PathSource([str(path)]), StoredArray("a", dtype, array.shape, 0, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arrays")


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_any_rows_and_columns_of_packed_integers(folder, layout, data):
    shape, order, packed, transposed = LAYOUTS[layout]
    word = np.uint8 if len(order) in (0, 2) else np.uint32
    values = np.random.default_rng(3).integers(0, 1 << 8 * np.dtype(word).itemsize // max(1, len(order)), shape)
    array = pack_words(values, order, packed, word)
    source, stored = write(folder, array.T.copy() if transposed else array, "U8" if word is np.uint8 else "I32")
    integers = Integers(stored, shape, order, packed, transposed)
    assert stored.shape == integers.expected_shape()
    assert stored.bytes == integers.bytes
    rows, columns = (range(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in shape)
    found = integers.read(source, rows, columns)
    assert np.array_equal(found, values[rows.start : rows.stop, columns.start : columns.stop])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [(1, 16), (1, 1000), (8, 8), (1000, 1000)])
@given(data=st.data())
def test_any_rows_and_columns_of_scales(folder, block, transposed, data):
    shape = 21, 50
    counts = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    values = np.random.default_rng(4).standard_normal(counts).astype(np.float32)
    source, stored = write(folder, values.T.copy() if transposed else values, "F32")
    scales = Scales(stored, shape, block, transposed)
    rows, columns = (range(*sorted(data.draw(st.tuples(*[st.integers(0, n - 1)] * 2)))) for n in shape)
    rows, columns = range(rows.start, rows.stop + 1), range(columns.start, columns.stop + 1)
    found = scales.read(source, rows, columns)[:, scales.blocks_of(columns)]
    expected = values[np.array(rows) // block[0]][:, np.array(columns) // block[1]]
    assert np.array_equal(found, expected)


def test_rows_of_gate_and_up_that_alternate(folder):
    values = np.random.default_rng(5).integers(0, 16, (10, 12))
    source, stored = write(folder, pack_words(values, (0, 1), "columns", np.uint8), "U8")
    for first in range(2):
        half = Integers(stored, (5, 12), (0, 1), first=first, step=2)
        assert np.array_equal(half.read(source, range(5), range(12)), values[first::2])
        assert np.array_equal(half.read(source, range(1, 4), range(3, 8)), values[first::2][1:4, 3:8])
