"""The tensors of a model: their names, stored shapes, and which slice of each a rank owns.

Every stored array is split along its first axis only, so that a rank's slice is one extent of the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from mpillama.layout.weight_types import F32, LANES, SCALES_DTYPE, WeightType, round_up
from mpillama.model.config import ModelConfig
from mpillama.model.partition import Partition, ffn_panel

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
SCALES_SUFFIX = ".scales"


class Split(Enum):
    """By which units a tensor is divided over ranks."""

    HEADS = "heads"
    KV_HEADS = "kv_heads"
    FFN = "ffn_panels"
    VOCAB = "vocab_groups"
    REPLICATED = "replicated"


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: `entries` of its first axis belong to each unit."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    entries: int


@dataclass(frozen=True)
class TensorSpec:
    """A tensor: weight matrix [rows, columns] in row lanes, or a replicated float32 vector.

    `rows` and `columns` are padded, `source_shape` is that of the checkpoint. Column-parallel matrices are stored
    [groups, …], row-parallel ones (`panel` set) [panels, groups, …]; a unit is `unit` rows, or one panel.
    """

    name: str
    split: Split
    rows: int
    columns: int
    weight_type: WeightType
    unit: int
    source_shape: tuple[int, ...]
    panel: int | None = None
    row_chunks: int = 1
    column_chunks: int = 1

    def pad(self, source: np.ndarray) -> np.ndarray:
        """Return the checkpoint's tensor (source_shape) as float32 [rows, columns], zeros in the padding.

        Heads are padded one by one: rows and columns consist of `row_chunks` and `column_chunks` equal parts.
        """
        if self.split is Split.REPLICATED:
            return np.pad(source.astype(np.float32), (0, self.columns - len(source)))
        chunked = source.reshape(self.row_chunks, -1, self.column_chunks, self.source_shape[1] // self.column_chunks)
        padded = np.zeros(
            (self.row_chunks, self.rows // self.row_chunks, self.column_chunks, self.columns // self.column_chunks),
            np.float32,
        )
        padded[:, : chunked.shape[1], :, : chunked.shape[3]] = chunked
        return padded.reshape(self.rows, self.columns)

    @property
    def units(self) -> int:
        """Number of units that can be dealt to ranks."""
        if self.split is Split.REPLICATED:
            return 1
        return self.columns // self.panel if self.panel else self.rows // self.unit

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The stored arrays: values, and scales for quantised types."""
        if self.split is Split.REPLICATED:
            return (ArraySpec(self.name, self.weight_type.stored, (self.columns,), self.columns),)
        k, groups = self.panel or self.columns, self.rows // LANES
        lead = (self.columns // self.panel, groups) if self.panel else (groups,)
        entries = 1 if self.panel else self.unit // LANES
        values = ArraySpec(self.name, self.weight_type.stored, lead + self.weight_type.value_shape(k), entries)
        if not self.weight_type.quantised:
            return (values,)
        scales = ArraySpec(self.name + SCALES_SUFFIX, str(SCALES_DTYPE), (*lead, k // 32, LANES), entries)
        return values, scales

    def units_of(self, part: Partition) -> range:
        """The units that a rank with this partition owns."""
        return range(1) if self.split is Split.REPLICATED else getattr(part, self.split.value)


def layer_prefix(layer: int) -> str:
    """The name that the tensors of a layer begin with."""
    return f"model.layers.{layer}."


def tensor_specs(config: ModelConfig, weight_types: "WeightTypes") -> list[TensorSpec]:
    """Return every tensor of the model in the order of the file."""
    specs = [_vocabulary(EMBEDDING, config, weight_types)]
    for layer in range(config.num_hidden_layers):
        specs.extend(_layer_specs(config, layer_prefix(layer), weight_types))
    specs.append(_norm(FINAL_NORM, config))
    if not config.tie_word_embeddings:
        specs.append(_vocabulary(LM_HEAD, config, weight_types))
    return specs


@dataclass(frozen=True)
class WeightTypes:
    """The weight type of each matrix: one for all, or by name."""

    default: WeightType
    by_name: Mapping[str, WeightType] | None = None

    def of(self, name: str) -> WeightType:
        """The type of the matrix `name`."""
        return (self.by_name or {}).get(name, self.default)


def _vocabulary(name: str, config: ModelConfig, types: WeightTypes) -> TensorSpec:
    rows, source = round_up(config.vocab_size, LANES), (config.vocab_size, config.hidden_size)
    return TensorSpec(name, Split.VOCAB, rows, config.padded_hidden_size, types.of(name), LANES, source)


def _norm(name: str, config: ModelConfig) -> TensorSpec:
    return TensorSpec(name, Split.REPLICATED, 1, config.padded_hidden_size, F32, 1, (config.hidden_size,))


def _layer_specs(config: ModelConfig, prefix: str, types: WeightTypes) -> Iterator[TensorSpec]:
    hidden, head, inner = config.padded_hidden_size, config.padded_head_dim, config.padded_intermediate_size
    panel = ffn_panel(config.intermediate_size)

    def column(name: str, split: Split, chunks: int, padded: int, true: int, unit: int) -> TensorSpec:
        full, source = prefix + name, (chunks * true, config.hidden_size)
        return TensorSpec(full, split, chunks * padded, hidden, types.of(full), unit, source, None, chunks)

    def row(name: str, split: Split, chunks: int, padded: int, true: int, panel: int) -> TensorSpec:
        full, source = prefix + name, (config.hidden_size, chunks * true)
        return TensorSpec(full, split, hidden, chunks * padded, types.of(full), panel, source, panel, 1, chunks)

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    yield _norm(prefix + "input_layernorm.weight", config)
    yield column("self_attn.q_proj.weight", Split.HEADS, heads, head, config.head_dim, head)
    yield column("self_attn.k_proj.weight", Split.KV_HEADS, kv_heads, head, config.head_dim, head)
    yield column("self_attn.v_proj.weight", Split.KV_HEADS, kv_heads, head, config.head_dim, head)
    yield row("self_attn.o_proj.weight", Split.HEADS, heads, head, config.head_dim, head)
    yield _norm(prefix + "post_attention_layernorm.weight", config)
    yield column("mlp.gate_proj.weight", Split.FFN, 1, inner, config.intermediate_size, panel)
    yield column("mlp.up_proj.weight", Split.FFN, 1, inner, config.intermediate_size, panel)
    yield row("mlp.down_proj.weight", Split.FFN, 1, inner, config.intermediate_size, panel)
