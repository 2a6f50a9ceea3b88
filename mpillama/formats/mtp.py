"""The layer of a checkpoint that only drafts tokens (multi-token prediction), as a model of its own.

It stands behind the last layer of a model, under the next number (DeepSeek V3, GLM-4.5, their GGUF files) or under
`mtp.` (Qwen3-Next, Qwen3.5). Some checkpoints repeat embedding and head there; else they are the model's.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint, StoredTensor
from mpillama.models.config import MTP, ModelConfig
from mpillama.models.tensors import EH_PROJ, EMBEDDING, EMBEDDING_NORM, FINAL_NORM, HIDDEN_NORM, LM_HEAD, layer_prefix

OUTER: Mapping[str, str] = {
    "eh_proj.weight": EH_PROJ,
    "enorm.weight": EMBEDDING_NORM,
    "hnorm.weight": HIDDEN_NORM,
    "embed_tokens.weight": EMBEDDING,
    "shared_head.norm.weight": FINAL_NORM,
    "shared_head.head.weight": LM_HEAD,
    "shared_head_norm.weight": FINAL_NORM,
    "shared_head_head.weight": LM_HEAD,
}
"""What stands beside the decoder layer, in Hugging Face's and GGUF's names."""
OF_QWEN: Mapping[str, str] = {
    "fc.weight": EH_PROJ,
    "pre_fc_norm_embedding.weight": EMBEDDING_NORM,
    "pre_fc_norm_hidden.weight": HIDDEN_NORM,
    "norm.weight": FINAL_NORM,
}


def mtp_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The layer with all that it needs; UserError if the checkpoint has none."""
    own = dict(_own_tensors(checkpoint))
    if EH_PROJ not in own:
        raise UserError(
            f"{checkpoint.path}: has no layer that drafts tokens (multi-token prediction): leave --mtp out, or take a "
            "draft model (--draft-model)."
        )
    shared = {name: checkpoint.tensors[name] for name in (EMBEDDING, LM_HEAD) if name in checkpoint.tensors}
    table = {name: replace(tensor, name=name) for name, tensor in {**shared, **own}.items()}
    return replace(checkpoint, tensors=table, config_json={**checkpoint.config_json, MTP: True})


def _own_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of the first such layer, under the names that they have in a model of one layer."""
    number = ModelConfig.from_hf(checkpoint.config_json).num_hidden_layers
    numbered = re.compile(rf"(?:model\.layers\.{number}|blk\.{number}\.nextn)\.(.*)", re.DOTALL)
    of_qwen = re.compile(r"(?:model\.)?mtp\.(?:layers\.(?P<layer>[0-9]{1,6})\.)?(?P<name>.*)", re.DOTALL)
    for name, tensor in checkpoint.tensors.items():
        if found := numbered.fullmatch(name):
            yield OUTER.get(found[1], layer_prefix(0) + found[1]), tensor
        elif (found := of_qwen.fullmatch(name)) and found["layer"] in (None, "0"):
            inner = layer_prefix(0) + found["name"]
            yield OF_QWEN.get(found["name"], inner) if found["layer"] is None else inner, tensor
