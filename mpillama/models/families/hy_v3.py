"""Hy3 of Tencent: Llama with norms of queries and keys, and from the second layer on experts, one of them shared."""

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
from mpillama.models.router import Router


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, dense = GroupedQueryAttention.read(values, qk_norm=True), GatedMlp.read(values)
    router = Router.read(
        values, scores="sigmoid", correction=True, renormalise=True, epsilon=1e-20,
        scaling=values.number("router_scaling_factor"),
    )  # fmt: skip
    width = values.size("moe_intermediate_size") * values.size("num_shared_experts")
    experts = Experts.read(values, router, SharedExpert(width))
    return tuple(Block(attention, experts if sparse else dense) for sparse in dense_or_sparse(values))


def gguf_fields(metadata: GgufMetadata) -> Json:
    found = gguf_experts(metadata)
    return {
        "num_experts": found.count,
        "num_experts_per_tok": found.chosen,
        "moe_intermediate_size": found.width,
        "num_shared_experts": found.shared,
        "router_scaling_factor": found.scaling,
        "mlp_layer_types": found.layer_types,
        "scoring_func": found.scores,
    }


FAMILY = Family(
    "hy_v3",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 11158840.0,
        "moe_intermediate_size": 1536,
        "num_shared_experts": 1,
        "router_scaling_factor": 2.826,
        "first_k_dense_replace": 1,
    },
    refusals=(
        *no_such_biases("hy_v3", "attention_bias", "mlp_bias"),
        Refusal("qk_norm", "mpillama runs Hy3 with norms of queries and keys only", (None, True)),
        Refusal("route_norm", "mpillama runs Hy3 with shares that add up to 1 only", (None, True)),
        Refusal("moe_router_use_sigmoid", "mpillama runs Hy3 with sigmoids only", (None, True)),
        Refusal("scoring_func", "mpillama runs Hy3 with sigmoids only", (None, "sigmoid")),
    ),
    renames={
        r"\.mlp\.router\.gate\.": ".mlp.gate.",
        r"\.mlp\.expert_bias$": ".mlp.gate.e_score_correction_bias",
        r"\.mlp\.e_score_correction_bias$": ".mlp.gate.e_score_correction_bias",
        r"\.mlp\.shared_mlp\.": ".mlp.shared_experts.",
    },
    gguf=Gguf("hy_v3", experts=True, names=GGUF_EXPERTS, fields=gguf_fields),
    pre_tokenizer="hunyuan",
)
