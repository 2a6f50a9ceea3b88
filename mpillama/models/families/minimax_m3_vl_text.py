"""MiniMax M3's language model: dense layers and then experts, attention to blocks that an index chooses."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mpillama.kernels.arguments import Activation
from mpillama.models.attention import Attention, GroupedQueryAttention
from mpillama.models.block_sparse import BlockSparseAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families.minimax_m2 import ROTARY_DIM
from mpillama.models.family import (
    GGUF_EXPERTS,
    Block,
    Family,
    Fused,
    Gguf,
    GgufMetadata,
    Refusal,
    dense_or_sparse,
    gguf_experts,
    layer_count,
    no_such_biases,
)
from mpillama.models.mlp import Experts, GatedMlp, SharedExpert
from mpillama.models.rope import PARTIAL, Rope, read_rope, rotary_channels
from mpillama.models.router import Router

FULL, SPARSE = "full_attention", "minimax_m3_sparse"
OLDER, FREQUENCY, MOE_FREQUENCY = "sparse_attention_config", "sparse_attention_freq", "moe_layer_freq"
OLDER_NAMES = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}
"""What published files have under sparse_attention_config, which counts where both are given, as in transformers."""
READ = (*OLDER_NAMES.values(), FREQUENCY, "sparse_disable_index_value")
"""Of the last transformers knows no other value than that it is disabled: there is no tensor for it."""
HARMLESS = {"use_sparse_attention": (None, True), "sparse_init_block": (None, 0), "sparse_score_type": (None, "max")}


def plain(values: ConfigValues) -> ConfigValues:
    """The configuration in the words of transformers; UserError for what is known in neither."""
    older, source = values.get(OLDER) or {}, dict(values.source)
    if not isinstance(older, dict):
        raise values.refuse(OLDER, "it must be a JSON object")
    for key, value in older.items():
        if key not in READ and value not in HARMLESS.get(key, ()):
            raise ConfigValues(older).refuse(key, f"mpillama does not know this option of {OLDER}")
    source |= {key: older[old] for key, old in OLDER_NAMES.items() if old in older}
    for key, kinds, usual, frequency in (
        ("layer_types", (FULL, SPARSE), FULL, older.get(FREQUENCY)),
        ("mlp_layer_types", ("dense", "sparse"), "sparse", values.get(MOE_FREQUENCY)),
    ):
        if values.get(key) is None:
            listed = [kinds[bool(each)] for each in frequency] if isinstance(frequency, list) else None
            source[key] = listed or [usual] * layer_count(values)
    return ConfigValues(source, values.defaults)


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    values = plain(values)
    clamped: dict[str, Any] = {
        "activation": Activation.CLAMPED_SILU,
        "alpha": values.number("swiglu_alpha"),
        "limit": values.number("swiglu_limit"),
    }
    dense = GatedMlp(values.size("dense_intermediate_size"), **clamped)
    shared = SharedExpert(values.size("shared_intermediate_size"), **clamped)
    router = Router.read(
        values, scores="sigmoid", correction=True, renormalise=True, scaling=values.number("routed_scaling_factor")
    )
    experts = Experts(values.size("intermediate_size"), **clamped, router=router, shared=shared)
    kinds = read_attention(values)
    return tuple(
        Block(attention, experts if sparse else dense)
        for attention, sparse in zip(kinds, dense_or_sparse(values), strict=True)
    )


def read_attention(values: ConfigValues) -> list[Attention]:
    """Each layer's first half, as `layer_types` says."""
    attention = GroupedQueryAttention.read(values, qk_norm=True)
    turned, layers = rotary_channels(values, attention.head_dim), layer_count(values)
    if values.get(ROTARY_DIM) not in (None, turned):
        raise values.refuse(ROTARY_DIM, f"by {PARTIAL} RoPE turns {turned} channels of a head")
    attention = replace(attention, turned=turned)
    kinds = values.get("layer_types")
    if not isinstance(kinds, Sequence) or len(kinds) != layers or any(kind not in (FULL, SPARSE) for kind in kinds):
        raise values.refuse("layer_types", f"it must name {FULL} or {SPARSE} for {layers} layers")
    sparse = BlockSparseAttention.read(values, attention) if SPARSE in kinds else attention
    return [sparse if kind == SPARSE else attention for kind in kinds]


def rope(values: ConfigValues, context: int) -> Rope:
    return read_rope(values, context, (PARTIAL, ROTARY_DIM))


def fused(values: ConfigValues) -> Fused:
    """Gate and up, which transformers writes as one."""
    sizes = {"mlp": "dense_intermediate_size", "mlp.shared_experts": "shared_intermediate_size"}
    return {
        f"{module}.gate_up_proj": [(f"{module}.{part}_proj", values.size(key)) for part in ("gate", "up")]
        for module, key in sizes.items()
    }


def gguf_fields(metadata: GgufMetadata) -> Json:
    """The layers with experts are those with an index, as in llama.cpp."""
    found, index = gguf_experts(metadata), "attention.indexer."
    metadata.refuse_unread(index, ("head_count", "key_length", "top_k", "block_size", "local_blocks"))
    local = metadata.get(f"{index}local_blocks")
    return {
        "num_local_experts": found.count,
        "num_experts_per_tok": found.chosen,
        "intermediate_size": found.width,
        "dense_intermediate_size": metadata.size("feed_forward_length", found.width),
        "shared_intermediate_size": found.width * found.shared,
        "routed_scaling_factor": found.scaling,
        "scoring_func": found.scores,
        "mlp_layer_types": found.layer_types,
        "layer_types": [SPARSE if kind == "sparse" else FULL for kind in found.layer_types],
        "index_n_heads": metadata.size(f"{index}head_count"),
        "index_head_dim": metadata.size(f"{index}key_length"),
        "index_topk_blocks": metadata.size(f"{index}top_k"),
        "index_block_size": metadata.size(f"{index}block_size"),
        "index_local_blocks": 0 if local in (None, 0) else metadata.size(f"{index}local_blocks"),
    }


ONLY = "mpillama runs MiniMax M3 with {} only"
FAMILY = Family(
    "minimax_m3_vl_text",
    blocks,
    within=("minimax_m3_vl",),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "intermediate_size": 3072,
        "dense_intermediate_size": 12288,
        "shared_intermediate_size": 3072,
        "routed_scaling_factor": 2.0,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "index_n_heads": 4,
        "index_head_dim": 128,
        "index_block_size": 128,
        "index_topk_blocks": 16,
        "index_local_blocks": 1,
    },
    refusals=(
        *no_such_biases("minimax_m3_vl_text", "attention_bias", "mlp_bias"),
        Refusal("hidden_act", ONLY.format("its clamped activation"), (None, "swigluoai", "silu")),
        Refusal("swiglu_beta", ONLY.format("1 added to up"), (None, 1)),
        Refusal("scoring_func", ONLY.format("sigmoids"), (None, "sigmoid")),
        Refusal("use_routing_bias", ONLY.format("a correction of scores"), (None, True)),
        Refusal("use_qk_norm", ONLY.format("norms of queries and keys"), (None, True)),
        Refusal("qk_norm_type", ONLY.format("a norm for each head"), (None, "per_head")),
        Refusal("use_gemma_norm", ONLY.format("norms of 1 + w"), (None, True)),
        Refusal("attention_output_gate", ONLY.format("attention without a gate")),
        Refusal("n_shared_experts", ONLY.format("one shared expert"), (None, 1)),
    ),
    renames={
        r"\.block_sparse_moe\.e_score_correction_bias$": ".mlp.gate.e_score_correction_bias",
        r"\.block_sparse_moe\.": ".mlp.",
        r"(\.mlp\.experts\.[0-9]+\.)w1\.": r"\1gate_proj.",
        r"(\.mlp\.experts\.[0-9]+\.)w2\.": r"\1down_proj.",
        r"(\.mlp\.experts\.[0-9]+\.)w3\.": r"\1up_proj.",
        r"\.self_attn\.indexer\.([qk]_(?:proj|norm)\.)": r".self_attn.index_\1",
    },
    fused=fused,
    from_one=r"norm\.weight$",
    rope=rope,
    gguf=Gguf(
        "minimax-m3",
        experts=True,
        names={
            **GGUF_EXPERTS,
            **{f"indexer.{each}": f"self_attn.index_{each}" for each in ("q_proj", "k_proj", "q_norm", "k_norm")},
        },
        flags={},
        fields=gguf_fields,
        partial_rope=True,
    ),
    pre_tokenizer="minimax-m2",
)
