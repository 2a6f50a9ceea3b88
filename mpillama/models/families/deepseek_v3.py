"""DeepSeek V3, R1 and V3.1: latent attention, and from some layer on experts chosen by groups, beside a shared one."""

from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.family import (
    GGUF_EXPERTS,
    Block,
    Family,
    Gguf,
    GgufMetadata,
    Refusal,
    dense_or_sparse,
    gguf_experts,
    no_such_biases,
)
from mpillama.models.latent_attention import LatentAttention
from mpillama.models.mlp import Experts, GatedMlp, SharedExpert
from mpillama.models.rope import Rope, read_rope, softmax_factor
from mpillama.models.router import Router


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, dense = LatentAttention.read(values, softmax_factor(values)), GatedMlp.read(values)
    shared = SharedExpert(values.size("moe_intermediate_size") * values.size("n_shared_experts"))
    experts = Experts.read(values, Router.read_grouped(values), shared)
    return tuple(Block(attention, experts if sparse else dense) for sparse in dense_or_sparse(values))


def rope(values: ConfigValues, context: int) -> Rope:
    """That of a part of each head; how its channels stand is the attention's."""
    return read_rope(values, context, ("qk_rope_head_dim", "rope_interleave"))


def gguf_fields(metadata: GgufMetadata) -> Json:
    experts, turned = gguf_experts(metadata), metadata.size("rope.dimension_count")
    keys = metadata.size("attention.key_length_mla", metadata.size("attention.key_length"))
    values = metadata.size("attention.value_length_mla", metadata.size("attention.value_length"))
    compressed = metadata.get("attention.q_lora_rank")
    return {
        "q_lora_rank": metadata.size("attention.q_lora_rank") if compressed else None,
        "kv_lora_rank": metadata.size("attention.kv_lora_rank"),
        "qk_nope_head_dim": keys - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": values,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.width,
        "n_shared_experts": experts.shared,
        "routed_scaling_factor": experts.scaling,
        "norm_topk_prob": experts.renormalise,
        "n_group": experts.groups,
        "topk_group": experts.chosen_groups,
        "mlp_layer_types": experts.layer_types,
        # Without a function files are those of DeepSeek V2.
        "scoring_func": experts.scores if metadata.get("expert_gating_func") else "softmax",
        **_gguf_rope(metadata),
    }


def _gguf_rope(metadata: GgufMetadata) -> Json:
    """YaRN as the converter writes it: 0.1 times the magnitude, which is that of the rotation, too."""
    if metadata.get("rope.scaling.type") != "yarn" or not metadata.get("rope.scaling.yarn_log_multiplier"):
        return {}
    magnitude = round(10 * metadata.number("rope.scaling.yarn_log_multiplier"), 6)
    turns = {
        name: float(metadata.number(f"rope.scaling.yarn_{name}"))
        for name in ("beta_fast", "beta_slow")
        if metadata.get(f"rope.scaling.yarn_{name}")
    }
    scaling = {
        "rope_type": "yarn",
        "factor": float(metadata.number("rope.scaling.factor")),
        "original_max_position_embeddings": metadata.size("rope.scaling.original_context_length"),
        "mscale": magnitude,
        "mscale_all_dim": magnitude,
    }
    return {"rope_scaling": {**scaling, **turns}}


MODULES = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
}
FAMILY = Family(
    "deepseek_v3",
    blocks,
    defaults={
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 3,
    },
    refusals=(
        *no_such_biases("deepseek_v3", "attention_bias", "mlp_bias"),
        Refusal("scoring_func", "mpillama runs this router with sigmoids only", (None, "sigmoid")),
        Refusal("topk_method", "mpillama runs this router with corrections only", (None, "noaux_tc")),
        Refusal("moe_layer_freq", "mpillama runs experts in every layer behind the dense ones", (None, 1)),
        Refusal("index_topk", "mpillama runs attention over all positions only, without an indexer"),
    ),
    within=("kimi_k25",),
    rope=rope,
    gguf=Gguf("deepseek2", experts=True, names={**GGUF_EXPERTS, **MODULES}, fields=gguf_fields, own_heads=True),
    pre_tokenizer="deepseek-v3",
)
