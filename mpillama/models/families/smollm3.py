"""SmolLM3 of Hugging Face: Llama with layers that know no positions, and windows that may be switched on for these."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mpillama.models.attention import GroupedQueryAttention
from mpillama.models.config_values import ConfigValues
from mpillama.models.family import Block, Family, Gguf, layer_count, layer_windows
from mpillama.models.mlp import GatedMlp
from mpillama.models.rope import read_rope

NO_ROPE = ("no_rope_layers", "no_rope_layer_interval")


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    attention, mlp, turns = GroupedQueryAttention.read(values), GatedMlp.read(values), rope_layers(values)
    return tuple(
        Block(replace(attention, window=window, turned=None if turn else 0), mlp)
        for window, turn in zip(windows(values, turns), turns, strict=True)
    )


def rope_layers(values: ConfigValues) -> list[bool]:
    """Which layers turn queries and keys: `no_rope_layers` says so by ones, else all but each fourth."""
    layers, given = layer_count(values), values.get("no_rope_layers")
    if not given:
        interval = values.size("no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(given, Sequence) or len(given) < layers or any(turn not in (0, 1) for turn in given):
        raise values.refuse("no_rope_layers", f"it must hold a 0 or 1 for each of {layers} layers")
    return [bool(turn) for turn in given[:layers]]


def windows(values: ConfigValues, turns: Sequence[bool]) -> list[int]:
    """None unless `use_sliding_window`; then layers that know no positions slide, or those of layer_types."""
    if not values.flag("use_sliding_window"):
        return [0] * len(turns)
    return layer_windows(values, ["full_attention" if turn else "sliding_attention" for turn in turns])


FAMILY = Family(
    "smollm3",
    blocks,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    rope=partial(read_rope, also=NO_ROPE),
    gguf=Gguf("smollm3", rotary_pairs=True),
    pre_tokenizer="smaug-bpe",
)
