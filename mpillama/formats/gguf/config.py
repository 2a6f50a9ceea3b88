"""GGUF's metadata as a configuration in Hugging Face's spelling."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.checkpoint import StoredTensor
from mpillama.formats.foreign import damaged, split_expert_vectors, split_experts
from mpillama.formats.gguf.header import GgufHeader
from mpillama.models.families import gguf_architectures
from mpillama.models.family import DRAFT_LAYERS, Gguf, gguf_draft_layers
from mpillama.models.rope import PARTIAL, yarn_attention_factor

ROPE_FACTORS = {
    "rope_freqs.weight": "factors",
    "rope_factors_short.weight": "short_factor",
    "rope_factors_long.weight": "long_factor",
}
"""Divisors of the rotary frequencies, which are weights in GGUF and configuration to us."""
FREQUENCIES = "rope_freqs.weight"
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
IGNORED = "attn_rot_embd"
"""Rotary frequencies in old files, which follow from the metadata."""

OUTER = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", OUTPUT: "lm_head.weight"}
EXPERTS = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
SINGLE_ROWS = ("ffn_gate_inp_shexp",)
"""Matrices of one row, which are vectors there."""
ROTATED = ("attn_q", "attn_k")
"""What may stand in rotary pairs."""


def canonical(path: str, tensor: StoredTensor, gguf: Gguf, head_dim: int) -> Iterator[StoredTensor]:
    """The tensor under Hugging Face's name, stacked experts one by one; an unknown name stays as it is."""
    bare = re.fullmatch(r"blk\.([0-9]{1,6})\.(\w+)", tensor.name, re.ASCII)
    if bare and bare[2] in gguf.names:
        yield replace(tensor, name=f"model.layers.{int(bare[1])}.{gguf.names[bare[2]]}")
        return
    layer = re.fullmatch(
        r"blk\.([0-9]{1,6})\.((?:indexer\.)?\w+)(?:\.([0-9]{1,6}))?\.(weight|bias)", tensor.name, re.ASCII
    )
    if layer is None:
        yield replace(tensor, name=OUTER.get(tensor.name, tensor.name))
        return
    prefix, kind, expert, ending = f"model.layers.{int(layer[1])}.", layer[2], layer[3], layer[4]
    if kind in EXPERTS and not expert and ending == "weight":
        yield from split_experts(path, prefix + "mlp.experts.", tensor, EXPERTS[kind])
    elif kind in EXPERTS and len(EXPERTS[kind]) == 1 and not expert:
        yield from split_expert_vectors(path, prefix + "mlp.experts.", tensor, *EXPERTS[kind])
    elif expert and kind in ("ffn_gate", "ffn_up", "ffn_down"):
        name = f"{prefix}mlp.experts.{int(expert)}.{kind.removeprefix('ffn_')}_proj.{ending}"
        yield replace(tensor, name=name)
    elif f"{kind}.{ending}" in gguf.names and not expert:
        yield replace(tensor, name=prefix + gguf.names[f"{kind}.{ending}"])
    elif kind in gguf.names and not expert:
        if len(tensor.shape) == 3:  # a matrix for each head
            tensor = replace(tensor, shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))
        if kind in SINGLE_ROWS and len(tensor.shape) == 1:
            tensor = replace(tensor, shape=(1, *tensor.shape))
        pairs = head_dim if gguf.rotary_pairs and kind in ROTATED else 0
        yield replace(tensor, name=f"{prefix}{gguf.names[kind]}.{ending}", interleaved=pairs)
    elif kind != IGNORED:
        yield tensor


OTHER_KINDS = {
    "adapter": "an adapter (LoRA), not a model: merge it into its base model (llama-export-lora), and give that file",
    "mmproj": "the part of a model that sees pictures: give the .gguf file of its language model",
    "imatrix": "an importance matrix for quantising, not a model: give the .gguf file of the model",
}
"""What a file of a general.type that is not "model" holds, and what to do."""
MOST = 2**40
"""A damaged file may claim more of something."""
BY_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length", "attention.sliding_window")
"""Keys that may have a value for each layer."""
TOKENIZER = "tokenizer.ggml."


class Metadata:
    """Takes checked values out of a file's metadata; names without a dot before them belong to the architecture."""

    def __init__(self, header: GgufHeader, rope_factors: Mapping[str, Sequence[float]]):
        self.header = header
        self.rope_factors = rope_factors
        self.path = header.path
        kind = header.value("general.type")
        if kind in OTHER_KINDS:
            raise UserError(f"{self.path}: {OTHER_KINDS[kind]}.")
        self.architecture = header.value("general.architecture")
        known = gguf_architectures()
        if self.architecture not in known:
            raise UserError(
                f"{self.path}: architecture {self.architecture!r}: mpillama runs {', '.join(known)} of GGUF."
            )
        families = known[self.architecture]
        with_experts = bool(self.get("expert_count"))
        self.family = next((f for f in families if f.gguf and f.gguf.experts == with_experts), families[0])

    def get(self, key: str) -> Any:
        """The architecture's value, None if there is none; of a list with a value for each layer the one of all."""
        name = f"{self.architecture}.{key}"
        value = self.header.metadata.get(name)
        if key not in BY_LAYER or not isinstance(value, np.ndarray):
            return self.header.value(name)
        different = sorted(set(value.tolist()))
        if len(different) != 1:
            shown = ", ".join(map(str, different[:8])) or "no values"
            raise UserError(
                f"{self.path}: {name} differs from layer to layer ({shown}): mpillama runs models whose layers are all "
                "alike."
            )
        return different[0]

    def of_layers(self, key: str) -> Sequence[Any] | None:
        """A value for each layer, None if there are none; one value stands for all layers."""
        value = self.header.metadata.get(f"{self.architecture}.{key}")
        if value is None or isinstance(value, list):
            return value
        return list(value.tolist()) if isinstance(value, np.ndarray) else [value] * self.size("block_count")

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise damaged(
                self.path, f"its metadata has {self.architecture}.{key}={value!r}, expected a positive number"
            )
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(key, default)
        if value != int(value) or value >= MOST:
            raise damaged(self.path, f"its metadata has {self.architecture}.{key}={value!r}, expected a whole number")
        return int(value)

    def refuse_unread(self, prefix: str, known: Collection[str]) -> None:
        """Refuse a key of the architecture that begins so and that nobody reads; off and zero change nothing."""
        start = f"{self.architecture}.{prefix}"
        for key, value in self.header.metadata.items():
            shown = value.tolist() if isinstance(value, np.ndarray) else value
            in_force = any(shown) if isinstance(shown, list) else bool(shown)
            if key.startswith(start) and key.removeprefix(start) not in known and in_force:
                name = key.encode(errors="backslashreplace").decode()  # in a damaged file it may be no text
                raise UserError(
                    f"{self.path}: its metadata has {name}={shown!r}, which mpillama does not know and cannot leave "
                    "out: take another file of the model."
                )

    def token_id(self, name: str) -> int | None:
        """A special token's id, None if there is none."""
        value = self.header.value(f"{TOKENIZER}{name}_token_id")
        return value if isinstance(value, int) else None

    @property
    def gguf(self) -> Gguf:
        """How the family is held."""
        assert self.family.gguf
        return self.family.gguf

    @property
    def head_dim(self) -> int:
        """Channels of a head; refused if only a part of them is rotated, but by a family that knows it."""
        if self.gguf.own_heads:
            return self.size("rope.dimension_count")
        default = self.size("embedding_length") // self.size("attention.head_count")
        head_dim = self.size("attention.key_length", default)
        whole = () if self.gguf.partial_rope else ("rope.dimension_count",)
        for key in (*whole, "attention.value_length"):
            if self.size(key, head_dim) != head_dim:
                raise UserError(
                    f"{self.path}: {key}={self.get(key)!r}, but the heads have {head_dim} channels: "
                    "mpillama runs models whose heads are rotated whole."
                )
        return head_dim

    @property
    def partial_rope(self) -> dict[str, float]:
        """The share of a head's channels that is rotated; a little more, for the product is rounded down."""
        channels = self.size("rope.dimension_count", self.head_dim)
        return {PARTIAL: (channels + 0.25) / self.head_dim} if channels != self.head_dim else {}


def hugging_face_config(metadata: Metadata, names: Collection[str], vocab_size: int) -> dict[str, Any]:
    """Build config.json; `names` are GGUF's names of tensors."""
    heads, fields = metadata.size("attention.head_count"), metadata.gguf.fields(metadata)
    drafting = gguf_draft_layers(metadata)
    _check_rope_factors(metadata, fields)
    config = {
        "model_type": metadata.family.model_type,
        "hidden_size": metadata.size("embedding_length"),
        "intermediate_size": metadata.size("feed_forward_length", _expert_width(metadata)),
        "num_hidden_layers": max(1, metadata.size("block_count") - drafting),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": metadata.head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": metadata.size("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": float(metadata.number("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata),
        "tie_word_embeddings": OUTPUT not in names,
    }
    present = {key: f"blk.0.{ending}" in names for key, ending in metadata.gguf.flags.items()}
    flags = {key: found for key, found in present.items() if found != metadata.family.defaults.get(key, False)}
    optional = {**flags, **fields, **metadata.partial_rope, **_special_tokens(metadata)}
    if drafting:
        optional[DRAFT_LAYERS] = drafting
    window = metadata.get("attention.sliding_window")
    return {**config, **optional, **({"sliding_window": metadata.size("attention.sliding_window")} if window else {})}


def _check_rope_factors(metadata: Metadata, fields: Mapping[str, Any]) -> None:
    """Refuse divisors of another number than there are frequencies, and those that the family does not read."""
    pairs = metadata.size("rope.dimension_count", metadata.head_dim) // 2
    for name, key in ROPE_FACTORS.items():
        found = metadata.rope_factors.get(key)
        if found is None:
            continue
        if len(found) != pairs:
            raise damaged(metadata.path, f"{name} holds {len(found)} divisors of {pairs} frequencies")
        if name != FREQUENCIES and "rope_scaling" not in fields:
            raise UserError(
                f"{metadata.path}: the tensor {name} is not part of a model of architecture {metadata.architecture}: "
                "take another file of the model."
            )


def _expert_width(metadata: Metadata) -> int | None:
    """The width of an expert where the metadata states it."""
    key = "expert_feed_forward_length"
    return metadata.size(key) if metadata.get(key) is not None else None


def _special_tokens(metadata: Metadata) -> dict[str, Any]:
    """BOS, and every token that ends a turn."""
    bos = metadata.token_id("bos")
    ends = [metadata.token_id(name) for name in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(end for end in ends if end is not None))
    return {**({} if bos is None else {"bos_token_id": bos}), **({"eos_token_id": stops} if stops else {})}


# -- scaling of rotary frequencies ----------------------------------------------------------------------------------

ROPE_FIELDS = {
    "none": ("scaling.factor",),
    "linear": ("scaling.factor", "scale_linear"),
    "yarn": (
        *("scaling.factor", "scaling.original_context_length", "scaling.attn_factor", "scaling.yarn_attn_factor"),
        *("scaling.yarn_beta_fast", "scaling.yarn_beta_slow", "scaling.yarn_ext_factor", "scaling.yarn_log_multiplier"),
    ),
}
"""What each rule reads of `rope.`; llama.cpp passes over the factor if the rule is "none"."""
ALWAYS_READ = ("dimension_count", "freq_base", "scaling.type", "scaling.finetuned")


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling; "factors" is ours, for the divisors that GGUF has in place of llama3's constants."""
    scaled = metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear")
    kind = metadata.get("rope.scaling.type") or ("linear" if scaled else "none")  # as llama.cpp takes it
    known: Mapping[Any, Callable[[Metadata], dict[str, Any] | None]] = {
        "none": lambda metadata: None,
        "linear": _linear,
        "yarn": _yarn,
    }
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"{metadata.path}: rope.scaling.type={kind!r}: mpillama runs {', '.join(known)}.")
    factors = metadata.rope_factors.get(ROPE_FACTORS[FREQUENCIES])
    if factors and kind != "none":
        raise UserError(
            f"{metadata.path}: rope.scaling.type={kind!r} together with the tensor {FREQUENCIES}: mpillama runs one of "
            "both."
        )
    metadata.refuse_unread("rope.", (*ALWAYS_READ, *ROPE_FIELDS[kind], *metadata.gguf.rope_keys))
    if factors:
        return {"rope_type": "factors", "factors": list(factors)}
    found = known[kind](metadata)
    return {**metadata.gguf.scaling, **found} if found and kind == "yarn" else found


def _linear(metadata: Metadata) -> dict[str, Any]:
    factor = metadata.number("rope.scaling.factor", metadata.get("rope.scale_linear"))
    return {"rope_type": "linear", "factor": float(factor)}


def _yarn(metadata: Metadata) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": float(metadata.number("rope.scaling.factor"))}
    if metadata.get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = metadata.size("rope.scaling.original_context_length")
    for name in ("beta_fast", "beta_slow"):
        if metadata.get(f"rope.scaling.yarn_{name}"):
            scaling[name] = float(metadata.number(f"rope.scaling.yarn_{name}"))
    if metadata.number("rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise UserError(
            f"{metadata.path}: rope.scaling.yarn_ext_factor={metadata.get('rope.scaling.yarn_ext_factor')!r}: mpillama "
            "runs YaRN with the whole of its ramp (1)."
        )
    factor = _yarn_attention_factor(metadata, scaling["factor"])
    return scaling if factor is None else {**scaling, "attention_factor": factor}


def _yarn_attention_factor(metadata: Metadata, factor: float) -> float | None:
    """What cosines and sines are multiplied by, None for YaRN's own factor.

    Converters write Hugging Face's attention_factor, which is all of it, as yarn_attn_factor, and mscale_all_dim as
    yarn_log_multiplier; attn_factor is one more.
    """
    gain = metadata.number("rope.scaling.attn_factor", 1.0)
    if metadata.get("rope.scaling.yarn_attn_factor") is not None:
        return float(gain * metadata.number("rope.scaling.yarn_attn_factor"))
    scale = (
        metadata.number("rope.scaling.yarn_log_multiplier") if metadata.get("rope.scaling.yarn_log_multiplier") else 0
    )
    if gain == 1 and not scale:
        return None
    return float(gain * yarn_attention_factor(factor, 1.0, scale))
