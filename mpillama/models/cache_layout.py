"""How a block of the KV cache, or a recurrent state, lies in a file: by layers and units, so any rank finds its part.

What a rank holds of a layer's array are stripes: units of a split, such as KV heads, one after the other. In a file all
stripes of all layers follow each other, and each unit of each is a record of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np

from mpillama.models.attention import KV_TYPES, CacheArray, Stripe
from mpillama.models.cache import LayerCache
from mpillama.models.config import ModelConfig
from mpillama.models.family import Block
from mpillama.models.partition import Partition, Split

Kind = Literal["block", "state"]
"""What a file holds: keys and values of 64 positions, or the state of recurrent layers behind them."""
StripeKey = tuple[int, int, int]
"""Layer, array, stripe."""


@dataclass(frozen=True)
class Coverage:
    """Which layers, and which units of each split, somebody holds."""

    layers: range
    units: Mapping[Split, range]

    @classmethod
    def of_rank(cls, config: ModelConfig, part: Partition, kind: Kind) -> "Coverage":
        """What a rank has of the blocks that are its own, or of all states."""
        layers = part.layers or range(config.num_hidden_layers)
        stripes = [of_array for block in config.blocks for of_array in _stripes(block, kind)]
        splits = {stripe.split for of_array in stripes for stripe in of_array if stripe.split is not None}
        whole = kind == "block" and part.holders > 1
        units = {split: range(split.count) if whole else part[split] for split in sorted(splits, key=_order)}
        return cls(layers, units)

    def as_json(self) -> dict[str, Any]:
        units = [[*_order(split), own.start, own.stop] for split, own in self.units.items()]
        return {"layers": [self.layers.start, self.layers.stop], "units": units}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Coverage":
        """ValueError, TypeError or KeyError for what is none."""
        units = {Split(str(k), int(c), int(g)): range(int(a), int(b)) for k, c, g, a, b in found["units"]}
        first, last = found["layers"]
        return cls(range(int(first), int(last)), units)


@dataclass(frozen=True)
class Run:
    """The units of one stripe in a file: from byte `offset` and record `record` on, each of `bytes` bytes.

    `start` is where the stripe begins along its axis.
    """

    key: StripeKey
    stripe: Stripe
    units: range
    bytes: int
    offset: int
    record: int
    start: int

    @property
    def size(self) -> int:
        return self.bytes * len(self.units)


class Layout:
    """Where a file of a `kind` has what its `coverage` names; IndexError or KeyError for another model's coverage."""

    def __init__(self, config: ModelConfig, part: Partition, kv_type: str, kind: Kind, coverage: Coverage):
        self.kind: Kind = kind
        self.coverage = coverage
        self.runs: dict[StripeKey, Run] = {}
        self.size = self.records = 0
        self._first_layer = coverage.layers.start
        self._skipped: list[int] = []
        if len(coverage.layers) and not 0 <= coverage.layers.start < coverage.layers.stop <= len(config.blocks):
            raise IndexError(f"layers {coverage.layers}")
        for layer in coverage.layers:
            block = config.blocks[layer]
            arrays = list(_arrays(block, part, kv_type, kind))
            # States stand behind what the same layer keeps of positions.
            self._skipped.append(len(block.attention.cache_stripes) if kind == "state" else 0)
            for number, (array, stripes) in enumerate(zip(arrays, _stripes(block, kind), strict=True)):
                self._add(layer, number, array, stripes)

    def _add(self, layer: int, number: int, array: CacheArray, stripes: Sequence[Stripe]) -> None:
        (shape, dtype), start = array, 0
        for place, stripe in enumerate(stripes):
            units = range(1) if stripe.split is None else self.coverage.units[stripe.split]
            width = shape[stripe.axis] if stripe.split is None else stripe.width
            size = width * prod(n for axis, n in enumerate(shape) if axis != stripe.axis) * dtype.itemsize
            if size and len(units):
                key = layer, number, place
                self.runs[key] = Run(key, stripe, units, size, self.size, self.records, start)
                self.size += size * len(units)
                self.records += len(units)
            start += width * len(units)

    @cached_property
    def record_sizes(self) -> np.ndarray:
        """Bytes of each record, int64."""
        return np.repeat([r.bytes for r in self.runs.values()], [len(r.units) for r in self.runs.values()])

    def views(self, layers: Sequence[LayerCache], place: int) -> Iterator[tuple[Run, np.ndarray]]:
        """Each run with the part of the cache that it is: [units, …], a view; `place` is the block or the state slot.

        The layers of the cache must be those of this layout.
        """
        for run in self.runs.values():
            layer, number, _ = run.key
            local = layer - self._first_layer
            array = np.moveaxis(layers[local][self._skipped[local] + number][place], run.stripe.axis, 0)
            width = len(array) if run.stripe.split is None else run.stripe.width
            of_run = array[run.start : run.start + width * len(run.units)]
            yield run, of_run.reshape(len(run.units), width, *array.shape[1:])


def _order(split: Split) -> tuple[str, int, int]:
    return split.kind, split.count, split.group


def _stripes(block: Block, kind: Kind) -> Sequence[Sequence[Stripe]]:
    return block.attention.cache_stripes if kind == "block" else block.attention.state_stripes


def _arrays(block: Block, part: Partition, kv_type: str, kind: Kind) -> Iterator[CacheArray]:
    """Shape of what one block or state has in each array, and dtype."""
    if kind == "state":
        yield from block.attention.state_arrays(part)
    else:
        for shape, dtype in block.attention.cache_arrays(part, 1, KV_TYPES[kv_type]):
            yield shape[1:], dtype
