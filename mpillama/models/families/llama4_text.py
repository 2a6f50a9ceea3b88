"""Llama 4 of Meta, its language model: experts, chunks of attention with RoPE, and layers that see all without RoPE."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mpillama.kernels.arguments import HeadNorm
from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families.smollm3 import NO_ROPE, rope_layers
from mpillama.models.family import GGUF_EXPERTS, Block, Family, Gguf, GgufMetadata, layer_count, no_such_biases
from mpillama.models.mlp import Experts, GatedMlp, SharedExpert
from mpillama.models.rope import QueryFactors, Rope, read_rope
from mpillama.models.router import Router

EXPERTS_OF_MAVERICK = 128
"""The model whose queries and keys have no norms, which no GGUF says."""
CHUNKED = "chunked_attention"


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, mlps, growing = GroupedQueryAttention.read(values), read_mlps(values), rope_without_turning(values)
    turns = rope_layers(values)
    normed = replace(attention, qk_norm=values.flag("use_qk_norm"), head_norm=HeadNorm.AFTER_ROPE)
    turning, still = (Block(normed, mlps[0]), Block(replace(attention, turned=0), mlps[0], rope=growing))
    return tuple(
        replace(block, attention=replace(block.attention, chunk=chunk), mlp=mlp)  # type: ignore[type-var]
        for block, chunk, mlp in zip(
            (turning if turn else still for turn in turns), chunks(values, turns), mlps, strict=True
        )
    )


def chunks(values: ConfigValues, turns: Sequence[bool]) -> list[int]:
    """Each layer's chunk, 0 for none: `layer_types` or, where it is left out, layers with RoPE see no more."""
    if values.given("attention_chunk_size") is None:
        return [0] * len(turns)
    kinds = values.get("layer_types") or [CHUNKED if turn else "full_attention" for turn in turns]
    known = {"full_attention": 0, CHUNKED: values.size("attention_chunk_size")}
    if not isinstance(kinds, Sequence) or len(kinds) != len(turns) or any(kind not in known for kind in kinds):
        raise values.refuse("layer_types", f"it must name full_attention or {CHUNKED} for {len(turns)} layers")
    return [known[kind] for kind in kinds]


def rope_without_turning(values: ConfigValues) -> Rope:
    """That of layers without RoPE: their queries grow with the position, unless that is switched off."""
    plain = Rope(1.0, None)
    if not values.flag("attn_temperature_tuning"):
        return plain
    return replace(plain, query_factors=QueryFactors(values.number("attn_scale"), values.number("floor_scale"), 1))


def read_mlps(values: ConfigValues) -> list[GatedMlp]:
    """Every `interleave_moe_layer_step`th layer has experts, or those of `moe_layers`."""
    layers, step = layer_count(values), values.size("interleave_moe_layer_step")
    sparse = values.get("moe_layers")
    if sparse is None:
        sparse = range(step - 1, layers, step)
    if not isinstance(sparse, Sequence) or any(layer not in range(layers) for layer in sparse):
        raise values.refuse("moe_layers", f"it must be a list of numbers of {layers} layers")
    dense = replace(GatedMlp.read(values), intermediate_size=values.size("intermediate_size_mlp"))
    router = Router.read(values, scores="logits_to_sigmoid", renormalise=False)
    experts = Experts.read(values, router, SharedExpert(values.size("intermediate_size")))
    experts = replace(experts, weighs_inputs=True)
    return [experts if layer in sparse else dense for layer in range(layers)]


def gguf_fields(metadata: GgufMetadata) -> Json:
    """Of chunks and growing queries files say nothing; all have the usual ones."""
    count = metadata.size("expert_count")
    return {
        "num_local_experts": count,
        "num_experts_per_tok": metadata.size("expert_used_count"),
        "intermediate_size": metadata.size("expert_feed_forward_length"),
        "intermediate_size_mlp": metadata.size("feed_forward_length"),
        "interleave_moe_layer_step": metadata.size("interleave_moe_layer_step"),
        "use_qk_norm": count != EXPERTS_OF_MAVERICK,
    }


FAMILY = Family(
    "llama4_text",
    blocks,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    refusals=no_such_biases("llama4_text", "mlp_bias"),
    within=("llama4",),
    rope=partial(read_rope, also=NO_ROPE),
    renames={
        r"\.feed_forward\.router\.": ".mlp.gate.",
        r"\.feed_forward\.shared_expert\.": ".mlp.shared_experts.",
        r"\.feed_forward\.": ".mlp.",
    },
    rotary_pairs=True,
    turned_experts=True,
    experts_by_turns=False,
    gguf=Gguf("llama4", experts=True, rotary_pairs=True, names=GGUF_EXPERTS, fields=gguf_fields),
    pre_tokenizer="llama4",
)
