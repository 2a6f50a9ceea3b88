"""Kinds of attention, the first half of a decoder layer.

A kind is data: it reads itself out of a configuration, and says which tensors it has and how ranks divide them, what it
keeps of the past, and how kernels are called. `Attention` is what the rest of the package asks of any kind.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpillama.errors import UserError
from mpillama.kernels import arguments
from mpillama.kernels.arguments import HeadNorm
from mpillama.kernels.library import Team
from mpillama.models.attention_pieces import GroupedPieces, Pieces, PieceSizes
from mpillama.models.config_values import ConfigValues
from mpillama.models.linear import LayerWeights
from mpillama.models.partition import Partition, Split
from mpillama.models.tensors import PartOfHeads, TensorSpec, WeightTypes, whole_vector
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import BLOCK, LANES, round_up

BLOCK_POSITIONS = 64
"""Positions of a block of the cache."""
SPAN = 1024
"""Positions that are added up before they meet others, of kernels/src/attention_plan.h."""
MOST_CHANNELS = 65536

CacheArray = tuple[tuple[int, ...], np.dtype[np.generic]]
"""Shape and dtype of an array of one layer's cache."""


@dataclass(frozen=True)
class Stripe:
    """Part of an array of one block, or of one state, that ranks divide: `width` entries along `axis` for each unit.

    Without `split` every rank holds all of the array.
    """

    split: Split | None
    axis: int = 0
    width: int = 1


WHOLE = Stripe(None)


@dataclass(frozen=True)
class KVType:
    """How keys and values are kept: `number` is that of kernels/src/cache.h, `scaled` means a scale for 32 channels.

    `packed` channels share an item of the array.
    """

    dtype: np.dtype[np.generic]
    number: int
    scaled: bool = False
    packed: int = 1


KV_TYPES: Mapping[str, KVType] = {
    "f16": KVType(np.dtype(np.int16), 1),  # bit patterns
    "f32": KVType(np.dtype(np.float32), 0),
    "q8": KVType(np.dtype(np.int8), 3, scaled=True),
    "q4": KVType(np.dtype(np.uint8), 4, scaled=True, packed=2),
}


class Attention(Protocol):
    """What any kind of attention says of itself."""

    @property
    def products(self) -> Mapping[str, tuple[str, ...]]:
        """Of kernels.library.PARTS, the matrices that each reads, by their names within the layer."""

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that RoPE turns."""

    @property
    def follows(self) -> bool:
        """Whether it sees the positions that a layer before it has chosen, which then lies on the same ranks."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """By which units ranks divide it, the one that decides who has work first."""

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        """Its tensors in the order of the file; `prefix` is that of the layer."""

    def cache_arrays(self, part: Partition, blocks: int, kv_type: KVType) -> Sequence[CacheArray]:
        """What a rank keeps of the past in one layer, in blocks of 64 positions."""

    def positions_read(self, positions: int) -> Sequence[int]:
        """Of each of cache_arrays, of how many positions a token reads that sees up to so many."""

    def state_arrays(self, part: Partition) -> Sequence[CacheArray]:
        """What a rank keeps of each sequence in one layer, however long it is."""

    @property
    def cache_stripes(self) -> Sequence[Sequence[Stripe]]:
        """Of each of cache_arrays, the stripes that follow each other along an axis of what one block has."""

    @property
    def state_stripes(self) -> Sequence[Sequence[Stripe]]:
        """The same of state_arrays."""

    def cache_argument(self, arrays: Sequence[np.ndarray], kv_type: KVType) -> Any:
        """What kernels are told of the arrays of cache_arrays and then those of states [slots, …]."""

    def step_widths(self, part: Partition) -> Mapping[str, int]:
        """Channels of the step's arrays q, k, v, context, latent, gates on a rank, and how many positions are chosen.

        What is left out is not needed.
        """

    def scratch(self, part: Partition, tokens: int, positions: int, threads: int) -> tuple[int, int]:
        """Bytes that kernels take, of each thread and in common, for steps of up to so many tokens and positions.

        What is small beside the rest may be left out.
        """

    def layer(self, weights: LayerWeights, part: Partition, hidden_size: int, norm: str, eps: float) -> Any:
        """What kernels are told of a layer; `norm` names the vector of its norm."""

    def begin(self, team: Team, layer: Any, step: arguments.Step) -> bool:
        """Compute what must be summed over ranks before `run` goes on, into step.squares; False if nothing must."""

    def run(self, team: Team, layer: Any, cache: Any, step: arguments.Step, total: arguments.Sum | None) -> bool:
        """Norm, attention and output projection: the rest as Team.attention_half says."""

    def output_bias_of(self, weights: LayerWeights) -> np.ndarray | None:
        """What is added once after the sum over ranks."""

    @property
    def piece_sizes(self) -> PieceSizes | None:
        """What ranks exchange if each holds some positions; None if there are none to hold."""

    def in_pieces(self, layer: Any, parts: Sequence[Partition], rank: int) -> Pieces | None:
        """How such ranks, with these parts, attend together; `layer` is that of `rank`."""


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Query heads in groups that share a KV head.

    `qkv_bias` and `output_bias` are biases of the projections, `qk_norm` an RMSNorm of queries and keys where
    `head_norm` says; after RoPE it has no weights. A token sees the last `window` positions, or those of its `chunk`;
    0 sees all.
    Scores are multiplied by `scale`, 0 for the usual 1 / sqrt(head_dim), and bent to +-soft_cap unless that is 0. RoPE
    turns the first `turned` channels of a head, None for all. With `sinks` each head has a score more, of no value.
    `gated`: heads are multiplied by the sigmoids of a projection of their own, which a checkpoint has together with
    q_proj, head by head, as q_gate_proj.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    window: int = 0
    chunk: int = 0
    scale: float = 0.0
    soft_cap: float = 0.0
    turned: int | None = None
    head_norm: HeadNorm = HeadNorm.BEFORE_ROPE
    sinks: bool = False
    gated: bool = False

    @classmethod
    def read(cls, values: ConfigValues, *, qkv_bias: bool = False, qk_norm: bool = False) -> "GroupedQueryAttention":
        """From Hugging Face's names; `attention_bias` adds biases to all four projections."""
        hidden, heads, biased = (
            values.size("hidden_size"),
            values.size("num_attention_heads"),
            values.flag("attention_bias"),
        )
        found = cls(
            heads=heads,
            kv_heads=values.size("num_key_value_heads", heads),
            head_dim=values.size("head_dim", hidden // heads, limit=MOST_CHANNELS),
            qkv_bias=qkv_bias or biased,
            output_bias=biased,
            qk_norm=qk_norm,
        )
        if found.heads % found.kv_heads:
            raise UserError(
                f"The model's configuration has num_attention_heads={found.heads}, no multiple of "
                f"num_key_value_heads={found.kv_heads}: the file is damaged or no Llama model."
            )
        if found.head_dim % 2:
            raise UserError(f"The model's configuration has head_dim={found.head_dim}: it must be even for RoPE.")
        return found

    @property
    def products(self) -> Mapping[str, tuple[str, ...]]:
        names = ("q", "k", "v", *(("gate",) if self.gated else ()))
        return {
            "q/k/v": tuple(f"self_attn.{name}_proj.weight" for name in names),
            "o_proj": ("self_attn.o_proj.weight",),
        }

    @property
    def padded_head_dim(self) -> int:
        """head_dim with zeros up to whole blocks of 32, so that every head is a panel of its own."""
        return round_up(self.head_dim, BLOCK)

    @property
    def rotary_channels(self) -> int:
        return self.head_dim if self.turned is None else self.turned

    @property
    def follows(self) -> bool:
        return False

    @property
    def query_split(self) -> Split:
        return Split("heads", self.heads)

    @property
    def kv_split(self) -> Split:
        return Split("kv_heads", self.kv_heads, self.heads // self.kv_heads)

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.query_split, self.kv_split

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        prefix, hidden, head = prefix + "self_attn.", round_up(hidden_size, BLOCK), self.padded_head_dim
        for letter in "qkv":
            split = self.query_split if letter == "q" else self.kv_split
            name, rows, source = f"{prefix}{letter}_proj", split.count * head, split.count * self.head_dim
            yield TensorSpec(
                name + ".weight", split, rows, hidden, types.of(name + ".weight"), head, (source, hidden_size),
                row_chunks=split.count, part_of=self._part_of_both(prefix, 0) if letter == "q" and self.gated else None,
            )  # fmt: skip
            if self.qkv_bias:
                yield TensorSpec(
                    name + ".bias", split, rows, 1, F32, head, (source,), row_chunks=split.count, vector=True
                )
            if self.qk_norm and letter != "v":
                yield from self._norm(f"{prefix}{letter}_norm.weight", split)
        if self.gated:
            name, rows, source = f"{prefix}gate_proj.weight", self.heads * head, self.heads * self.head_dim
            yield TensorSpec(
                name, self.query_split, rows, hidden, types.of(name), head, (source, hidden_size),
                row_chunks=self.heads, part_of=self._part_of_both(prefix, self.head_dim),
            )  # fmt: skip
        if self.sinks:
            yield TensorSpec(prefix + "sinks", self.query_split, self.heads, 1, F32, 1, (self.heads,), vector=True)
        name = prefix + "o_proj"
        yield TensorSpec(
            name + ".weight", self.query_split, hidden, self.heads * head, types.of(name + ".weight"), head,
            (hidden_size, self.heads * self.head_dim), head, column_chunks=self.heads,
        )  # fmt: skip
        if self.output_bias:
            yield whole_vector(name + ".bias", hidden_size, hidden)

    def _part_of_both(self, prefix: str, first: int) -> PartOfHeads:
        return PartOfHeads(f"{prefix}q_gate_proj.weight", self.heads, 2 * self.head_dim, first, self.head_dim)

    def _norm(self, name: str, split: Split) -> Iterator[TensorSpec]:
        head, count = self.padded_head_dim, split.count
        if self.head_norm == HeadNorm.WHOLE_PROJECTION:
            source = (count * self.head_dim,)
            yield TensorSpec(name, split, count * head, 1, F32, head, source, row_chunks=count, vector=True)
        elif self.head_norm == HeadNorm.BEFORE_ROPE:
            yield whole_vector(name, self.head_dim, head)

    def cache_arrays(self, part: Partition, blocks: int, kv_type: KVType) -> Sequence[CacheArray]:
        """Keys, their scales, values, their scales, as kernels/src/attention.h describes them."""
        heads, head = len(part[self.kv_split]) if part.holders == 1 else self.kv_heads, self.padded_head_dim
        scales = (blocks, heads, head // BLOCK if kv_type.scaled else 0, BLOCK_POSITIONS), np.dtype(np.uint16)
        keys = (blocks, heads, head // kv_type.packed, BLOCK_POSITIONS), kv_type.dtype
        values = (blocks, heads, BLOCK_POSITIONS, head // kv_type.packed), kv_type.dtype
        return keys, scales, values, scales

    def positions_read(self, positions: int) -> Sequence[int]:
        return (min(positions, self.window or self.chunk or positions),) * 4

    def state_arrays(self, part: Partition) -> Sequence[CacheArray]:
        return ()

    @property
    def cache_stripes(self) -> Sequence[Sequence[Stripe]]:
        return ((Stripe(self.kv_split),),) * 4

    @property
    def state_stripes(self) -> Sequence[Sequence[Stripe]]:
        return ()

    def cache_argument(self, arrays: Sequence[np.ndarray], kv_type: KVType) -> arguments.Cache:
        return arguments.Cache(*map(arguments.address, arrays), kv_type.number)

    def step_widths(self, part: Partition) -> Mapping[str, int]:
        queries, keys = (len(part[split]) * self.padded_head_dim for split in self.splits)
        return {"q": queries, "k": keys, "v": keys, "context": queries, "latent": queries if self.gated else 0}

    def scratch(self, part: Partition, tokens: int, positions: int, threads: int) -> tuple[int, int]:
        return 0, 0

    def layer(
        self, weights: LayerWeights, part: Partition, hidden_size: int, norm: str, eps: float
    ) -> arguments.AttentionLayer:
        starts = self.head_starts(part)
        q, k, v, o = (weights.matrix(f"self_attn.{letter}_proj.weight") for letter in "qkvo")
        layer = arguments.AttentionLayer(
            q=q.column_parallel(), k=k.column_parallel(), v=v.column_parallel(), o=o.row_parallel(),
            eps=eps, scale=self.scale or 1.0 / math.sqrt(self.head_dim), soft_cap=self.soft_cap,
            hidden_size=hidden_size, heads=int(starts[-1]),
            kv_heads=len(starts) - 1, head_dim=self.padded_head_dim, channels=self.head_dim, window=self.window,
            chunk=self.chunk, head_norm=self.head_norm, q_width=self.heads * self.head_dim,
            k_width=self.kv_heads * self.head_dim,
            first_counted=part[self.query_split].start % self.kv_split.group > 0,
        )  # fmt: skip
        layer.kept = starts, np.ones(self.padded_head_dim, np.float32)
        layer.norm, layer.head_start = weights.address(norm), arguments.address(starts)
        layer.q_bias, layer.k_bias, layer.v_bias = (weights.address(f"self_attn.{x}_proj.bias") for x in "qkv")
        layer.q_norm, layer.k_norm = (weights.address(f"self_attn.{x}_norm.weight") for x in "qk")
        layer.sinks = weights.address("self_attn.sinks")
        if self.gated:
            layer.gate = weights.matrix("self_attn.gate_proj.weight").column_parallel()
        if self.qk_norm and self.head_norm == HeadNorm.AFTER_ROPE:
            layer.q_norm = layer.k_norm = arguments.address(layer.kept[1])
        return layer

    def begin(self, team: Team, layer: arguments.AttentionLayer, step: arguments.Step) -> bool:
        whole = self.qk_norm and self.head_norm == HeadNorm.WHOLE_PROJECTION
        if whole:
            team.project_and_sum(layer, step)
        return whole

    def run(
        self,
        team: Team,
        layer: arguments.AttentionLayer,
        cache: arguments.Cache,
        step: arguments.Step,
        total: arguments.Sum | None,
    ) -> bool:  # fmt: skip
        layer.cache = cache
        if self.qk_norm and self.head_norm == HeadNorm.WHOLE_PROJECTION:
            return team.attend_projected(layer, step, total)
        return team.attention_half(layer, step, total)

    def output_bias_of(self, weights: LayerWeights) -> np.ndarray | None:
        return weights.vector("self_attn.o_proj.bias")

    @property
    def piece_sizes(self) -> PieceSizes:
        head = self.padded_head_dim
        new, record = 2 * self.kv_heads * head, head + LANES + 1
        return PieceSizes(self.heads, head, new, SPAN, record, self.window, self.chunk)

    def in_pieces(self, layer: arguments.AttentionLayer, parts: Sequence[Partition], rank: int) -> Pieces:
        queries, kv = ([part[split] for part in parts] for split in self.splits)
        return GroupedPieces(self.piece_sizes, layer, rank, queries, kv, self.kv_split.group)

    def head_starts(self, part: Partition) -> np.ndarray:
        """int64 [local kv heads + 1]: the local query heads of local KV head i are result[i] : result[i + 1]."""
        queries, kv = part[self.query_split], part[self.kv_split]
        borders = [head * self.kv_split.group for head in (*kv, kv.stop)]
        return np.clip(np.array(borders, np.int64) - queries.start, 0, len(queries))
