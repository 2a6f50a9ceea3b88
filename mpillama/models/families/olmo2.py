"""OLMo 2 of AI2: norms after attention and MLP instead of before, and norms of all queries and all keys together."""

from dataclasses import replace

from mpillama.kernels.arguments import HeadNorm
from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues
from mpillama.models.family import GGUF_NAMES, Block, Family, Gguf, Refusal, layer_count, no_such_biases
from mpillama.models.mlp import GatedMlp


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention = GroupedQueryAttention.read(values, qk_norm=True)
    block = Block(
        replace(attention, head_norm=HeadNorm.WHOLE_PROJECTION),
        GatedMlp.read(values),
        attention_norm="",
        mlp_norm="",
        attention_post_norm="post_attention_layernorm.weight",
        mlp_post_norm="post_feedforward_layernorm.weight",
    )
    return (block,) * layer_count(values)


NO_WINDOWS = "a model of type olmo2 has no sliding windows: it is an OLMo 3"
FAMILY = Family(
    "olmo2",
    blocks,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0},
    refusals=(
        *no_such_biases("olmo2", "mlp_bias"),
        Refusal("clip_qkv", "a model of type olmo2 does not clip queries, keys and values"),
        Refusal("sliding_window", NO_WINDOWS),
        Refusal("layer_types", NO_WINDOWS),
    ),
    gguf=Gguf(
        "olmo2",
        names={
            **GGUF_NAMES,
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    pre_tokenizer="dbrx",
)
