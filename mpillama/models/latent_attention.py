"""Multi-head latent attention (https://arxiv.org/abs/2405.04434): all heads read one latent of each position.

Keys and values are never expanded: each head's part of kv_b is multiplied into its queries (k_b, turned) and into what
attention gives (v_b), for prompts as for single tokens, so that a position has the same bits however a prompt is cut.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.kernels import arguments
from mpillama.kernels.library import Team
from mpillama.models.attention import BLOCK_POSITIONS, MOST_CHANNELS, WHOLE, CacheArray, KVType, Stripe
from mpillama.models.attention_pieces import LatentPieces, Pieces, PieceSizes
from mpillama.models.config_values import ConfigValues
from mpillama.models.linear import LayerWeights
from mpillama.models.partition import Partition, Split
from mpillama.models.tensors import PartOfHeads, TensorSpec, WeightTypes, whole_rows, whole_vector
from mpillama.quant.weight_type import BLOCK, LANES, round_up

MOST_SETS, SPAN = 4, 512
"""Sets of 16 rows of a tile, and positions of a span, of kernels/src/latent_attention.h."""
LATENT_EPS = 1e-6
"""Of the norms of compressed queries and latents, whatever rms_norm_eps is: transformers leaves them at the default."""


@dataclass(frozen=True)
class LatentAttention:
    """Heads of `nope` channels without and `rope` channels with rotation, over latents of `kv_rank` channels.

    `q_rank` is that of the queries, 0 if they are not compressed. With `rotary_pairs` neighbouring channels turn
    together. `softmax_factor` is what the usual scale of scores is multiplied by.
    """

    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    rotary_pairs: bool = True
    softmax_factor: float = 1.0

    @classmethod
    def read(cls, values: ConfigValues, softmax_factor: float = 1.0) -> "LatentAttention":
        """From Hugging Face's names; `q_lora_rank` may be null."""
        size = partial(values.size, limit=MOST_CHANNELS)
        found = cls(
            heads=values.size("num_attention_heads"),
            q_rank=0 if values.given("q_lora_rank") is None else size("q_lora_rank"),
            kv_rank=size("kv_lora_rank"),
            nope=size("qk_nope_head_dim"),
            rope=size("qk_rope_head_dim"),
            value=size("v_head_dim"),
            rotary_pairs=values.flag("rope_interleave"),
            softmax_factor=softmax_factor,
        )
        if found.rope % 2:
            raise UserError(f"The model's configuration has qk_rope_head_dim={found.rope}: it must be even for RoPE.")
        return found

    @property
    def products(self) -> Mapping[str, tuple[str, ...]]:
        queries = ("q_a_proj", "q_b_proj") if self.q_rank else ("q_proj",)
        of_parts = {"q/k/v": (*queries, "kv_a_proj_with_mqa", "k_b_proj"), "o_proj": ("v_b_proj", "o_proj")}
        return {part: tuple(f"self_attn.{name}.weight" for name in names) for part, names in of_parts.items()}

    @property
    def rotary_channels(self) -> int:
        return self.rope

    @property
    def cache_width(self) -> int:
        """Channels of a position: its latent and its rotated key, each padded to whole blocks of 32."""
        return round_up(self.kv_rank, BLOCK) + round_up(self.rope, BLOCK)

    @property
    def follows(self) -> bool:
        return False

    @property
    def split(self) -> Split:
        return Split("heads", self.heads)

    @property
    def splits(self) -> tuple[Split, ...]:
        return (self.split,)

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        prefix += "self_attn."
        if self.q_rank:
            yield whole_rows(f"{prefix}q_a_proj.weight", self.q_rank, hidden_size, types)
            yield whole_vector(f"{prefix}q_a_layernorm.weight", self.q_rank, round_up(self.q_rank, BLOCK))
        of_queries = self.nope + self.rope
        if self.q_rank:
            yield self._of_heads(f"{prefix}q_b_proj.weight", of_queries, self.q_rank, types)
        else:
            yield self._of_heads(f"{prefix}q_proj.weight", of_queries, hidden_size, types)
        yield whole_rows(f"{prefix}kv_a_proj_with_mqa.weight", self.kv_rank + self.rope, hidden_size, types)
        yield whole_vector(f"{prefix}kv_a_layernorm.weight", self.kv_rank, round_up(self.kv_rank, BLOCK))
        whole, both = f"{prefix}kv_b_proj.weight", self.nope + self.value
        keys = PartOfHeads(whole, self.heads, both, 0, self.nope, turned=True)
        yield self._of_heads(f"{prefix}k_b_proj.weight", self.kv_rank, self.nope, types, keys)
        of_values = PartOfHeads(whole, self.heads, both, self.nope, self.value)
        yield self._of_heads(f"{prefix}v_b_proj.weight", self.value, self.kv_rank, types, of_values)
        name, value = f"{prefix}o_proj.weight", round_up(self.value, BLOCK)
        yield TensorSpec(
            name, self.split, round_up(hidden_size, BLOCK), self.heads * value, types.of(name), value,
            (hidden_size, self.heads * self.value), value, column_chunks=self.heads,
        )  # fmt: skip

    def _of_heads(
        self, name: str, rows: int, columns: int, types: WeightTypes, part_of: PartOfHeads | None = None
    ) -> TensorSpec:
        """A matrix with so many rows for each head."""
        padded = round_up(rows, BLOCK)
        return TensorSpec(
            name, self.split, self.heads * padded, round_up(columns, BLOCK), types.of(name), padded,
            (self.heads * rows, columns), row_chunks=self.heads, part_of=part_of,
        )  # fmt: skip

    def cache_arrays(self, part: Partition, blocks: int, kv_type: KVType) -> Sequence[CacheArray]:
        """Latents and their scales, the same on every rank, as kernels/src/latent_cache.h describes them."""
        lead, width = (blocks, BLOCK_POSITIONS), self.cache_width
        scales = (*lead, width // BLOCK if kv_type.scaled else 0), np.dtype(np.uint16)
        return ((*lead, width // kv_type.packed), kv_type.dtype), scales

    def positions_read(self, positions: int) -> Sequence[int]:
        return (positions,) * 2

    def state_arrays(self, part: Partition) -> Sequence[CacheArray]:
        return ()

    @property
    def cache_stripes(self) -> Sequence[Sequence[Stripe]]:
        return ((WHOLE,),) * 2

    @property
    def state_stripes(self) -> Sequence[Sequence[Stripe]]:
        return ()

    def cache_argument(self, arrays: Sequence[np.ndarray], kv_type: KVType) -> Any:
        return arguments.LatentCache(*map(arguments.address, arrays), kv_type.number)

    def step_widths(self, part: Partition) -> Mapping[str, int]:
        """Of q the heads' queries, of k and v what is compressed, of latent what heads see of the latents."""
        heads = len(part[self.split])
        head, nope, value, latent, q_rank, kv_a = (
            round_up(channels, BLOCK)
            for channels in (
                *(self.nope + self.rope, self.nope, self.value, self.kv_rank, self.q_rank),
                self.kv_rank + self.rope,
            )
        )
        return {
            "q": heads * head,
            "k": q_rank,
            "v": kv_a,
            "context": heads * max(nope, value),
            "latent": max(q_rank, heads * latent),
        }

    def scratch(self, part: Partition, tokens: int, positions: int, threads: int) -> tuple[int, int]:
        """As kernels/src/latent_attention.h: a thread's tile, and of few long tiles the sums of all spans."""
        latent, rows = round_up(self.kv_rank, BLOCK), LANES * MOST_SETS
        sums = 4 * rows * (latent + 2)
        each = 4 * (rows + BLOCK_POSITIONS) * self.cache_width + 4 * BLOCK_POSITIONS * LANES + 2 * sums
        spans, tiles = -(-positions // SPAN), tokens * -(-len(part[self.split]) // rows)
        shared = threads > 1 and spans > 1 and part.holders == 1  # else what spans leave is sent
        return each, sums * spans * min(tiles, 2 * threads - 1) if shared else 0

    def layer(
        self, weights: LayerWeights, part: Partition, hidden_size: int, norm: str, eps: float
    ) -> arguments.LatentLayer:
        names = ("q_b_proj" if self.q_rank else "q_proj", "kv_a_proj_with_mqa", "k_b_proj", "v_b_proj")
        q, kv_a, k_b, v_b = (weights.matrix(f"self_attn.{name}.weight").column_parallel() for name in names)
        layer = arguments.LatentLayer(
            q=q, kv_a=kv_a, k_b=k_b, v_b=v_b, o=weights.matrix("self_attn.o_proj.weight").row_parallel(),
            norm=weights.address(norm), q_norm=weights.address("self_attn.q_a_layernorm.weight"),
            kv_norm=weights.address("self_attn.kv_a_layernorm.weight"), eps=eps, latent_eps=LATENT_EPS,
            scale=self.softmax_factor / math.sqrt(self.nope + self.rope), hidden_size=hidden_size,
            heads=len(part[self.split]), q_rank=self.q_rank, kv_rank=self.kv_rank, nope=self.nope, rope=self.rope,
            pairs=self.rotary_pairs,
        )  # fmt: skip
        if self.q_rank:
            layer.q_a = weights.matrix("self_attn.q_a_proj.weight").column_parallel()
        return layer

    def begin(self, team: Team, layer: arguments.LatentLayer, step: arguments.Step) -> bool:
        return False

    def run(
        self, team: Team, layer: arguments.LatentLayer, cache: Any, step: arguments.Step, total: arguments.Sum | None
    ) -> bool:
        layer.cache = cache
        return team.latent_half(layer, step, total)

    def output_bias_of(self, weights: LayerWeights) -> np.ndarray | None:
        return None

    @property
    def piece_sizes(self) -> PieceSizes | None:
        return PieceSizes(self.heads, self.cache_width, 0, SPAN, round_up(self.kv_rank, BLOCK) + 2)

    def in_pieces(self, layer: arguments.LatentLayer, parts: Sequence[Partition], rank: int) -> Pieces | None:
        sizes = self.piece_sizes
        return LatentPieces(sizes, layer, [part[self.split] for part in parts]) if sizes else None
