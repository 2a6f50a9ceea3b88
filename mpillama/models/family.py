"""What a family file says: how a configuration becomes decoder layers, and how file formats hold the model.

A family is one module of `families/` that defines `FAMILY`; nothing else in the package names a family.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mpillama.models.attention import Attention
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.mlp import Mlp
from mpillama.models.rope import Rope, read_rope

Fused = Mapping[str, Sequence[tuple[str, int]]]
"""Modules of a layer, each with the modules and numbers of rows that it is cut into."""
MOST_LAYERS = 10_000
"""A damaged file may claim more; listing their tensors would take for ever."""
DRAFT_LAYERS = "num_nextn_predict_layers"
"""How many layers behind the last of a checkpoint only draft tokens (multi-token prediction); formats/mtp.py takes the
first, else they are left out.
"""


@dataclass(frozen=True)
class Block:
    """One decoder layer: attention, then the MLP, each added to the residual stream times `residual_factor`.

    The norms before and after each are named as the checkpoint does, within the layer, "" for none. `rope` is that of
    the layer, None for the model's.
    """

    attention: Attention
    mlp: Mlp
    attention_norm: str = "input_layernorm.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    attention_post_norm: str = ""
    mlp_post_norm: str = ""
    rope: Rope | None = None
    residual_factor: float = 1.0

    @property
    def has_post_norms(self) -> bool:
        return bool(self.attention_post_norm or self.mlp_post_norm)


@dataclass(frozen=True)
class OuterFactors:
    """What the embedding is multiplied by, logits are divided by, and to within what they are bent, 0 for nothing."""

    embedding: float = 1.0
    logits: float = 1.0
    logits_cap: float = 0.0


@dataclass(frozen=True)
class TiledHeads:
    """Heads that stand in another order than ours: the first of each group, then the second of each, and so on.

    They are rows of a tensor, or `columns`.
    """

    groups: int
    of_group: int
    columns: bool = False


class GgufMetadata(Protocol):
    """Checked values out of a GGUF file's metadata, by keys without the architecture."""

    @property
    def head_dim(self) -> int:
        """Channels of a head."""

    @property
    def rope_factors(self) -> Mapping[str, Sequence[float]]:
        """The divisors of the rotary frequencies that lie in tensors, by their names in a configuration."""

    def get(self, key: str) -> Any:
        """The value, None if there is none."""

    def of_layers(self, key: str) -> Sequence[Any] | None:
        """A value for each layer, None if there are none."""

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""

    def refuse_unread(self, prefix: str, known: Collection[str]) -> None:
        """UserError for a key that begins so, is not known behind that, and is not off or zero."""


GGUF_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What GGUF calls the modules of a layer, in Hugging Face's names."""
GGUF_EXPERTS: Mapping[str, str] = {
    **GGUF_NAMES,
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
"""The same with a shared expert and a correction of scores; a name with an ending stands for one tensor."""
GGUF_BIASES: Mapping[str, str] = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}


@dataclass(frozen=True)
class Gguf:
    """How GGUF files hold a family.

    `experts`: of the files of this architecture the family has those with experts, else those without. `rotary_pairs`:
    the rows of q and k stand in pairs that RoPE turns. `flags` are options of the configuration that are true if and
    only if the first layer has the tensor; `fields` gives what else the configuration says. `partial_rope`: the family
    reads partial_rotary_factor; `rope_keys`: what else it reads of `rope.`; `scaling`: what its YaRN has that files do
    not tell; `own_heads`: `fields` reads the sizes of heads, of which only a part is turned. `tiled_heads` are modules
    of a layer whose heads stand in another order, `negative` those whose values have the other sign.
    """

    architecture: str
    experts: bool = False
    rotary_pairs: bool = False
    names: Mapping[str, str] = field(default_factory=lambda: GGUF_NAMES)
    flags: Mapping[str, str] = field(default_factory=lambda: GGUF_BIASES)
    fields: Callable[[GgufMetadata], Json] = lambda metadata: {}
    partial_rope: bool = False
    scaling: Json = field(default_factory=dict)
    rope_keys: Sequence[str] = ()
    own_heads: bool = False
    tiled_heads: Callable[[ConfigValues], Mapping[str, TiledHeads]] = lambda values: {}
    negative: Sequence[str] = ()


@dataclass(frozen=True)
class Dllama:
    """How distributed-llama holds a family: its number, and as in Gguf `experts` and `rotary_pairs`.

    `head_norms`: norms of q and k stand before the others; `scaled_rope`: files may scale RoPE as Llama 3.1.
    """

    architecture: int
    experts: bool = False
    rotary_pairs: bool = False
    head_norms: bool = False
    scaled_rope: bool = False


@dataclass(frozen=True)
class Refusal:
    """An option that would change the numbers and that nobody reads: refused unless it is off, or one of `harmless`."""

    key: str
    remedy: str
    harmless: Sequence[Any] = (None, False, 0, [])


@dataclass(frozen=True)
class GgufExperts:
    """What metadata says of experts: `scores` in DeepSeek's words, `layer_types` of the layers that are run."""

    count: int
    chosen: int
    width: int
    shared: int
    scaling: float
    renormalise: bool
    groups: int
    chosen_groups: int
    scores: str
    layer_types: list[str]


GATING = {1: "softmax", 2: "sigmoid", 3: "softmax_of_chosen", 4: "sqrtsoftplus"}
"""The numbers of expert_gating_func; without one llama.cpp takes the architecture's own."""


def gguf_experts(metadata: GgufMetadata, without: str = "sigmoid") -> GgufExperts:
    """The metadata of routers; `without` are the scores of a file that does not tell them."""
    norm, gating, dense = (
        metadata.get(key) for key in ("expert_weights_norm", "expert_gating_func", "leading_dense_block_count")
    )
    layers = metadata.size("block_count") - gguf_draft_layers(metadata)
    return GgufExperts(
        count=metadata.size("expert_count"),
        chosen=metadata.size("expert_used_count"),
        width=metadata.size("expert_feed_forward_length"),
        shared=metadata.size("expert_shared_count", 1),
        scaling=float(metadata.number("expert_weights_scale", 1.0)),
        renormalise=True if norm is None else bool(norm),
        groups=metadata.size("expert_group_count", 1),
        chosen_groups=metadata.size("expert_group_used_count", 1),
        scores=GATING.get(gating, str(gating)) if gating else without,
        layer_types=["dense" if layer < (dense or 0) else "sparse" for layer in range(layers)],
    )


def gguf_draft_layers(metadata: GgufMetadata) -> int:
    """How many of a file's last layers only draft tokens."""
    return metadata.size("nextn_predict_layers") if metadata.get("nextn_predict_layers") else 0


def no_such_biases(model_type: str, *keys: str) -> tuple[Refusal, ...]:
    """Refuse the biases that the family lacks."""
    return tuple(Refusal(key, f"a model of type {model_type} has no such biases") for key in keys)


EXPERTS_ALIKE = "mpillama runs experts in all layers or in none"
ALIKE = (Refusal("mlp_only_layers", EXPERTS_ALIKE), Refusal("decoder_sparse_step", EXPERTS_ALIKE, (None, 1)))
"""Options of any family that would make some layers another kind."""


@dataclass(frozen=True)
class Family:
    """A `model_type` of Hugging Face.

    `blocks` reads the decoder layers out of a configuration; `defaults` are those of transformers' configuration class.
    `rope` reads the model's RoPE, given its context, `factors` what is around the layers. `within` are types of models
    that hold one of this family under text_config, among other parts.
    `renames` turns a checkpoint's names of tensors into ours by regular expressions. `fused` gives, for modules of a
    layer that hold several of ours, these and their rows, one below the other. Regular expressions for vectors: `flat`
    for those that may have any shape, `from_one` for those that a Hugging Face folder stores less 1, `logarithms` for
    those of which it has the logarithms. `rotary_pairs`: the rows of q and k stand there in pairs that RoPE turns.
    `turned_experts`: stacked experts are as in formats/turned_experts.py, the rows of gate and up by turns if
    `experts_by_turns`. `pre_tokenizer` names the rules of vocabularies in GGUF files that name none; `tokens_strip`:
    control tokens of a vocabulary of pieces take the white space behind them along.
    """

    model_type: str
    blocks: Callable[[ConfigValues], tuple[Block, ...]]
    defaults: Json
    refusals: tuple[Refusal, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    fused: Callable[[ConfigValues], Fused] = lambda values: {}
    flat: str = ""
    from_one: str = ""
    logarithms: str = ""
    rotary_pairs: bool = False
    turned_experts: bool = False
    experts_by_turns: bool = True
    within: Sequence[str] = ()
    rope: Callable[[ConfigValues, int], Rope] = read_rope
    factors: Callable[[ConfigValues], OuterFactors] = lambda values: OuterFactors()
    gguf: Gguf | None = None
    dllama: Dllama | None = None
    pre_tokenizer: str = ""
    tokens_strip: bool = False

    def values(self, source: Json) -> ConfigValues:
        """A configuration with the family's defaults; UserError for an option that nobody reads."""
        values = ConfigValues(source, self.defaults)
        for refusal in (*ALIKE, *self.refusals):
            if source.get(refusal.key) not in refusal.harmless:
                raise values.refuse(refusal.key, refusal.remedy)
        return values


def layer_count(values: ConfigValues) -> int:
    return values.size("num_hidden_layers", limit=MOST_LAYERS)


def dense_or_sparse(values: ConfigValues) -> list[bool]:
    """Which layers have experts: `mlp_layer_types` or, where it is left out, those from `first_k_dense_replace` on."""
    layers, kinds = layer_count(values), values.get("mlp_layer_types")
    if kinds is None:
        dense = values.get("first_k_dense_replace")
        first = 0 if dense == 0 else values.size("first_k_dense_replace")
        kinds = ["dense" if layer < first else "sparse" for layer in range(layers)]
    if (
        not isinstance(kinds, Sequence)
        or len(kinds) != layers
        or any(kind not in ("dense", "sparse") for kind in kinds)
    ):
        raise values.refuse("mlp_layer_types", f"it must name dense or sparse for {layers} layers")
    return [kind == "sparse" for kind in kinds]


def layer_windows(values: ConfigValues, kinds: Sequence[str]) -> list[int]:
    """Each layer's sliding window, 0 for none: `layer_types` or, where it is left out, `kinds` says which slide."""
    layers, window = layer_count(values), values.given("sliding_window")  # null is a value: none
    if window is None:
        return [0] * layers
    kinds = values.get("layer_types") or kinds
    known = {"full_attention": 0, "sliding_attention": values.size("sliding_window")}
    if not isinstance(kinds, Sequence) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise values.refuse("layer_types", f"it must name full_attention or sliding_attention for {layers} layers")
    return [known[kind] for kind in kinds]
