"""Qwen3.5 and later with experts, their language model: Qwen3-Next's layers, its tensors less fused."""

from mpillama.models.config_values import ConfigValues
from mpillama.models.families import qwen3_5_text, qwen3_next
from mpillama.models.family import Block, Family, Gguf, Refusal, no_such_biases


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    """Shares of experts are always divided by their sum."""
    experts = qwen3_next.read_experts(values, renormalise=True)
    return tuple(Block(mixer, experts) for mixer in qwen3_next.read_mixers(values))


FAMILY = Family(
    "qwen3_5_moe_text",
    blocks,
    defaults={**qwen3_next.MOE_DEFAULTS, "num_experts": 256, "num_experts_per_tok": 8},
    refusals=(
        *no_such_biases("qwen3_5_moe_text", "attention_bias", "mlp_bias"),
        Refusal("norm_topk_prob", "a model of this type always divides shares by their sum", (None, True)),
    ),
    renames=qwen3_next.RENAMES,
    fused=qwen3_next.fused,
    from_one=qwen3_next.FROM_ONE,
    logarithms=qwen3_next.LOGARITHMS,
    flat=qwen3_next.FLAT,
    within=("qwen3_5_moe",),
    rope=qwen3_next.rope_of_text,
    gguf=Gguf(
        "qwen35moe",
        experts=True,
        names=qwen3_next.GGUF_SPARSE,
        flags={},
        fields=qwen3_next.gguf_fields,
        partial_rope=True,
        negative=qwen3_next.NEGATIVE,
        rope_keys=("dimension_sections",),
        tiled_heads=qwen3_5_text.tiled_heads,
    ),
    pre_tokenizer="qwen35",
)
