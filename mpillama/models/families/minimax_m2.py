"""MiniMax M2 to M2.5: experts in every layer, norms over all heads together; RoPE turns a part of a head."""

from dataclasses import replace

from mpillama.kernels.arguments import HeadNorm
from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families.mixtral import FAMILY as MIXTRAL
from mpillama.models.family import (
    GGUF_EXPERTS,
    Block,
    Family,
    Gguf,
    GgufMetadata,
    Refusal,
    gguf_experts,
    layer_count,
    no_such_biases,
)
from mpillama.models.mlp import Experts
from mpillama.models.rope import PARTIAL, Rope, read_rope, rotary_channels
from mpillama.models.router import Router

ROTARY_DIM = "rotary_dim"
"""Published files give the channels that RoPE turns; where both are given, the share of a head counts."""


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention = GroupedQueryAttention.read(values, qk_norm=True)
    turned = rotary_channels(values, attention.head_dim)
    if turned == attention.head_dim and values.get(ROTARY_DIM) is not None:
        turned = values.size(ROTARY_DIM, limit=attention.head_dim + 1)
    attention = replace(attention, turned=turned, head_norm=HeadNorm.WHOLE_PROJECTION)
    router = Router.read(values, scores="sigmoid", correction=True, renormalise=True)
    return (Block(attention, Experts.read(values, router)),) * layer_count(values)


def rope(values: ConfigValues, context: int) -> Rope:
    return read_rope(values, context, (PARTIAL, ROTARY_DIM))


def gguf_fields(metadata: GgufMetadata) -> Json:
    found = gguf_experts(metadata)
    return {
        "num_local_experts": found.count,
        "num_experts_per_tok": found.chosen,
        "intermediate_size": found.width,
        "scoring_func": found.scores,
    }


FAMILY = Family(
    "minimax_m2",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "num_experts_per_tok": 8,
    },
    refusals=(
        *no_such_biases("minimax_m2", "attention_bias", "mlp_bias"),
        Refusal("scoring_func", "mpillama runs MiniMax M2 with sigmoids only", (None, "sigmoid")),
        Refusal("use_routing_bias", "mpillama runs MiniMax M2 with a correction of scores only", (None, True)),
        Refusal("use_qk_norm", "mpillama runs MiniMax M2 with norms of queries and keys only", (None, True)),
        Refusal("qk_norm_type", "mpillama runs MiniMax M2 with norms over all heads only", (None, "per_layer")),
        Refusal("shared_intermediate_size", "mpillama runs MiniMax M2 without a shared expert only"),
    ),
    renames={**MIXTRAL.renames, r"\.mlp\.e_score_correction_bias$": ".mlp.gate.e_score_correction_bias"},
    rope=rope,
    gguf=Gguf("minimax-m2", experts=True, names=GGUF_EXPERTS, fields=gguf_fields, partial_rope=True),
    pre_tokenizer="minimax-m2",
)
