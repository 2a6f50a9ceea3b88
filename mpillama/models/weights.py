"""This rank's slices of all weights, read straight to the place where the kernels use them."""

import mmap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mpillama.kernels.library import Team
from mpillama.models.config import ModelConfig
from mpillama.models.linear import LayerWeights, Matrix
from mpillama.models.partition import Partition
from mpillama.models.tensors import (
    EH_PROJ,
    EMBEDDING,
    EMBEDDING_NORM,
    FINAL_NORM,
    HIDDEN_NORM,
    LM_HEAD,
    TensorSpec,
    layer_prefix,
)
from mpillama.quant.weight_type import round_up

Read = Callable[[TensorSpec, range, Sequence[np.ndarray]], None]

"""Fills the arrays of a tensor with a range of its units."""

Attend = Callable[[Sequence[Future[None]]], None]
"""What the main thread does while tensors are read; it returns, or raises what failed, when they are.

With no tasks it is called in the midst of other long work.
"""

ARENA_ALIGNMENT = 4096
Loaded = Matrix | np.ndarray


@dataclass(frozen=True)
class JointInput:
    """How a layer that drafts tokens makes its input of an embedding and a hidden state."""

    projection: Matrix
    embedding_norm: np.ndarray
    hidden_norm: np.ndarray


@dataclass(frozen=True)
class Weights:
    """All weights of a rank; with tied embeddings `lm_head` is `embed_tokens`."""

    embed_tokens: Matrix
    layers: tuple[LayerWeights, ...]
    norm: np.ndarray
    lm_head: Matrix
    bytes: int
    joint: JointInput | None = None

    def bytes_per_step(self, tokens: int = 1) -> int:
        """Bytes that a step streams: all but an embedding that is not the head, and experts that no token chose.

        For several tokens that is an expectation: as if each chose its experts evenly.
        """
        idle = round(sum(layer.bytes_unread(tokens) for layer in self.layers))
        return self.bytes - idle - (0 if self.lm_head is self.embed_tokens else self.embed_tokens.bytes)


def slice_shapes(spec: TensorSpec, part: Partition) -> list[tuple[str, tuple[int, ...]]]:
    """The dtypes and shapes of the arrays that this rank holds of a tensor."""
    units = len(spec.units_of(part))
    return [(a.dtype, a.slice_shape(units)) for a in spec.arrays()]


def slice_bytes(specs: Sequence[TensorSpec], part: Partition) -> int:
    """Bytes of this rank's slices of all tensors."""
    return sum(_array_bytes(dtype, shape) for spec in specs for dtype, shape in slice_shapes(spec, part))


def _array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = np.dtype(dtype).itemsize
    for length in shape:
        count *= length
    return count


class Arena:
    """One anonymous mapping for all weights, in huge pages where the system has them."""

    def __init__(self, size: int):
        self.memory = mmap.mmap(-1, max(size, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._advise_huge_pages()
        self.used = 0

    def _advise_huge_pages(self) -> None:
        try:
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return  # a kernel without transparent huge pages: only slower

    def take(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return an unfilled array at the next aligned address."""
        start, count = self.used, _array_bytes(dtype, shape)
        self.used = round_up(start + count, ARENA_ALIGNMENT)
        return np.ndarray(shape, dtype, self.memory, start) if count else np.empty(shape, dtype)


def arena_bytes(specs: Sequence[TensorSpec], part: Partition) -> int:
    """Bytes of the mapping that holds this rank's slices."""
    shapes = [shape for spec in specs for shape in slice_shapes(spec, part)]
    return sum(round_up(_array_bytes(*shape), ARENA_ALIGNMENT) for shape in shapes)


def load_weights(
    config: ModelConfig, specs: Sequence[TensorSpec], part: Partition, read: Read, at_once: int = 1,
    team: Team | None = None, attend: Attend | None = None,
) -> Weights:  # fmt: skip
    """Allocate this rank's slices and fill them with `read`, up to `at_once` tensors at the same time.

    The kernels' threads, the `team`, touch the memory first, so that it lies near them.
    """
    arena = Arena(arena_bytes(specs, part))
    slices = [[arena.take(dtype, shape) for dtype, shape in slice_shapes(spec, part)] for spec in specs]
    for array in (a for arrays in slices for a in arrays):
        if team:
            team.touch_pages(array.reshape(-1).view(np.uint8))
        if attend:
            attend([])
    with ThreadPoolExecutor(at_once) as pool:
        tasks = [pool.submit(read, s, s.units_of(part), a) for s, a in zip(specs, slices, strict=True)]
        try:
            (attend or _finish)(tasks)
        finally:
            pool.shutdown(cancel_futures=True)
    loaded = {s.name: a[0] if s.vector else _matrix(s, a) for s, a in zip(specs, slices, strict=True)}
    return _assemble(config, specs, loaded, slice_bytes(specs, part))


def _finish(tasks: Sequence[Future[None]]) -> None:
    """Wait for all reads; the first that fails is raised."""
    for task in tasks:
        task.result()


def _matrix(spec: TensorSpec, arrays: Sequence[np.ndarray]) -> Matrix:
    return Matrix.of(spec.weight_type, arrays)


def _assemble(config: ModelConfig, specs: Sequence[TensorSpec], loaded: Mapping[str, Loaded], size: int) -> Weights:
    of_layers: list[dict[str, Loaded]] = [{} for _ in config.blocks]
    experts: list[list[str]] = [[] for _ in config.blocks]
    for spec in specs:
        if spec.layer is not None:
            name = spec.name.removeprefix(layer_prefix(spec.layer))
            of_layers[spec.layer][name] = loaded[spec.name]
            experts[spec.layer] += [name] * bool(spec.experts and not spec.vector)
    layers = zip(of_layers, experts, config.blocks, strict=True)
    embedding, joint = loaded[EMBEDDING], None
    if EH_PROJ in loaded:
        joint = JointInput(loaded[EH_PROJ], loaded[EMBEDDING_NORM], loaded[HIDDEN_NORM])  # type: ignore[arg-type]
    return Weights(
        embed_tokens=embedding,  # type: ignore[arg-type]
        layers=tuple(LayerWeights(tensors, names, block.mlp.idle) for tensors, names, block in layers),
        norm=loaded[FINAL_NORM],  # type: ignore[arg-type]
        lm_head=loaded.get(LM_HEAD, embedding),  # type: ignore[arg-type]
        bytes=size,
        joint=joint,
    )
