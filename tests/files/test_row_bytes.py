"""Rows of every stored type: sizes and values against the gguf package, blocks against our own layout."""

import builtins
import sys

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mpillama.errors import UserError
from mpillama.files.row_bytes import BLOCKS, blocks_of, decode_rows, row_bytes, stored_bytes
from mpillama.layout.blocks import quantise_q4_0, quantise_q8_0
from mpillama.layout.lanes import pack, pack_blocks
from mpillama.layout.weight_types import WEIGHT_TYPES

QUANTISED = [stored for stored in BLOCKS if stored not in ("f32", "f16", "bf16")]
DEQUANTISED_BY_GGUF = [stored for stored in QUANTISED if stored not in ("q8_0", "q4_0")]


def kind(stored: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[stored.upper()]


def random_rows(stored: str, rows: int = 5, columns: int = 512) -> np.ndarray:
    """Bytes of rows; floats and scales among them are finite."""
    rng = np.random.default_rng(11)
    if stored in ("f32", "f16", "bf16") or stored not in DEQUANTISED_BY_GGUF:
        return quantize(rng.standard_normal((rows, columns)).astype(np.float32), kind(stored)).view(np.uint8)
    raw = rng.integers(0, 256, (rows, row_bytes(stored, columns)), np.uint8)
    return np.where(raw & 0x7C == 0x7C, raw & 0x83, raw).astype(np.uint8)  # no exponent of all ones


@pytest.mark.parametrize("stored", list(BLOCKS))
def test_sizes_of_blocks_are_ggmls(stored):
    assert BLOCKS[stored] == GGML_QUANT_SIZES[kind(stored)]


@pytest.mark.parametrize("stored", list(BLOCKS))
def test_bytes_of_rows_and_tensors(stored):
    values, count = BLOCKS[stored]
    assert row_bytes(stored, 6 * values) == 6 * count
    assert stored_bytes(stored, (2, 3, 6 * values)) == 36 * count
    assert stored_bytes(stored, (2**40, 2**30, values)) == 2**70 * count


@pytest.mark.parametrize("stored", QUANTISED)
def test_rows_that_are_no_whole_number_of_blocks(stored):
    with pytest.raises(ValueError, match=stored):
        row_bytes(stored, BLOCKS[stored][0] + 16)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (-1, 32), (0,)])
def test_shapes_without_values(shape):
    with pytest.raises(ValueError, match="shape"):
        stored_bytes("f32", shape)


def test_a_scalar_is_one_value():
    assert stored_bytes("bf16", ()) == 2


@pytest.mark.parametrize("stored", list(BLOCKS))
def test_values_are_ggufs(stored):
    raw = random_rows(stored)
    found = decode_rows(stored, raw)
    assert found.dtype == np.float32
    assert found.shape == (5, 512)
    assert np.isfinite(found).all()
    assert np.array_equal(found, dequantize(raw, kind(stored)).astype(np.float32))


@given(raw=arrays.arrays(np.uint8, (2, 256)))
def test_every_pattern_of_bits_has_the_value_that_gguf_gives_it(raw):
    for stored in ("f32", "f16", "bf16"):
        assert np.array_equal(decode_rows(stored, raw), dequantize(raw, kind(stored)), equal_nan=True)


@given(raw=arrays.arrays(np.uint8, (2, 34 * 18)), stored=st.sampled_from(["q8_0", "q4_0"]))
def test_every_block_has_the_values_that_gguf_gives_it(raw, stored):
    with np.errstate(all="ignore"):
        expected = dequantize(raw, kind(stored))
    assert np.array_equal(decode_rows(stored, raw), expected, equal_nan=True)


@pytest.mark.parametrize("stored", list(BLOCKS))
def test_rows_may_be_a_view(stored):
    raw = random_rows(stored)
    wide = np.zeros((10, raw.shape[1] + 7), np.uint8)
    wide[::2, 3:-4] = raw
    assert np.array_equal(decode_rows(stored, wide[::2, 3:-4]), decode_rows(stored, raw))


@pytest.mark.parametrize(("stored", "quantise"), [("q8_0", quantise_q8_0), ("q4_0", quantise_q4_0)])
def test_blocks_are_those_of_our_quantiser_and_pack_as_its(stored, quantise):
    x = np.random.default_rng(3).standard_normal((32, 256)).astype(np.float32)
    expected_values, expected_scales = quantise(x)
    packed = expected_values.view(np.uint8)
    if stored == "q4_0":
        packed = packed[:, :, :16] | packed[:, :, 16:] << 4
    raw = np.concatenate([expected_scales[:, :, None].view(np.uint8), packed], axis=2).reshape(32, -1)
    values, scales = blocks_of(stored, raw)
    assert (values.dtype, scales.dtype) == (expected_values.dtype, np.float16)
    assert np.array_equal(values, expected_values)
    assert np.array_equal(scales, expected_scales)
    weight_type = WEIGHT_TYPES[stored]
    for found, expected in zip(pack_blocks(values, scales, weight_type, 64), pack(x, weight_type, 64), strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("stored", ["f32", "q4_1", "q6_k"])
def test_other_types_have_no_such_blocks(stored):
    with pytest.raises(ValueError, match=stored):
        blocks_of(stored, random_rows(stored))


@pytest.mark.parametrize("stored", DEQUANTISED_BY_GGUF)
def test_without_gguf_the_sentence_says_what_to_install(stored, monkeypatch):
    real_import = builtins.__import__

    def without_gguf(name, *rest, **named):
        if name.split(".")[0] == "gguf":
            raise ImportError(name)
        return real_import(name, *rest, **named)

    raw = random_rows(stored)
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(UserError, match=rf"{stored}.*mpillama\[convert\]"):
        decode_rows(stored, raw)
    decode_rows("q8_0", np.zeros((1, 34), np.uint8))
