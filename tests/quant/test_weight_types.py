"""Quantisation and row lanes against the `gguf` package, value for value."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.types.bf16 import BF16, round_to_bfloat16
from mpillama.quant.types.f16 import F16
from mpillama.quant.types.f32 import F32
from mpillama.quant.types.iq4_nl import CODEBOOK, IQ4_NL
from mpillama.quant.types.mxfp4 import MXFP4
from mpillama.quant.types.q4_0 import Q4_0
from mpillama.quant.types.q4_1 import Q4_1
from mpillama.quant.types.q5_0 import Q5_0
from mpillama.quant.types.q5_1 import Q5_1
from mpillama.quant.types.q8_0 import Q8_0
from mpillama.quant.weight_type import Blocks, WeightType

STEPS = {Q8_0: 127, Q4_0: 8, Q5_0: 16, MXFP4: 12}
"""The integer that the element of largest magnitude becomes, or its negative; of mxfp4 at most."""
FROM_MINIMUM = {Q4_1: 15, Q5_1: 31}
"""The integer that the largest element becomes, 0 being the smallest."""
GGML = {kind: GGMLQuantizationType[kind.name.upper()] for kind in (*STEPS, *FROM_MINIMUM)}
LEAST_DIVISOR = 2.0**-128  # below, 1 / scale is no float32 any more
TYPES = list(WEIGHT_TYPES.values())
QUANTISED = [kind for kind in TYPES if kind.quantised]


def name_of(weight_type: WeightType) -> str:
    """For the names of parametrised tests."""
    return weight_type.name


def ggml_bytes(x: np.ndarray, weight_type: WeightType) -> np.ndarray:
    """What gguf makes of float32 [rows, k]: uint8 [rows, blocks, bytes of a block]."""
    with np.errstate(over="ignore", divide="ignore"):
        return gguf.quants.quantize(x, GGML[weight_type]).reshape(len(x), x.shape[1] // 32, -1)


def as_ggml(blocks: Blocks, weight_type: WeightType) -> np.ndarray:
    """Our blocks in GGML's bytes: scales, then int8s, or nibbles i and i + 16 in one byte, fifth bits before them."""
    values, *scales = blocks
    parts = [np.ascontiguousarray(scale)[..., None].view(np.uint8) for scale in scales]
    if weight_type.block_bytes >= 22 and weight_type != Q8_0:
        parts.append(np.packbits(values >> 4, axis=2, bitorder="little"))
    if weight_type != Q8_0:
        values = values[..., :16] & 15 | values[..., 16:] << 4
    return np.concatenate([*parts, values.view(np.uint8)], axis=2)


def our_bytes(x: np.ndarray, weight_type: WeightType, panel: int | None) -> np.ndarray:
    """Through row lanes and back."""
    return as_ggml(weight_type.unpack_blocks(weight_type.pack(x, panel)), weight_type)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
BASE = np.random.default_rng(6).standard_normal((16, 64)).astype(np.float32)


def among_others(block: np.ndarray) -> np.ndarray:
    """BASE with one block of 32 replaced."""
    x = BASE.copy()
    x[5, 32:] = block
    return x


def ordinary(x: np.ndarray, weight_type: WeightType) -> np.ndarray:
    """Flush blocks to zero whose scale is too small for GGML's own arithmetic (see the test of tiny blocks).

    For mxfp4 also shorten the numbers: the gguf package's logarithm is not exact just below a power of two.
    """
    if weight_type == MXFP4:
        x = (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF0000).view(np.float32)
    blocks = x.reshape(len(x), -1, 32)
    if weight_type in FROM_MINIMUM:
        with np.errstate(over="ignore"):
            scale = (blocks.max(axis=2) - blocks.min(axis=2)) / np.float32(FROM_MINIMUM[weight_type])
    else:
        scale = np.abs(blocks).max(axis=2) / STEPS[weight_type]
    return np.where(np.repeat((scale > 0) & (scale < LEAST_DIVISOR), 32, axis=1), np.float32(0), x)


@pytest.mark.parametrize("panel", [None, 32])
@pytest.mark.parametrize("weight_type", GGML, ids=name_of)
@given(block=arrays.arrays(np.float32, 32, elements=FINITE))
@settings(max_examples=100, deadline=None)
def test_quantised_bytes_are_those_of_gguf(weight_type, panel, block):
    x = ordinary(among_others(block), weight_type)
    assert np.array_equal(our_bytes(x, weight_type, panel), ggml_bytes(x, weight_type))


@pytest.mark.parametrize("exponent", [-100, -30, -15, -1, 0, 1, 12, 15, 20, 100, 120])
@pytest.mark.parametrize("weight_type", GGML, ids=name_of)
def test_quantised_bytes_are_those_of_gguf_at_every_size(weight_type, exponent):
    """Also where the float16 scale is subnormal, zero or infinite."""
    rng = np.random.default_rng(abs(exponent))
    x = (rng.standard_normal((64, 256)) * 2.0**exponent).astype(np.float32)
    assert np.array_equal(our_bytes(x, weight_type, None), ggml_bytes(x, weight_type))


@pytest.mark.parametrize("weight_type", GGML, ids=name_of)
@given(halves=arrays.arrays(np.int16, 31, elements=st.integers(-254, 254)), size=st.integers(-9, 9))
@settings(max_examples=100, deadline=None)
def test_ties_are_rounded_as_in_gguf(weight_type, halves, size):
    """Halves of steps: the largest is an exact number of steps, so that every odd number is a tie."""
    if weight_type in FROM_MINIMUM:
        steps = FROM_MINIMUM[weight_type]
        block = np.r_[steps, 0, halves[:30] % (2 * steps + 1) / 2]
    else:
        steps = STEPS[weight_type]
        first = steps if weight_type in (Q8_0, MXFP4) else -steps
        block = np.r_[first, (halves % (4 * steps + 1) - 2 * steps) / 2]
    x = among_others(block * 2.0**size)
    assert np.array_equal(our_bytes(x, weight_type, None), ggml_bytes(x, weight_type))


@pytest.mark.parametrize("weight_type", QUANTISED, ids=name_of)
def test_zeros_are_zeros(weight_type):
    for zero in (0.0, -0.0):
        x = np.full((16, 32), zero, np.float32)
        if weight_type in GGML:
            assert np.array_equal(our_bytes(x, weight_type, None), ggml_bytes(x, weight_type))
        assert not weight_type.unpack(weight_type.pack(x)).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("largest", [1e-45, 1e-42, 1e-40, 1e-39, 3e-38])
@pytest.mark.parametrize("weight_type", [kind for kind in QUANTISED if kind != MXFP4], ids=name_of)
def test_tiny_blocks_become_zeros_without_undefined_conversions(weight_type, largest):
    """GGML divides by the scale, overflows and converts infinity to an integer; ours must do nothing undefined."""
    x = np.linspace(-largest, largest, 16 * 32).reshape(16, 32).astype(np.float32)
    assert not weight_type.unpack(weight_type.pack(x)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("weight_type", QUANTISED, ids=name_of)
def test_a_bad_weight_shows_in_its_block(weight_type, bad):
    x = np.ones((16, 64), np.float32)
    x[3, 40] = bad
    with np.errstate(invalid="ignore", over="ignore"):
        back = weight_type.unpack(weight_type.pack(x))
    assert not np.isfinite(back[3, 32:]).any()
    assert np.isfinite(np.delete(back, 3, axis=0)).all()


@pytest.mark.parametrize("weight_type", GGML, ids=name_of)
def test_dequantised_values_are_those_of_gguf(weight_type):
    x = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    expected = gguf.quants.dequantize(ggml_bytes(x, weight_type).reshape(32, -1), GGML[weight_type])
    assert np.array_equal(weight_type.unpack(weight_type.pack(x)), expected)


@pytest.mark.parametrize("panel", [None, 32, 64, 128])
@pytest.mark.parametrize("weight_type", TYPES, ids=name_of)
def test_pack_and_unpack_undo_each_other(weight_type, panel):
    """Rounding happens once: packing what was unpacked gives the same arrays, in the shapes that the table promises."""
    x = np.random.default_rng(1).standard_normal((48, 256)).astype(np.float32)
    packed = weight_type.pack(x, panel)
    back = weight_type.unpack(packed)
    groups = (256 // panel, 3) if panel else (3,)
    assert [a.shape for a in packed] == [
        (*groups, lane.entries(panel or 256), lane.entry) for lane in weight_type.lanes
    ]
    assert [a.dtype for a in packed] == [np.dtype(lane.dtype) for lane in weight_type.lanes]
    assert sum(a.nbytes for a in packed) == 3 * weight_type.group_bytes(256)
    assert all(a.flags.c_contiguous for a in packed)
    if weight_type == F32:
        assert np.array_equal(back, x)
    if not weight_type.quantised:
        assert all(np.array_equal(a, b) for a, b in zip(weight_type.pack(back, panel), packed, strict=True))
    step = {F32: 0, F16: 2.0**-11, BF16: 2.0**-8}.get(weight_type)
    if step is not None:
        assert np.all(np.abs(back - x) <= step * np.abs(x))


@pytest.mark.parametrize("panel", [None, 32, 96])
@pytest.mark.parametrize("weight_type", QUANTISED, ids=name_of)
@pytest.mark.parametrize("seed", range(3))
def test_blocks_survive_row_lanes(weight_type, panel, seed):
    """Any bytes, also values that our quantiser never makes."""
    raw = np.random.default_rng(seed).integers(0, 256, (32, weight_type.row_bytes(6 * 32)), np.uint8)
    found = weight_type.unpack_blocks(weight_type.pack_blocks(weight_type.blocks_of(raw), panel))
    assert np.array_equal(as_ggml(found, weight_type).reshape(32, -1), raw)


def test_lanes_lie_where_the_format_says():
    """16 rows side by side; q8_0 in steps of 4 k-values, nibbles of steps j and j + 4 in a byte, then fifth bits."""
    x = np.arange(16 * 32, dtype=np.float32).reshape(16, 32)
    assert F32.pack(x)[0][0, 7, 3] == x[3, 7]
    values = (np.arange(16 * 32) % 251 - 125).astype(np.int8).reshape(16, 1, 32)
    q8, scales = Q8_0.pack_blocks((values, np.arange(16, dtype=np.float16)[:, None]))
    assert q8[0, 0, 64 * 5 + 4 * 11 + 2] == values[11, 0, 4 * 5 + 2]
    assert list(scales[0, 0]) == list(range(16))
    nibbles = (np.arange(16 * 32) * 7 % 16).astype(np.uint8).reshape(16, 1, 32)
    q4, _ = Q4_0.pack_blocks((nibbles, np.ones((16, 1), np.float16)))
    byte = q4[0, 0, 64 * 3 + 4 * 9 + 1]
    assert (byte & 15, byte >> 4) == (nibbles[9, 0, 4 * 3 + 1], nibbles[9, 0, 4 * 7 + 1])
    fives = (np.arange(16 * 32) * 7 % 32).astype(np.uint8).reshape(16, 1, 32)
    q5, _ = Q5_0.pack_blocks((fives, np.ones((16, 1), np.float16)))
    assert q5[0, 0, 64 * 3 + 4 * 9 + 1] == fives[9, 0, 4 * 3 + 1] & 15 | fives[9, 0, 4 * 7 + 1] << 4 & 255
    assert q5[0, 0, 64 * 4 + 4 * 9 + 1] == sum(int(fives[9, 0, 4 * j + 1] >> 4) << j for j in range(8))


@given(bits=arrays.arrays(np.uint32, 64))
@settings(max_examples=100, deadline=None)
def test_bfloat16_is_rounded_as_in_gguf(bits):
    x = bits.view(np.float32)
    expected = gguf.quants.quantize(x[None], GGMLQuantizationType.BF16).view(np.uint16)[0]
    assert np.array_equal(round_to_bfloat16(x), expected)


def test_bfloat16_at_every_tie():
    """Each bfloat16 plus half a step, and the floats next to that."""
    high = np.arange(2**16, dtype=np.uint32) << 16
    for low in (0x0000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = (high | low).view(np.float32)
        expected = gguf.quants.quantize(x[None], GGMLQuantizationType.BF16).view(np.uint16)[0]
        assert np.array_equal(round_to_bfloat16(x), expected)


@pytest.mark.filterwarnings("error")
def test_float16_weights_beyond_its_range_become_infinite():
    x = np.full((16, 32), 70000, np.float32)
    assert np.isinf(F16.unpack(F16.pack(x))).all()


def test_quantisation_errors_are_within_half_a_step():
    x = np.random.default_rng(2).standard_normal((16, 64)).astype(np.float32)
    for weight_type, steps in STEPS.items():
        if weight_type == MXFP4:  # whose steps differ
            continue
        step = np.repeat(np.abs(x.reshape(16, 2, 32)).max(axis=2) / steps, 32, axis=1)
        # One side of q4_0 ends at 7 steps, of q5_0 at 15: up to a whole step is lost there.
        limit = step * (0.5 if steps == 127 else 1.0) + np.abs(x) * 2.0**-10
        assert np.all(np.abs(weight_type.dequantise(weight_type.quantise(x)) - x) <= limit)
    for weight_type, steps in FROM_MINIMUM.items():
        blocks = x.reshape(16, 2, 32)
        step = np.repeat((blocks.max(axis=2) - blocks.min(axis=2)) / steps, 32, axis=1)
        largest = np.repeat(np.abs(blocks).max(axis=2), 32, axis=1)
        assert np.all(np.abs(weight_type.dequantise(weight_type.quantise(x)) - x) <= step / 2 + largest * 2.0**-9)


# -- mxfp4 -----------------------------------------------------------------------------------------------------------


def test_every_exponent_of_mxfp4_is_a_power_of_two():
    codes = np.tile(np.arange(16, dtype=np.uint8), (256, 1, 2))
    with np.errstate(over="ignore"):
        found = MXFP4.unpack(MXFP4.pack_blocks((codes, np.arange(256, dtype=np.uint8)[:, None])))
    floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    exact = np.r_[floats, -floats] * 2.0 ** (np.arange(256)[:, None] - 127)
    with np.errstate(over="ignore"):
        assert np.array_equal(found[:, :16], exact.astype(np.float32))
    assert np.array_equal(found[:253].astype(np.float64)[:, :16], exact[:253])


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1e-38, 2.0**-125, 2.0**-120, 3e38])
def test_mxfp4_at_the_ends_of_float32(largest):
    x = np.linspace(-largest, largest, 16 * 32).reshape(16, 32).astype(np.float32)
    found, step = MXFP4.unpack(MXFP4.pack(x)), np.abs(x).max(axis=1, keepdims=True) / 4
    assert np.all(np.abs(found.astype(np.float64) - x) <= np.maximum(step, 2.0**-129))


# -- iq4_nl, which the gguf package only decodes ---------------------------------------------------------------------


def in_plain_code(block: np.ndarray) -> tuple[list[int], np.float16]:
    """What llama.cpp does with a block, step by step in float32; its own library gave the same bytes."""
    largest = block[np.abs(block).argmax()]
    if abs(largest) < 1e-15:
        return [8] * 32, np.float16(0)

    def nearest(factor: np.float32) -> list[int]:
        distances = np.abs(CODEBOOK.astype(np.float64) - np.float64(factor * block)[:, None])
        return [15 - int(d[::-1].argmin()) for d in distances]  # the larger of two

    scale = best = np.float32(0)
    first = np.float32(1) / (largest / np.float32(127))
    for turn, factor in enumerate([first, *(np.float32(more - 127) / largest for more in range(-7, 8))]):
        products = squares = np.float32(0)
        for x, place in zip(block, nearest(factor), strict=True):
            q = np.float32(CODEBOOK[place])
            products, squares = products + x * x * q * x, squares + x * x * q * q
        if squares > 0 and (not turn or products * products > best * squares):
            scale = products / squares
            best = scale * products
    return nearest(np.float32(1) / scale if scale else np.float32(0)), np.float16(scale)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_iq4_nl_is_quantised_as_by_llama_cpp(size):
    x = (np.random.default_rng(8).standard_normal((16, 64)) * size).astype(np.float32)
    x[3, 32:], x[4, :32] = 0, np.round(x[4, :32] / size * 4) * size  # zeros, and ties
    values, scales = IQ4_NL.quantise(x)
    for row in range(16):
        for block in range(2):
            expected, scale = in_plain_code(x[row, 32 * block : 32 * block + 32])
            assert list(values[row, block]) == expected
            assert scales[row, block] == scale


def test_a_block_of_iq4_nl_does_not_depend_on_its_company():
    x = np.random.default_rng(9).standard_normal((64, 320)).astype(np.float32)
    values, scales = IQ4_NL.quantise(x)
    slices = (slice(3, 4), slice(32, 64)), (slice(0, 64), slice(288, 320)), (slice(5, 60, 7), slice(0, 96))
    for rows, columns in slices:
        blocks = slice(columns.start // 32, columns.stop // 32)
        alone = IQ4_NL.quantise(x[rows, columns])
        assert np.array_equal(alone[0], values[rows, blocks])
        assert np.array_equal(alone[1], scales[rows, blocks])
