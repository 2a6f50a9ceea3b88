"""Row lanes: the one order of weights for file, memory and kernels.

Rows are taken in groups of 16; within a group k advances and the 16 rows lie side by side. Quantised blocks of 32
k-values are 8 steps of 64 bytes (16 rows x 4 k-values); q4_0 packs steps j and j+4 into the nibbles of one byte.
A column-parallel matrix is [groups, …]; a row-parallel one is cut into panels of columns: [panels, groups, …].
"""

from collections.abc import Sequence

import numpy as np

from mpillama.layout import blocks
from mpillama.layout.weight_types import BF16, BLOCK, F16, F32, LANES, Q4_0, Q8_0, WeightType

Arrays = tuple[np.ndarray, ...]
"""(values,) for float types, (values, scales) for quantised types; stored dtypes."""


def pack(x: np.ndarray, weight_type: WeightType, panel: int | None = None) -> Arrays:
    """Turn float32 [rows, k] into row lanes of `weight_type`; with `panel`, into panels of that many columns.

    rows must be a multiple of 16 and k (and panel) of 32: pad with zeros before.
    """
    if weight_type.quantised:
        quantise = blocks.quantise_q8_0 if weight_type is Q8_0 else blocks.quantise_q4_0
        return pack_blocks(*quantise(x), weight_type, panel)
    return (to_panels(_float_lanes(_as_stored(x, weight_type)), panel),)


def pack_blocks(values: np.ndarray, scales: np.ndarray, weight_type: WeightType, panel: int | None = None) -> Arrays:
    """Turn quantised blocks [rows, k/32, 32] and scales [rows, k/32] into row lanes."""
    groups, count = len(values) // LANES, values.shape[1]
    steps = values.reshape(groups, LANES, count, 8, 4).transpose(0, 2, 3, 1, 4)
    if weight_type is Q4_0:
        steps = steps[:, :, :4] | steps[:, :, 4:] << 4
    lanes = np.ascontiguousarray(steps).reshape(groups, count, weight_type.block_bytes)
    scale_lanes = np.ascontiguousarray(scales.reshape(groups, LANES, count).swapaxes(1, 2))
    block_panel = panel // BLOCK if panel else None
    return to_panels(lanes, block_panel), to_panels(scale_lanes, block_panel)


def unpack_blocks(arrays: Sequence[np.ndarray], weight_type: WeightType) -> tuple[np.ndarray, np.ndarray]:
    """Undo pack_blocks: return blocks [rows, k/32, 32] and scales [rows, k/32]."""
    lanes, scales = (from_panels(a) for a in arrays)
    groups, count = lanes.shape[:2]
    steps = lanes.reshape(groups, count, -1, LANES, 4)
    if weight_type is Q4_0:
        steps = np.concatenate([steps & 15, steps >> 4], axis=2)
    values = steps.transpose(0, 3, 1, 2, 4).reshape(groups * LANES, count, BLOCK)
    return values, scales.swapaxes(1, 2).reshape(groups * LANES, count)


def unpack(arrays: Sequence[np.ndarray], weight_type: WeightType) -> np.ndarray:
    """Return the float32 matrix [rows, k] that row lanes hold."""
    if weight_type.quantised:
        dequantise = blocks.dequantise_q8_0 if weight_type is Q8_0 else blocks.dequantise_q4_0
        return dequantise(*unpack_blocks(arrays, weight_type))
    lanes = from_panels(arrays[0])
    rows = lanes.swapaxes(1, 2).reshape(-1, lanes.shape[1])
    return _from_stored(rows, weight_type)


def to_panels(lanes: np.ndarray, panel: int | None) -> np.ndarray:
    """Cut [groups, k, …] into [panels, groups, panel, …]; None leaves it as it is."""
    if panel is None:
        return lanes
    groups, k, *rest = lanes.shape
    return np.ascontiguousarray(lanes.reshape(groups, k // panel, panel, *rest).swapaxes(0, 1))


def from_panels(lanes: np.ndarray) -> np.ndarray:
    """Undo to_panels, if there are panels."""
    if lanes.ndim == 3:
        return lanes
    panels, groups, panel, *rest = lanes.shape
    return lanes.swapaxes(0, 1).reshape(groups, panels * panel, *rest)


def _float_lanes(x: np.ndarray) -> np.ndarray:
    """[rows, k] as [groups, k, 16]."""
    return np.ascontiguousarray(x.reshape(-1, LANES, x.shape[1]).swapaxes(1, 2))


def _as_stored(x: np.ndarray, weight_type: WeightType) -> np.ndarray:
    """Round float32 to the stored dtype, to nearest even; bfloat16 as bit patterns."""
    if weight_type is BF16:
        return round_to_bfloat16(x)
    with np.errstate(over="ignore"):
        return x.astype(weight_type.stored)


def _from_stored(x: np.ndarray, weight_type: WeightType) -> np.ndarray:
    """Undo _as_stored."""
    if weight_type is BF16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    assert weight_type in (F32, F16)
    return x.astype(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bit patterns (uint16), to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)
