"""Rows of weights as codes and the scales of groups of columns: what Hugging Face's quantised tensors come down to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from mpillama.quant.weight_type import BLOCK, Blocks, Float32


def _e4m3() -> Float32:
    """The value of every byte as a float of 8 bits (E4M3, without infinities; 0x7f and 0xff are no numbers)."""
    bytes_ = np.arange(256)
    exponents, mantissas = bytes_ >> 3 & 15, bytes_ & 7
    values = np.where(exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * 2.0 ** (exponents - 10))
    values = np.where(bytes_ & 127 == 127, np.nan, values)
    signed: Float32 = np.where(bytes_ & 128, -values, values).astype(np.float32)
    return signed


E4M3 = _e4m3()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
E8M0 = np.concatenate([np.ldexp(np.float32(1), np.arange(255) - 127), [np.nan]]).astype(np.float32)
"""A power of two for every byte; 255 is no number."""


def as_float32(bits: np.ndarray, dtype: str) -> Float32:
    """The values of an array whose bits are those of a type of safetensors."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    tables: Mapping[str, Float32] = {"F8_E4M3": E4M3, "F8_E8M0": E8M0, "U8": E8M0}
    found: Float32 = tables[dtype][bits] if dtype in tables else bits.astype(np.float32)
    return found


@dataclass(frozen=True)
class Coded:
    """value = number * scale, where the number is the code itself or its entry of `table`, in which 0 stands for 0.

    `codes` [rows, columns]; `scales` [rows, groups] are bits of safetensors' type `dtype`, `group` int [columns] says
    which of them a column has, -1 for padding. Integers that were stored with zero points are here relative to them;
    `zeros` [rows, groups] is what was subtracted. `whole` is one more factor, that of the tensor.
    """

    codes: np.ndarray
    scales: np.ndarray
    dtype: str
    group: np.ndarray
    table: Float32 | None = None
    zeros: np.ndarray | None = None
    whole: np.float32 | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, index: slice) -> "Coded":
        """Some of the rows."""
        zeros = None if self.zeros is None else self.zeros[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=zeros)

    def padded(self, width: int, chunks: int) -> "Coded":
        """With `chunks` equal parts of the columns each padded to its share of `width`."""
        rows, columns = self.codes.shape
        if columns == width:
            return self
        codes = np.zeros((rows, chunks, width // chunks), self.codes.dtype)
        group = np.full((chunks, width // chunks), -1)
        if columns:
            codes[:, :, : columns // chunks] = self.codes.reshape(rows, chunks, -1)
            group[:, : columns // chunks] = self.group.reshape(chunks, -1)
        return replace(self, codes=codes.reshape(rows, width), group=group.reshape(width))

    @property
    def factors(self) -> Float32:
        """The scales as float32, without that of the tensor."""
        return as_float32(self.scales, self.dtype)

    def decode(self) -> Float32:
        """The values, rounded to float32 after each multiplication; padding is 0."""
        numbers = self.codes.astype(np.float32) if self.table is None else self.table[self.codes]
        with np.errstate(invalid="ignore", over="ignore"):
            values = numbers * self.factors[:, self.group] if self.scales.size else numbers
            return values if self.whole is None else values * self.whole

    # -- for types whose blocks of 32 (or less) lie within a group --------------------------------------------------

    def of_blocks(self, by_group: np.ndarray, size: int = BLOCK) -> np.ndarray:
        """Of an array [rows, groups] the entries of each block of `size` columns; 0 where all is padding."""
        firsts = self.group[::size]
        if not by_group.shape[1]:
            return np.zeros((len(by_group), len(firsts)), by_group.dtype)
        found: np.ndarray = np.where(firsts < 0, np.zeros((), by_group.dtype), by_group[:, np.maximum(firsts, 0)])
        return found

    def code_blocks(self) -> np.ndarray:
        """The codes as [rows, blocks, 32]."""
        blocks: np.ndarray = self.codes.reshape(len(self.codes), -1, BLOCK)
        return blocks

    def raised_blocks(self, dtype: type[np.generic] = np.uint8) -> np.ndarray:
        """Integers as they were stored, [rows, blocks, 32]: with their zero points."""
        assert self.zeros is not None
        raised = self.code_blocks() + self.of_blocks(self.zeros)[:, :, None]
        stored: np.ndarray = raised.astype(dtype)
        return stored


@runtime_checkable
class KeepsCodes(Protocol):
    """A weight type that has the numbers of some checkpoint as they are, spread over several arrays there."""

    def take(self, coded: Coded) -> Blocks:
        """Its own numbers of them; columns are padded to whole blocks of 32, each of which has a scale or two."""
