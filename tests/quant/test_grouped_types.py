"""Types with a scale for many columns, and floats of 8 and 4 bits: in memory, and the values that formats define."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillama.quant.coded import E2M1, E4M3, E8M0, as_float32
from mpillama.quant.grouped import GroupedType
from mpillama.quant.registry import WEIGHT_TYPES, weight_type_named
from mpillama.quant.types.fp8 import FP8, as_e4m3
from mpillama.quant.types.int4 import INT4
from mpillama.quant.types.int4_bf16 import INT4_BF16
from mpillama.quant.types.int4_f16 import INT4_F16
from mpillama.quant.types.int8 import INT8
from mpillama.quant.types.nvfp4 import NVFP4
from mpillama.quant.weight_type import Blocks, WeightType

GROUPED = [kind for kind in WEIGHT_TYPES.values() if isinstance(kind, GroupedType)]
BITS = {FP8: 8.25, INT4: 4.125, INT4_F16: 4.1875, INT4_BF16: 4.1875, INT8: 8.3125}
ROWS, BLOCKS = 32, 12


def any_numbers(kind: WeightType, group: int) -> Blocks:
    """Numbers of any bits that a file may have, the same in all blocks of a group."""
    rng = np.random.default_rng(group)
    shape = ROWS, 32 * BLOCKS // group

    def repeated(each: np.ndarray) -> np.ndarray:
        return np.repeat(each, group // 32, axis=1)

    scales = repeated((rng.standard_normal(shape) * 0.01).astype(np.float32))
    codes = rng.integers(0, 256, (ROWS, BLOCKS, 32), np.uint8)
    if kind == FP8.for_groups(group):
        return np.where(codes & 127 == 127, np.uint8(5), codes), scales
    if isinstance(kind, type(INT8)):
        return codes.view(np.int8), scales, repeated(rng.integers(-128, 128, shape).astype(np.int8))
    of_sixteen_bits = scales.astype(np.float16) if isinstance(kind, type(INT4_F16)) else scales.view(np.uint32) >> 16
    zeros = () if isinstance(kind, type(INT4)) else (repeated(rng.integers(0, 17, shape).astype(np.uint8)),)
    return codes & 15, of_sixteen_bits.astype(kind.beside[0]), *zeros


def values_in_float64(kind: WeightType, numbers: Blocks) -> np.ndarray:
    codes, scales, *zeros = numbers
    exact = E4M3[codes].astype(np.float64) if isinstance(kind, type(FP8)) else codes.astype(np.float64)
    zero = np.asarray(zeros[0], np.float64)[:, :, None] if zeros else 8.0 * isinstance(kind, type(INT4))
    factors = as_float32(scales, "BF16") if scales.dtype == np.uint16 else scales
    return ((exact - zero) * factors.astype(np.float64)[:, :, None]).reshape(ROWS, -1)


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize("kind", GROUPED, ids=lambda kind: kind.name)
def test_numbers_survive_row_lanes_and_have_the_formats_values(kind, group):
    sized = kind.for_groups(group)
    numbers = any_numbers(sized, group)
    expected = values_in_float64(sized, numbers).astype(np.float32)
    assert np.array_equal(sized.dequantise(numbers), expected)
    for panel in (None, 32, 64, 96, 128, 384):
        lanes = sized.pack_blocks(numbers, panel)
        assert all(np.array_equal(a, b) for a, b in zip(sized.unpack_blocks(lanes), numbers, strict=True))
        assert np.array_equal(sized.unpack(lanes), expected)


@pytest.mark.parametrize("kind", GROUPED, ids=lambda kind: kind.name)
def test_how_large_they_are_and_what_they_are_called(kind):
    assert 8 * kind.group_bytes(1024) / (16 * 1024) == BITS[kind]
    assert kind.for_groups(0) == kind == weight_type_named(kind.name)
    assert kind.for_groups(1024) == kind
    for group in (64, 32):
        sized = kind.for_groups(group)
        assert sized.name == f"{kind.name}/{group}"
        assert weight_type_named(sized.name) == sized
        assert sized.for_groups(0) == kind
    assert kind.for_groups(96).group == 32
    for name in (f"{kind.name}/128", f"{kind.name}/48", f"{kind.name}/x", f"{kind.name}/"):
        assert weight_type_named(name) is None


@pytest.mark.parametrize("kind", [*GROUPED, NVFP4], ids=lambda kind: kind.name)
def test_rounding_is_to_the_nearest(kind):
    """Of a step between integers half is lost at most, of floats half of what lies between two of them."""
    x = (np.random.default_rng(6).standard_normal((16, 256)) * 0.05).astype(np.float32)
    found = kind.unpack(kind.pack(x)).astype(np.float64)
    largest = np.abs(x.reshape(16, -1, 128)).max(axis=2).repeat(128, axis=1).astype(np.float64)
    steps = {FP8: 16, INT4: 14, INT4_F16: 14, INT4_BF16: 14, INT8: 254, NVFP4: 5}[kind]
    assert np.all(np.abs(found - x) <= largest / steps * 1.13)


def test_every_float_of_8_bits():
    finite = E4M3[np.isfinite(E4M3)]
    assert (np.isnan(E4M3[[0x7F, 0xFF]]).all(), len(finite), finite.max(), finite.min()) == (True, 254, 448, -448)
    assert (E4M3[1], E4M3[8], E4M3[0x38]) == (2.0**-9, 2.0**-6, 1)
    assert np.array_equal(as_e4m3(finite), np.flatnonzero(np.isfinite(E4M3)))
    assert list(E2M1) == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert (E8M0[127], E8M0[0], E8M0[254], np.isnan(E8M0[255])) == (1, 2.0**-127, 2.0**127, True)


@given(st.floats(-448, 448, width=32))
def test_floats_of_8_bits_are_the_nearest_and_ties_even(x):
    found = int(as_e4m3(np.array([x], np.float32))[0])
    distances = np.abs(np.nan_to_num(E4M3, nan=1e9).astype(np.float64) - x)
    assert distances[found] == distances.min()
    nearest = np.flatnonzero(distances == distances.min())
    assert len(np.unique(np.abs(E4M3[nearest]))) == 1 or found % 2 == 0


def test_nvfp4_values_are_e2m1_times_e4m3_times_the_tensors():
    rng = np.random.default_rng(7)
    nibbles, scales = rng.integers(0, 16, (16, 4, 32), np.uint8), rng.integers(0, 127, (16, 4, 2), np.uint8)
    whole = np.full((16, 4), 0.0123, np.float32)
    found = NVFP4.unpack(NVFP4.pack_blocks((nibbles, scales, whole), 64))
    exact = E2M1[nibbles].astype(np.float64).reshape(16, 4, 2, 16) * E4M3[scales].astype(np.float64)[..., None]
    expected = exact * whole[:, :, None, None].astype(np.float64)
    assert np.array_equal(found, expected.reshape(16, -1).astype(np.float32))
