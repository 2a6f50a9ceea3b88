"""GLM-4.5 to 4.7 and GLM-4.5-Air: some dense layers, then experts, one of them shared; RoPE turns half of a head."""

from dataclasses import replace

from mpillama.models.attention import GroupedQueryAttention
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
from mpillama.models.mlp import Experts, GatedMlp, SharedExpert
from mpillama.models.rope import PARTIAL, read_partial_rope, rotary_channels
from mpillama.models.router import Router


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention = GroupedQueryAttention.read(values, qk_norm=values.flag("use_qk_norm"))
    attention = replace(attention, output_bias=False, turned=rotary_channels(values, attention.head_dim))
    width = values.size("moe_intermediate_size") * values.size("n_shared_experts")
    dense, experts = GatedMlp.read(values), Experts.read(values, Router.read_grouped(values), SharedExpert(width))
    return tuple(Block(attention, experts if sparse else dense) for sparse in dense_or_sparse(values))


def gguf_fields(metadata: GgufMetadata) -> Json:
    found = gguf_experts(metadata)
    return {
        "n_routed_experts": found.count,
        "num_experts_per_tok": found.chosen,
        "moe_intermediate_size": found.width,
        "n_shared_experts": found.shared,
        "routed_scaling_factor": found.scaling,
        "norm_topk_prob": found.renormalise,
        "n_group": found.groups,
        "topk_group": found.chosen_groups,
        "mlp_layer_types": found.layer_types,
        "scoring_func": found.scores,
    }


FAMILY = Family(
    "glm4_moe",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        PARTIAL: 0.5,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "first_k_dense_replace": 1,
    },
    refusals=(
        *no_such_biases("glm4_moe", "mlp_bias"),
        Refusal("scoring_func", "mpillama runs GLM with sigmoids only", (None, "sigmoid")),
    ),
    rope=read_partial_rope,
    gguf=Gguf(
        "glm4moe",
        experts=True,
        names={**GGUF_EXPERTS, "post_attention_norm": "post_attention_layernorm"},
        flags={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
        fields=gguf_fields,
        partial_rope=True,
    ),
    pre_tokenizer="glm4",
)
