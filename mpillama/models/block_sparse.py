"""Attention to the blocks of positions that an index chooses (MSA, https://arxiv.org/abs/2606.13392).

Beside keys and values each position leaves one index key, the same on every rank; each KV head has index queries. A
token attends to a few blocks: its own, and those that match best. Keys and values of the others are not read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.library import Team
from mpillama.models.attention import (
    BLOCK_POSITIONS,
    KV_TYPES,
    MOST_CHANNELS,
    SPAN,
    WHOLE,
    CacheArray,
    GroupedQueryAttention,
    KVType,
    Stripe,
)
from mpillama.models.config_values import ConfigValues
from mpillama.models.linear import LayerWeights
from mpillama.models.partition import Partition, Split
from mpillama.models.tensors import TensorSpec, WeightTypes, whole_rows, whole_vector
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import BLOCK, round_up

Q, K = "self_attn.index_q", "self_attn.index_k"
BLOCK_SIZES = tuple(BLOCK_POSITIONS << i for i in range((SPAN // BLOCK_POSITIONS).bit_length()))
"""Whole blocks of the cache that lie in one span."""
SCORE_BYTES = 5
"""Of a block, for a token and a KV head: its score and whether it is kept, of kernels/src/block_sparse.h."""


@dataclass(frozen=True)
class BlockSparseAttention:
    """Grouped queries that see `chosen` blocks of `block` positions, their own and `local` - 1 before it always.

    Each KV head has an index of `index_dim` channels that chooses the others.
    """

    grouped: GroupedQueryAttention
    index_dim: int
    block: int
    chosen: int
    local: int

    @classmethod
    def read(cls, values: ConfigValues, grouped: GroupedQueryAttention) -> "BlockSparseAttention":
        """From Hugging Face's names."""
        found = cls(
            grouped,
            index_dim=values.size("index_head_dim", limit=MOST_CHANNELS),
            block=values.size("index_block_size"),
            chosen=values.size("index_topk_blocks"),
            local=0 if values.given("index_local_blocks") == 0 else values.size("index_local_blocks"),
        )
        heads, turned = grouped.kv_heads, grouped.rotary_channels
        if values.size("index_n_heads") != heads:
            raise values.refuse("index_n_heads", f"mpillama runs one index head for each of the {heads} KV heads")
        if found.block not in BLOCK_SIZES:
            shown = ", ".join(map(str, BLOCK_SIZES))
            raise values.refuse("index_block_size", f"mpillama runs blocks of {shown} positions")
        if found.local > found.chosen:
            raise values.refuse("index_local_blocks", f"only {found.chosen} blocks are chosen (index_topk_blocks)")
        if found.index_dim < turned or found.index_dim % 2:
            raise values.refuse("index_head_dim", f"it must be even and hold the {turned} channels that RoPE turns")
        most = -(-values.size("max_position_embeddings") // found.block)  # room is made for all that are chosen
        return replace(found, chosen=min(found.chosen, most), local=min(found.local, most))

    @property
    def products(self) -> Mapping[str, tuple[str, ...]]:
        found = self.grouped.products
        return {**found, "q/k/v": (*found["q/k/v"], f"{Q}_proj.weight", f"{K}_proj.weight")}

    @property
    def rotary_channels(self) -> int:
        return self.grouped.rotary_channels

    @property
    def follows(self) -> bool:
        return False

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.grouped.splits

    @property
    def padded_index_dim(self) -> int:
        return round_up(self.index_dim, BLOCK)

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        """Index matrices are float32 in any model, as a router is: near ties decide what is read."""
        yield from self.grouped.specs(prefix, hidden_size, types)
        size, heads, split = self.padded_index_dim, self.grouped.kv_heads, self.grouped.kv_split
        q, k = (f"{prefix}{name}_proj.weight" for name in (Q, K))
        yield TensorSpec(
            q, split, heads * size, round_up(hidden_size, BLOCK), F32, size,
            (heads * self.index_dim, hidden_size), row_chunks=heads,
        )  # fmt: skip
        yield whole_rows(k, self.index_dim, hidden_size, WeightTypes(F32))
        for name in (Q, K):
            yield whole_vector(f"{prefix}{name}_norm.weight", self.index_dim, size)

    def cache_arrays(self, part: Partition, blocks: int, kv_type: KVType) -> Sequence[CacheArray]:
        """As without an index, and index keys."""
        index_keys = (blocks, self.padded_index_dim, BLOCK_POSITIONS), index_type(kv_type).dtype
        return *self.grouped.cache_arrays(part, blocks, kv_type), index_keys

    def positions_read(self, positions: int) -> Sequence[int]:
        most = self.chosen * self.block
        return *self.grouped.positions_read(min(positions, most)), positions if positions > most else 0

    def state_arrays(self, part: Partition) -> Sequence[CacheArray]:
        return ()

    @property
    def cache_stripes(self) -> Sequence[Sequence[Stripe]]:
        return *self.grouped.cache_stripes, (WHOLE,)

    @property
    def state_stripes(self) -> Sequence[Sequence[Stripe]]:
        return ()

    def cache_argument(self, arrays: Sequence[np.ndarray], kv_type: KVType) -> "BlockSparseCache":
        *of_heads, index_keys = arrays
        return BlockSparseCache(
            self.grouped.cache_argument(of_heads, kv_type),
            arguments.IndexKeys(arguments.address(index_keys), index_type(kv_type).number),
        )

    def step_widths(self, part: Partition) -> Mapping[str, int]:
        """As without an index; index queries and keys are in `latent`."""
        width = (len(part[self.grouped.kv_split]) + 1) * self.padded_index_dim
        return {**self.grouped.step_widths(part), "latent": width}

    def scratch(self, part: Partition, tokens: int, positions: int, threads: int) -> tuple[int, int]:
        blocks = -(-positions // self.block)
        choosing = tokens * len(part[self.grouped.kv_split]) * blocks * SCORE_BYTES
        return 0, choosing if blocks > self.chosen else 0

    def layer(
        self, weights: LayerWeights, part: Partition, hidden_size: int, norm: str, eps: float
    ) -> arguments.BlockSparseLayer:
        attention = self.grouped.layer(weights, part, hidden_size, norm, eps)
        index_q, index_k = (weights.matrix(f"{name}_proj.weight").column_parallel() for name in (Q, K))
        layer = arguments.BlockSparseLayer(
            attention=attention, index_q=index_q, index_k=index_k, index_q_norm=weights.address(f"{Q}_norm.weight"),
            index_k_norm=weights.address(f"{K}_norm.weight"), index_dim=self.padded_index_dim,
            index_channels=self.index_dim, block=self.block, chosen=self.chosen, local=self.local,
        )  # fmt: skip
        layer.kept = attention
        return layer

    def begin(self, team: Team, layer: arguments.BlockSparseLayer, step: arguments.Step) -> bool:
        return False

    def run(
        self,
        team: Team,
        layer: arguments.BlockSparseLayer,
        cache: "BlockSparseCache",
        step: arguments.Step,
        total: arguments.Sum | None,
    ) -> bool:
        layer.attention.cache, layer.index_keys = cache.of_heads, cache.index_keys
        return team.block_sparse_half(layer, step, total)

    def output_bias_of(self, weights: LayerWeights) -> np.ndarray | None:
        return self.grouped.output_bias_of(weights)

    piece_sizes: ClassVar[None] = None

    def in_pieces(self, layer: arguments.BlockSparseLayer, parts: Sequence[Partition], rank: int) -> None:
        return None


@dataclass(frozen=True)
class BlockSparseCache:
    """One layer's cache, for kernels."""

    of_heads: arguments.Cache
    index_keys: arguments.IndexKeys


def index_type(kv_type: KVType) -> KVType:
    """How index keys are kept: in float32 if all keys are, else in float16."""
    return kv_type if kv_type.dtype == np.float32 else KV_TYPES["f16"]
