"""Qwen3-Next: gated delta nets in three of four layers, gated attention in the others; experts, one of them shared."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mpillama.models.attention import Attention, GroupedQueryAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.delta_net import TAPS, GatedDeltaNet
from mpillama.models.family import (
    GGUF_EXPERTS,
    GGUF_NAMES,
    Block,
    Family,
    Fused,
    Gguf,
    GgufMetadata,
    layer_count,
    no_such_biases,
)
from mpillama.models.mlp import Experts, SharedExpert
from mpillama.models.rope import PARTIAL, read_partial_rope, read_rope, rotary_channels
from mpillama.models.router import Router

FULL, LINEAR = "full_attention", "linear_attention"
INTERVAL = "full_attention_interval"


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    experts = read_experts(values, values.flag("norm_topk_prob"))
    return tuple(Block(mixer, experts) for mixer in read_mixers(values))


def read_mixers(values: ConfigValues) -> list[Attention]:
    """Each layer's first half: `layer_types` or, where it is left out, every `full_attention_interval`th attends."""
    layers, interval = layer_count(values), values.size(INTERVAL, 4)
    kinds = values.get("layer_types") or [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)]
    attention = GroupedQueryAttention.read(values, qk_norm=True)
    attention = replace(attention, gated=True, turned=rotary_channels(values, attention.head_dim))
    known: dict[str, Attention] = {FULL: attention, LINEAR: GatedDeltaNet.read(values)}
    if (
        not isinstance(kinds, Sequence)
        or len(kinds) != layers
        or not all(isinstance(kind, str) and kind in known for kind in kinds)
    ):
        raise values.refuse("layer_types", f"it must name {FULL} or {LINEAR} for {layers} layers")
    return [known[kind] for kind in kinds]


def read_experts(values: ConfigValues, renormalise: bool) -> Experts:
    router = Router.read(values, renormalise=renormalise)
    shared = SharedExpert(values.size("shared_expert_intermediate_size"), gated=True)
    return Experts.read(values, router, shared)


def fused(values: ConfigValues) -> Fused:
    """Queries, keys and values of delta nets: in GGUF and, of later models, in folders."""
    net = GatedDeltaNet.read(values)
    rows = {"q": net.key_heads * net.key_dim, "k": net.key_heads * net.key_dim, "v": net.value_heads * net.value_dim}
    return {
        "linear_attn.in_proj_qkv": [(f"linear_attn.in_proj_{part}", count) for part, count in rows.items()],
        "linear_attn.conv1d": [(f"linear_attn.conv1d_{part}", TAPS * count) for part, count in rows.items()],
    }


def gguf_delta_fields(metadata: GgufMetadata) -> Json:
    """The sizes of delta nets, and which layers are none."""
    heads = metadata.size("ssm.time_step_rank")
    return {
        "linear_conv_kernel_dim": metadata.size("ssm.conv_kernel"),
        "linear_key_head_dim": metadata.size("ssm.state_size"),
        "linear_num_key_heads": metadata.size("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": metadata.size("ssm.inner_size") // heads,
        INTERVAL: metadata.size(INTERVAL, 4),
    }


def gguf_fields(metadata: GgufMetadata) -> Json:
    width = metadata.size("expert_feed_forward_length")
    norm = metadata.get("expert_weights_norm")
    return {
        **gguf_delta_fields(metadata),
        "num_experts": metadata.size("expert_count"),
        "num_experts_per_tok": metadata.size("expert_used_count"),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": metadata.size("expert_shared_feed_forward_length", width),
        "norm_topk_prob": True if norm is None else bool(norm),
    }


GGUF_MIXERS: Json = {
    "attn_q": "self_attn.q_gate_proj",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_a": "linear_attn.A",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "post_attention_norm": "post_attention_layernorm",
}
GGUF_DENSE = {**GGUF_NAMES, **GGUF_MIXERS}
GGUF_SPARSE = {**GGUF_EXPERTS, **GGUF_MIXERS, "ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
RENAMES = {
    r"\.self_attn\.q_proj\.": ".self_attn.q_gate_proj.",
    r"\.linear_attn\.A_log$": ".linear_attn.A",
    r"\.mlp\.shared_expert\.": ".mlp.shared_experts.",
}
FROM_ONE = r"(?<!linear_attn\.)norm(?:_embedding|_hidden)?\.weight$"
LOGARITHMS = r"\.linear_attn\.A$"
NEGATIVE = ("linear_attn.A",)
FLAT = r"\.linear_attn\.conv1d\."
DEFAULTS: Json = {
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    PARTIAL: 0.25,
    "linear_conv_kernel_dim": TAPS,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
MOE_DEFAULTS: Json = {
    **DEFAULTS,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}

FAMILY = Family(
    "qwen3_next",
    blocks,
    defaults={**MOE_DEFAULTS, "num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True},
    refusals=no_such_biases("qwen3_next", "attention_bias", "mlp_bias"),
    renames=RENAMES,
    fused=fused,
    from_one=FROM_ONE,
    logarithms=LOGARITHMS,
    flat=FLAT,
    rope=read_partial_rope,
    gguf=Gguf(
        "qwen3next",
        experts=True,
        names=GGUF_SPARSE,
        flags={},
        fields=gguf_fields,
        partial_rope=True,
        negative=NEGATIVE,
    ),
    pre_tokenizer="qwen2",
)
MULTIMODAL_ROPE = ("mrope_section", "mrope_interleaved")
"""How the channels that RoPE turns are shared by time, height and width, which are the same for text."""
rope_of_text = partial(read_rope, also=(PARTIAL, *MULTIMODAL_ROPE))
