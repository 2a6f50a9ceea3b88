"""DeepSeek V3.2: DeepSeek V3 with an indexer in each layer, which chooses the positions that a token sees."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families import deepseek_v3
from mpillama.models.family import Block, GgufMetadata, Refusal, dense_or_sparse, gguf_experts
from mpillama.models.mlp import Experts, GatedMlp, SharedExpert
from mpillama.models.rope import Rope, read_rope, softmax_factor
from mpillama.models.router import Router
from mpillama.models.sparse_latent_attention import SparseLatentAttention

ROPE_FIELDS = ("qk_rope_head_dim", "rope_interleave", "indexer_rope_interleave")
"""How channels stand, in the main attention and in the indexer, a family decides itself."""
ATTENTION = "indexed_attention"
FULL, SHARED = "full", "shared"
"""Layers with an indexer, and those that see what the last one of these has chosen."""
GGUF_INDEXER = "attention.indexer."
GGUF_OPTIONS = {
    "top_k_freq": "index_topk_freq",
    "top_k_frequency": "index_topk_freq",
    "skip_top_k_offset": "index_skip_topk_offset",
    "rope_interleave": "indexer_rope_interleave",
}
READ = ("head_count", "key_length", "top_k", "types", *GGUF_OPTIONS, "share_for_mtp_iteration")
"""The last is about guesses only."""
WHICH: Mapping[Any, str] = {1: FULL, 0: SHARED}
"""Files have numbers, truth values or these words."""


def indexed_blocks(values: ConfigValues, indexed: Sequence[bool], rotary_pairs: bool) -> tuple[Block, ...]:
    """The layers, of which some have an indexer; `rotary_pairs` is how its channels stand."""
    factor, dense = softmax_factor(values), GatedMlp.read(values)
    kinds = values.get("layer_types") or [ATTENTION] * len(indexed)
    if kinds != [ATTENTION] * len(indexed):
        raise values.refuse("layer_types", f"it must name {ATTENTION} for {len(indexed)} layers")
    shared = SharedExpert(values.size("moe_intermediate_size") * values.size("n_shared_experts"))
    experts = Experts.read(values, Router.read_grouped(values), shared)
    attention = {
        own: SparseLatentAttention.read_sparse(values, factor, indexed=own, rotary_pairs=rotary_pairs)
        for own in (True, False)
    }
    return tuple(
        Block(attention[own], experts if sparse else dense)
        for own, sparse in zip(indexed, dense_or_sparse(values), strict=True)
    )


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    return indexed_blocks(values, [True] * len(dense_or_sparse(values)), rotary_pairs=False)


def rope(values: ConfigValues, context: int) -> Rope:
    return read_rope(values, context, ROPE_FIELDS)


def gguf_fields(metadata: GgufMetadata) -> Json:
    """As indexed_fields, where what a file says of layers that share must be that none does."""
    fields = indexed_fields(metadata)
    kept = set(fields.get("indexer_types", ())) != {FULL}
    return {key: value for key, value in fields.items() if kept or key != "indexer_types"}


def indexed_fields(metadata: GgufMetadata) -> Json:
    """DeepSeek V3's, the indexer's sizes, which layers have one, and how its channels stand."""
    metadata.refuse_unread(GGUF_INDEXER, READ)
    experts, kinds = gguf_experts(metadata), metadata.of_layers(f"{GGUF_INDEXER}types")
    found = {key: metadata.get(GGUF_INDEXER + key) for key in GGUF_OPTIONS}
    optional: dict[str, Any] = {GGUF_OPTIONS[key]: value for key, value in found.items() if value is not None}
    if kinds is not None:
        optional["indexer_types"] = [WHICH.get(kind, kind) for kind in kinds[: len(experts.layer_types)]]
    return {
        **deepseek_v3.gguf_fields(metadata),
        "scoring_func": experts.scores,
        "index_n_heads": metadata.size(f"{GGUF_INDEXER}head_count"),
        "index_head_dim": metadata.size(f"{GGUF_INDEXER}key_length"),
        "index_topk": metadata.size(f"{GGUF_INDEXER}top_k"),
        **optional,
    }


MODULES = {
    **deepseek_v3.MODULES,
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
}
V3 = deepseek_v3.FAMILY
assert V3.gguf
HALVES = Refusal("indexer_rope_interleave", "mpillama turns halves of this model's index channels only", (None, False))
PAIRS = Refusal("rope_interleave", "mpillama turns neighbouring channels of this model's heads only", (None, True))
EVERYWHERE = "mpillama runs an indexer in every layer of this model"
FAMILY = replace(
    V3,
    model_type="deepseek_v32",
    blocks=blocks,
    defaults={
        **V3.defaults,
        "max_position_embeddings": 163840,
        "index_topk": 2048,
        "index_head_dim": 128,
        "index_n_heads": 64,
    },
    refusals=(
        *(refusal for refusal in V3.refusals if refusal.key != "index_topk"),
        *(HALVES, PAIRS, Refusal("indexer_types", EVERYWHERE), Refusal("index_topk_pattern", EVERYWHERE)),
        Refusal("index_topk_freq", EVERYWHERE, (None, 1)),
    ),
    within=(),
    rope=rope,
    gguf=replace(V3.gguf, architecture="deepseek32", names={**V3.gguf.names, **MODULES}, fields=gguf_fields),
)
