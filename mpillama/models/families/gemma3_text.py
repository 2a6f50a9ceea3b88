"""Gemma 3 of Google, its language model: Gemma 2 norms of heads, and a RoPE of their own for layers with windows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families import gemma2
from mpillama.models.family import Block, Family, Gguf, GgufMetadata, layer_count, layer_windows
from mpillama.models.rope import Rope, read_rope

LAYERS_OF_27B = 62
LOCAL, GLOBAL = "sliding_attention", "full_attention"
LOCAL_THETA = "rope_local_base_freq"


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, mlp = gemma2.read_attention(values, qk_norm=True), gemma2.read_mlp(values)
    local = read_one_rope(values, LOCAL, values.size("max_position_embeddings"))
    pattern = values.size("sliding_window_pattern")
    kinds = [LOCAL if (layer + 1) % pattern else GLOBAL for layer in range(layer_count(values))]
    kinds = values.get("layer_types") or kinds
    return tuple(
        replace(gemma2.block_of(replace(attention, window=window), mlp), rope=local if kind == LOCAL else None)
        for window, kind in zip(layer_windows(values, kinds), kinds, strict=True)
    )


def rope(values: ConfigValues, context: int) -> Rope:
    return read_one_rope(values, GLOBAL, context)


def read_one_rope(values: ConfigValues, kind: str, context: int) -> Rope:
    """That of one kind of layers. `rope_parameters` may hold both; a rope_scaling is that of layers without windows."""
    both = values.get("rope_parameters") or {}
    if not isinstance(both, Mapping) or set(both) - {LOCAL, GLOBAL}:
        raise values.refuse("rope_parameters", f"it must hold the parameters of {LOCAL} and of {GLOBAL}")
    own: dict[str, Any] = dict(both.get(kind) or {})
    if kind == GLOBAL:
        own |= values.get("rope_scaling") or {}
    theta = values.number("rope_theta" if kind == GLOBAL else LOCAL_THETA)
    taken = ("rope_parameters", "rope_scaling", "rope_theta", LOCAL_THETA)
    others = {key: value for key, value in values.source.items() if key not in taken}
    return read_rope(ConfigValues({**others, "rope_parameters": own, "rope_theta": theta}), context)


def gguf_fields(metadata: GgufMetadata) -> Json:
    pattern, theta = "attention.sliding_window_pattern", "rope.freq_base_swa"
    return {
        "query_pre_attn_scalar": gemma2.gguf_scalar(metadata, LAYERS_OF_27B),
        **gemma2.gguf_soft_caps(metadata),
        **({"sliding_window_pattern": metadata.size(pattern)} if metadata.get(pattern) is not None else {}),
        **({LOCAL_THETA: float(metadata.number(theta))} if metadata.get(theta) is not None else {}),
        **({} if metadata.get("attention.sliding_window") else {"sliding_window": None}),
    }


FAMILY = Family(
    "gemma3_text",
    blocks,
    defaults={
        **gemma2.DEFAULTS,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        LOCAL_THETA: 10000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    refusals=gemma2.REFUSALS,
    within=("gemma3",),
    rope=rope,
    factors=gemma2.factors,
    from_one=r"norm\.weight$",
    gguf=Gguf("gemma3", names=gemma2.NAMES, fields=gguf_fields, rope_keys=("freq_base_swa",)),
)
