"""Latent attention to few positions, which an indexer chooses for each token (https://arxiv.org/abs/2512.02556).

The indexer has small queries and keys of its own. Every rank computes all of its scores, so that all choose the same
positions (kernels/src/indexer.h). A token with no more positions than are chosen sees all of them, as in plain latent
attention.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.library import Team
from mpillama.models.attention import BLOCK_POSITIONS, KV_TYPES, MOST_CHANNELS, WHOLE, CacheArray, KVType, Stripe
from mpillama.models.attention_pieces import PieceSizes
from mpillama.models.config_values import ConfigValues
from mpillama.models.latent_attention import LatentAttention
from mpillama.models.linear import LayerWeights
from mpillama.models.partition import Partition
from mpillama.models.tensors import TensorSpec, WeightTypes, whole_matrix, whole_rows, whole_vector
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import BLOCK, LANES, round_up

INDEX_EPS = 1e-6
"""Of the norm of index keys, whatever rms_norm_eps is."""
TOKENS_CHOOSING = 16
"""Whose scores wait together, of kernels/src/indexer.h."""
BINS = 2048
"""Into which a thread sorts scores."""
WHOLE_INDEXER = "self_attn.indexer."


@dataclass(frozen=True)
class Indexer:
    """`heads` queries of `channels` for each token, and one key of each position.

    The layer's RoPE turns the first channels; with `rotary_pairs` neighbouring channels turn together.
    """

    heads: int
    channels: int
    rotary_pairs: bool

    @property
    def width(self) -> int:
        """Channels with their padding."""
        return round_up(self.channels, BLOCK)

    @property
    def step_width(self) -> int:
        """What a token's queries, key and weights of heads take."""
        return (self.heads + 1) * self.width + round_up(self.heads, LANES)

    @property
    def scratch(self) -> int:
        """Bytes of what a thread works with, of kernels/src/indexer.h: queries and weights, keys, scores, counts."""
        rows = round_up(self.heads, LANES)
        return 4 * (rows * (self.width + 1) + (BLOCK_POSITIONS + 1) * self.width + 2 * BLOCK_POSITIONS * LANES + BINS)

    @property
    def products(self) -> tuple[str, ...]:
        return tuple(f"{WHOLE_INDEXER}{name}.weight" for name in ("wq_b", "wk", "weights_proj"))

    def specs(self, prefix: str, hidden_size: int, q_rank: int, types: WeightTypes) -> Iterator[TensorSpec]:
        """On every rank; the weights of heads are float32 in any model, as a router is."""
        prefix += WHOLE_INDEXER
        name, rows = f"{prefix}wq_b.weight", self.heads * self.width
        source = self.heads * self.channels, q_rank
        columns = round_up(q_rank, BLOCK)
        yield TensorSpec(name, None, rows, columns, types.of(name), rows, source, row_chunks=self.heads)
        yield whole_rows(f"{prefix}wk.weight", self.channels, hidden_size, types)
        for ending in ("weight", "bias"):
            yield whole_vector(f"{prefix}k_norm.{ending}", self.channels, self.width)
        yield whole_matrix(f"{prefix}weights_proj.weight", self.heads, hidden_size, F32)

    def argument(self, weights: LayerWeights, chosen: int) -> arguments.Indexer:
        """For kernels."""
        q, k, of_heads = (weights.matrix(name).column_parallel() for name in self.products)
        return arguments.Indexer(
            q=q, k=k, weights=of_heads, k_norm=weights.address(f"{WHOLE_INDEXER}k_norm.weight"),
            k_bias=weights.address(f"{WHOLE_INDEXER}k_norm.bias"), eps=INDEX_EPS, heads=self.heads,
            channels=self.channels, chosen=chosen, pairs=self.rotary_pairs,
        )  # fmt: skip


@dataclass(frozen=True)
class SparseLatentAttention(LatentAttention):
    """A token sees the `chosen` positions that the `indexer` scores highest; ties go to the lower position.

    Without an indexer of its own, a layer sees what the last layer before it has chosen that has one.
    """

    indexer: Indexer | None = None
    chosen: int = 1

    @classmethod
    def read_sparse(
        cls, values: ConfigValues, softmax_factor: float, *, indexed: bool = True, rotary_pairs: bool = False
    ) -> "SparseLatentAttention":
        """From Hugging Face's names; the queries must be compressed, which the indexer reads."""
        size = partial(values.size, limit=MOST_CHANNELS)
        if values.given("q_lora_rank") is None:
            raise values.refuse("q_lora_rank", "an indexer reads compressed queries")
        plain = LatentAttention.read(values, softmax_factor)
        indexer = Indexer(size("index_n_heads"), size("index_head_dim"), rotary_pairs)
        if indexer.channels < plain.rope:
            raise values.refuse("index_head_dim", f"RoPE turns {plain.rope} of its channels (qk_rope_head_dim)")
        most = values.size("max_position_embeddings")  # room is made for all that are chosen
        chosen = min(values.size("index_topk", limit=2**31), most)
        return cls(**vars(plain), indexer=indexer if indexed else None, chosen=chosen)

    @property
    def follows(self) -> bool:
        return self.indexer is None

    @property
    def products(self) -> Mapping[str, tuple[str, ...]]:
        found = super().products
        return {**found, "q/k/v": (*found["q/k/v"], *(self.indexer.products if self.indexer else ()))}

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        yield from super().specs(prefix, hidden_size, types)
        if self.indexer:
            yield from self.indexer.specs(prefix, hidden_size, self.q_rank, types)

    def cache_arrays(self, part: Partition, blocks: int, kv_type: KVType) -> Sequence[CacheArray]:
        """Latents, their scales, and index keys: in float16, since they decide near ties, or float32 as the others."""
        width = self.indexer.width if self.indexer else 0
        keys = (blocks, BLOCK_POSITIONS, width), _of_keys(kv_type).dtype
        return *super().cache_arrays(part, blocks, kv_type), keys

    def positions_read(self, positions: int) -> Sequence[int]:
        scored = positions if positions > self.chosen else 0
        return *super().positions_read(min(positions, self.chosen)), scored

    @property
    def cache_stripes(self) -> Sequence[Sequence[Stripe]]:
        return ((WHOLE,),) * 3

    def cache_argument(self, arrays: Sequence[np.ndarray], kv_type: KVType) -> Any:
        """The cache of latents and that of index keys."""
        latents, scales, keys = arrays
        of_keys = arguments.LatentCache(arguments.address(keys), None, _of_keys(kv_type).number)
        return super().cache_argument((latents, scales), kv_type), of_keys

    def step_widths(self, part: Partition) -> Mapping[str, int]:
        gates = self.indexer.step_width if self.indexer else 0
        return {**super().step_widths(part), "gates": gates, "chosen": self.chosen}

    def scratch(self, part: Partition, tokens: int, positions: int, threads: int) -> tuple[int, int]:
        """As latent attention over the chosen positions, or what the indexer and the scores of some tokens take."""
        each, common = super().scratch(part, tokens, min(positions, self.chosen), threads)
        if self.indexer is None:
            return each, common
        scores = round_up(positions, BLOCK_POSITIONS) if positions > self.chosen else 0
        return max(each, self.indexer.scratch), max(common, 4 * min(tokens, TOKENS_CHOOSING) * scores)

    def layer(
        self, weights: LayerWeights, part: Partition, hidden_size: int, norm: str, eps: float
    ) -> arguments.LatentLayer:
        layer = super().layer(weights, part, hidden_size, norm, eps)
        if self.indexer:
            layer.indexer = self.indexer.argument(weights, self.chosen)
        layer.indexer.chosen = self.chosen
        return layer

    def run(
        self, team: Team, layer: arguments.LatentLayer, cache: Any, step: arguments.Step, total: arguments.Sum | None
    ) -> bool:
        layer.cache, layer.indexer.cache = cache
        return team.latent_half(layer, step, total)

    @property
    def piece_sizes(self) -> PieceSizes | None:
        """None: every rank scores all positions."""
        return None


def _of_keys(kv_type: KVType) -> KVType:
    return kv_type if kv_type == KV_TYPES["f32"] else KV_TYPES["f16"]
