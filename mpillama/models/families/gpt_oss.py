"""gpt-oss of OpenAI: experts with biases and a clamped activation, windows in every other layer, sinks in all."""

from dataclasses import replace

from mpillama.kernels.arguments import Activation
from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.family import (
    GGUF_NAMES,
    Block,
    Family,
    Gguf,
    GgufMetadata,
    Refusal,
    gguf_experts,
    layer_count,
    layer_windows,
)
from mpillama.models.mlp import Experts
from mpillama.models.router import Router

YARN: Json = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
SLIDING = ("sliding_attention", "full_attention")


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention = replace(GroupedQueryAttention.read(values), sinks=True)
    router = Router.read(values, scores="logits", renormalise=True, bias=True)
    experts = replace(
        Experts.read(values, router), bias=True, activation=Activation.CLAMPED_SILU,
        alpha=values.number("swiglu_alpha"), limit=values.number("swiglu_limit"),
    )  # fmt: skip
    windows = layer_windows(values, [SLIDING[layer % 2] for layer in range(layer_count(values))])
    return tuple(Block(replace(attention, window=window), experts) for window in windows)


def gguf_fields(metadata: GgufMetadata) -> Json:
    found = gguf_experts(metadata, without="softmax_of_chosen")
    return {
        "num_local_experts": found.count,
        "num_experts_per_tok": found.chosen,
        "intermediate_size": found.width,
        "scoring_func": found.scores,
    }


FAMILY = Family(
    "gpt_oss",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_parameters": {**YARN, "original_max_position_embeddings": 4096},
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    refusals=(
        Refusal("scoring_func", "mpillama runs gpt-oss with a softmax of the chosen only", (None, "softmax_of_chosen")),
    ),
    renames={r"\.mlp\.router\.": ".mlp.gate."},
    turned_experts=True,
    gguf=Gguf(
        "gpt-oss",
        experts=True,
        names={
            **GGUF_NAMES,
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
        },
        flags={"attention_bias": "attn_q.bias"},
        fields=gguf_fields,
        scaling={"truncate": False},
    ),
    pre_tokenizer="gpt-4o",
)
