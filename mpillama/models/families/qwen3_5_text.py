"""Qwen3.5 and later without experts, their language model: Qwen3-Next's layers with a dense MLP."""

from collections.abc import Mapping

from mpillama.models.config_values import ConfigValues
from mpillama.models.delta_net import GatedDeltaNet
from mpillama.models.families import qwen3_next
from mpillama.models.family import Block, Family, Gguf, TiledHeads, no_such_biases
from mpillama.models.mlp import GatedMlp


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    mlp = GatedMlp.read(values)
    return tuple(Block(mixer, mlp) for mixer in qwen3_next.read_mixers(values))


def tiled_heads(values: ConfigValues) -> Mapping[str, TiledHeads]:
    """What has value heads, in the order in which llama.cpp repeats key heads for them."""
    net = GatedDeltaNet.read(values)
    rows, columns = (TiledHeads(net.key_heads, net.group, columns) for columns in (False, True))
    names = ("in_proj_v", "in_proj_z", "in_proj_a", "in_proj_b", "conv1d_v", "A", "dt_bias")
    return {"linear_attn.out_proj": columns, **{f"linear_attn.{name}": rows for name in names}}


FAMILY = Family(
    "qwen3_5_text",
    blocks,
    defaults={**qwen3_next.DEFAULTS, "num_key_value_heads": 4},
    refusals=no_such_biases("qwen3_5_text", "attention_bias", "mlp_bias"),
    renames=qwen3_next.RENAMES,
    fused=qwen3_next.fused,
    from_one=qwen3_next.FROM_ONE,
    logarithms=qwen3_next.LOGARITHMS,
    flat=qwen3_next.FLAT,
    within=("qwen3_5",),
    rope=qwen3_next.rope_of_text,
    gguf=Gguf(
        "qwen35",
        names=qwen3_next.GGUF_DENSE,
        flags={},
        fields=qwen3_next.gguf_delta_fields,
        partial_rope=True,
        negative=qwen3_next.NEGATIVE,
        rope_keys=("dimension_sections",),
        tiled_heads=tiled_heads,
    ),
    pre_tokenizer="qwen35",
)
