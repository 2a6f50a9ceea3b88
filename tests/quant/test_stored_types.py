"""Rows of every stored type: sizes and values against the gguf package, blocks against our own row lanes."""

import builtins
import pickle
import sys

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mpillama.errors import UserError
from mpillama.quant import WEIGHT_TYPE_NAMES
from mpillama.quant.ggml import DecodedType
from mpillama.quant.registry import STORED_TYPES, WEIGHT_TYPES

QUANTISED = [stored.name for stored in STORED_TYPES.values() if stored.block > 1]
DEQUANTISED_BY_GGUF = [stored.name for stored in STORED_TYPES.values() if isinstance(stored, DecodedType)]
ONLY_DECODED_BY_GGUF = {"iq4_nl", "iq4_xs", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "nvfp4"}
"""Or quantised otherwise."""
KEPT = [kept.name for kept in WEIGHT_TYPES.values() if kept.quantised and kept.name in STORED_TYPES]


def kind(stored: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[stored.upper()]


def random_rows(stored: str, rows: int = 5, columns: int = 512) -> np.ndarray:
    """Bytes of rows; floats and scales among them are finite."""
    rng = np.random.default_rng(11)
    if stored in ("f32", "f16", "bf16", "q8_0", "q4_0"):
        return quantize(rng.standard_normal((rows, columns)).astype(np.float32), kind(stored)).view(np.uint8)
    raw = rng.integers(0, 256, (rows, STORED_TYPES[stored].row_bytes(columns)), np.uint8)
    return np.where(raw & 0x7C == 0x7C, raw & 0x83, raw).astype(np.uint8)  # no exponent of all ones


@pytest.mark.parametrize("stored", list(STORED_TYPES))
def test_sizes_of_blocks_are_ggmls(stored):
    assert (STORED_TYPES[stored].block, STORED_TYPES[stored].block_bytes) == GGML_QUANT_SIZES[kind(stored)]


@pytest.mark.parametrize("stored", list(STORED_TYPES))
def test_bytes_of_rows_and_tensors(stored):
    found = STORED_TYPES[stored]
    assert found.row_bytes(6 * found.block) == 6 * found.block_bytes
    assert found.tensor_bytes((2, 3, 6 * found.block)) == 36 * found.block_bytes
    assert found.tensor_bytes((2**40, 2**30, found.block)) == 2**70 * found.block_bytes


@pytest.mark.parametrize("stored", QUANTISED)
def test_rows_that_are_no_whole_number_of_blocks(stored):
    with pytest.raises(ValueError, match=stored):
        STORED_TYPES[stored].row_bytes(STORED_TYPES[stored].block + 16)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (-1, 32), (0,)])
def test_shapes_without_values(shape):
    with pytest.raises(ValueError, match="shape"):
        STORED_TYPES["f32"].tensor_bytes(shape)


def test_a_scalar_is_one_value():
    assert STORED_TYPES["bf16"].tensor_bytes(()) == 2


@pytest.mark.parametrize("stored", list(STORED_TYPES))
def test_values_are_ggufs(stored):
    raw = random_rows(stored)
    found = STORED_TYPES[stored].decode(raw)
    assert found.dtype == np.float32
    assert found.shape == (5, 512)
    assert np.isfinite(found).all()
    assert np.array_equal(found, dequantize(raw, kind(stored)).astype(np.float32))


@given(raw=arrays.arrays(np.uint8, (2, 256)))
def test_every_pattern_of_bits_has_the_value_that_gguf_gives_it(raw):
    for stored in ("f32", "f16", "bf16"):
        assert np.array_equal(STORED_TYPES[stored].decode(raw), dequantize(raw, kind(stored)), equal_nan=True)


@given(raw=arrays.arrays(np.uint8, (2, 600)), stored=st.sampled_from(KEPT))
def test_every_block_has_the_values_that_gguf_gives_it(raw, stored):
    raw = raw[:, : 600 - 600 % STORED_TYPES[stored].block_bytes]
    with np.errstate(all="ignore"):
        expected = dequantize(raw, kind(stored))
    assert np.array_equal(STORED_TYPES[stored].decode(raw), expected, equal_nan=True)


@pytest.mark.parametrize("stored", list(STORED_TYPES))
def test_rows_may_be_a_view(stored):
    raw = random_rows(stored)
    wide = np.zeros((10, raw.shape[1] + 7), np.uint8)
    wide[::2, 3:-4] = raw
    assert np.array_equal(STORED_TYPES[stored].decode(wide[::2, 3:-4]), STORED_TYPES[stored].decode(raw))


@pytest.mark.parametrize("kept", [name for name in WEIGHT_TYPES if name in STORED_TYPES.keys() - ONLY_DECODED_BY_GGUF])
def test_rows_of_files_are_those_of_our_quantiser_and_pack_as_its(kept):
    x = np.random.default_rng(3).standard_normal((32, 256)).astype(np.float32)
    weight_type = WEIGHT_TYPES[kept]
    blocks = weight_type.blocks_of(quantize(x, kind(kept)).view(np.uint8))
    for found, expected in zip(blocks, weight_type.quantise(x), strict=True):
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    for found, expected in zip(weight_type.pack_blocks(blocks, 64), weight_type.pack(x, 64), strict=True):
        assert np.array_equal(found, expected)


LOST = {"tq1_0": 0.003, "tq2_0": 0.003, "iq1_s": 0.0115, "iq1_m": 0.026, "iq3_s": 0.016}
"""As docs/weights.md has it, where the others have 0.011."""


@pytest.mark.parametrize("stored", DEQUANTISED_BY_GGUF)
def test_what_is_quantised_again_loses_little(stored):
    """In parts of the values' root mean square, with the same scale in all blocks."""
    found, scale = STORED_TYPES[stored], np.array([0.01], np.float16)
    blocks = np.random.default_rng(1).integers(0, 256, (64, 8, found.block_bytes), np.uint8)
    if stored == "iq1_m":  # four bits at a time
        for i in range(4):
            part = int(scale.view(np.uint16)[0]) >> 4 * i & 15
            blocks[:, :, 49 + 2 * i] = blocks[:, :, 49 + 2 * i] & 15 | part << 4
    else:
        blocks[:, :, slice(-2, None) if stored.startswith("tq") else slice(2)] = scale.view(np.uint8)
    values, kept = found.decode(blocks.reshape(64, -1)), found.held_as()
    lost = kept.unpack(kept.pack(values)).astype(np.float64) - values
    assert np.sqrt(np.square(lost).mean() / np.square(values, dtype=np.float64).mean()) < LOST.get(stored, 0.0115)


@pytest.mark.parametrize("stored", list(STORED_TYPES))
def test_every_type_says_how_it_is_held(stored):
    """Those of kernels as they are; no other falls into one of them unasked."""
    kept = STORED_TYPES[stored].held_as()
    assert WEIGHT_TYPES[kept.name] is kept
    assert (kept.name == stored) == (stored in WEIGHT_TYPES)
    assert pickle.loads(pickle.dumps(kept)) == kept  # what another rank sends


def test_types_are_told_apart():
    assert set(WEIGHT_TYPE_NAMES) == set(WEIGHT_TYPES)  # of modules and of types
    for numbers in ([t.number for t in WEIGHT_TYPES.values()], [t.ggml for t in STORED_TYPES.values()]):
        assert len(set(numbers)) == len(numbers)


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
        STORED_TYPES[stored].decode(raw)
    STORED_TYPES["q8_0"].decode(np.zeros((1, 34), np.uint8))
