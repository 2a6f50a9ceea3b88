"""GLM-5 and later: DeepSeek V3.2's layers in other sizes; from 5.2 on, layers in a row see the same positions."""

from collections.abc import Sequence
from dataclasses import replace

from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families import deepseek_v32
from mpillama.models.families.deepseek_v32 import FULL, SHARED, indexed_blocks
from mpillama.models.family import DRAFT_LAYERS, Block, GgufMetadata, Refusal, layer_count

FIRST_SHARING_CONTEXT = 1 << 20
"""Files of GLM-5.2 may not say which layers have an indexer; they are known by their context."""


def blocks(values: ConfigValues) -> tuple[Block, ...]:
    return indexed_blocks(values, with_indexer(values), rotary_pairs=True)


def with_indexer(values: ConfigValues) -> list[bool]:
    """Which layers choose positions by themselves: as indexer_types says, else a pattern, else every so many.

    A list may go on with layers that only draft tokens.
    """
    layers = layer_count(values)
    key = next((key for key in ("indexer_types", "index_topk_pattern") if values.get(key) is not None), "")
    if key:
        kinds = values.get(key)
        if isinstance(kinds, str) and key == "index_topk_pattern":
            kinds = [{"F": FULL, "S": SHARED}.get(letter) for letter in kinds]
    else:
        every, offset = values.get("index_topk_freq", 1), values.get("index_skip_topk_offset", 2)
        if not all(isinstance(number, int) for number in (every, offset)):
            raise values.refuse("index_topk_freq", "it and index_skip_topk_offset must be whole numbers")
        key, every = "index_skip_topk_offset", max(every, 1)
        kinds = [SHARED if max(layer - offset + 1, 0) % every else FULL for layer in range(layers)]
    drafting = values.get(DRAFT_LAYERS)
    if isinstance(kinds, Sequence) and isinstance(drafting, int) and len(kinds) == layers + drafting:
        kinds = kinds[:layers]
    if (
        not isinstance(kinds, Sequence)
        or len(kinds) != layers
        or any(kind not in (FULL, SHARED) for kind in kinds)
        or kinds[0] != FULL
    ):
        raise values.refuse(key, f"it must name {FULL} or {SHARED} for {layers} layers, and {FULL} for the first")
    return [kind == FULL for kind in kinds]


def gguf_fields(metadata: GgufMetadata) -> Json:
    fields = deepseek_v32.indexed_fields(metadata)
    silent = not any(key in fields for key in ("indexer_types", "index_topk_freq"))
    if silent and metadata.size("context_length") >= FIRST_SHARING_CONTEXT:
        return {**fields, "index_topk_freq": 4, "index_skip_topk_offset": 3}
    return fields


V32 = deepseek_v32.FAMILY
assert V32.gguf
NEIGHBOURS = "mpillama turns neighbouring channels of this model's index queries only"
UNLIKE = ("indexer_rope_interleave", "indexer_types", "index_topk_pattern", "index_topk_freq")
FAMILY = replace(
    V32,
    model_type="glm_moe_dsa",
    blocks=blocks,
    defaults={
        **V32.defaults,
        "q_lora_rank": 2048,
        "v_head_dim": 256,
        "qk_nope_head_dim": 192,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "index_n_heads": 32,
    },
    refusals=(
        *(refusal for refusal in V32.refusals if refusal.key not in UNLIKE),
        Refusal("indexer_rope_interleave", NEIGHBOURS, (None, True)),
    ),
    gguf=replace(V32.gguf, architecture="glm-dsa", fields=gguf_fields),
    pre_tokenizer="glm4",
)
