"""The tensors of a model: their names, stored shapes, and which slice of each a rank owns.

Every stored array is split along one axis only: the first, or the second after the experts. A rank's slice is one
extent of the file, or one for each expert.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from mpillama.model.config import ModelConfig
from mpillama.model.partition import Partition, ffn_panel
from mpillama.quant.floats import F32
from mpillama.quant.weight_type import LANES, WeightType, round_up

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
EXPERTS = "mlp.experts."


class Split(Enum):
    """By which units a tensor is divided over ranks."""

    HEADS = "heads"
    KV_HEADS = "kv_heads"
    FFN = "ffn_panels"
    VOCAB = "vocab_groups"
    REPLICATED = "replicated"


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: `entries` of its first axis belong to each unit; with experts, of the second."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    entries: int
    experts: int = 0

    def slice_shape(self, units: int) -> tuple[int, ...]:
        """The shape of this many units."""
        if self.experts:
            return (self.experts, units * self.entries, *self.shape[2:])
        return (units * self.entries, *self.shape[1:])


@dataclass(frozen=True)
class TensorSpec:
    """A tensor: weight matrix [rows, columns] in row lanes, or a float32 vector [rows] (`vector`, columns 1).

    `rows` and `columns` are padded, `source_shape` is that of the checkpoint. Column-parallel matrices are stored
    [groups, …], row-parallel ones (`panel` set) [panels, groups, …]; a unit is `unit` rows, or one panel. With
    `experts`, as many matrices follow each other under one name, and source_shape is that of each.
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
    vector: bool = False
    experts: int = 0

    def pad(self, source: np.ndarray) -> np.ndarray:
        """Return the checkpoint's tensor (source_shape) as float32 [rows, columns], zeros in the padding.

        Heads are padded one by one: rows and columns consist of `row_chunks` and `column_chunks` equal parts.
        """
        width = 1 if self.vector else self.source_shape[1]
        chunked = source.reshape(self.row_chunks, -1, self.column_chunks, width // self.column_chunks)
        padded = np.zeros(
            (self.row_chunks, self.rows // self.row_chunks, self.column_chunks, self.columns // self.column_chunks),
            np.float32,
        )
        padded[:, : chunked.shape[1], :, : chunked.shape[3]] = chunked
        return padded.reshape(self.rows) if self.vector else padded.reshape(self.rows, self.columns)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The checkpoint's names of the tensor: one, or one for each expert."""
        before, _, after = self.name.partition(EXPERTS)
        return tuple(f"{before}{EXPERTS}{e}.{after}" for e in range(self.experts)) if self.experts else (self.name,)

    @property
    def units(self) -> int:
        """Number of units that can be dealt to ranks."""
        if self.split is Split.REPLICATED:
            return 1
        return self.columns // self.panel if self.panel else self.rows // self.unit

    @property
    def checksums(self) -> int:
        """Number of units of all experts: each has a checksum of its own."""
        return self.units * max(1, self.experts)

    def arrays(self) -> tuple[ArraySpec, ...]:
        """The stored arrays: one for a vector, those of its weight type for a matrix."""
        if self.vector:
            return (ArraySpec(self.name, self.weight_type.lanes[0].dtype, (self.rows,), self.unit),)
        k, groups = self.panel or self.columns, self.rows // LANES
        lead: tuple[int, ...] = (self.experts,) if self.experts else ()
        lead += (self.columns // self.panel, groups) if self.panel else (groups,)
        unit = 1 if self.panel else self.unit // LANES
        units = k // self.weight_type.unit
        return tuple(
            ArraySpec(self.name + a.suffix, a.dtype, (*lead, units, a.entry), unit, self.experts)
            for a in self.weight_type.lanes
        )

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
    if config.lm_head and not config.tie_word_embeddings:
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


def _vector(name: str, true: int, padded: int) -> TensorSpec:
    """A vector that every rank holds in full."""
    return TensorSpec(name, Split.REPLICATED, padded, 1, F32, padded, (true,), vector=True)


def _norm(name: str, config: ModelConfig) -> TensorSpec:
    return _vector(name, config.hidden_size, config.padded_hidden_size)


def _router(name: str, config: ModelConfig) -> TensorSpec:
    """The matrix that chooses the experts: in full on every rank, in float32, since near ties decide."""
    rows, source = round_up(config.num_experts, LANES), (config.num_experts, config.hidden_size)
    return TensorSpec(name, Split.REPLICATED, rows, config.padded_hidden_size, F32, rows, source)


def _layer_specs(config: ModelConfig, prefix: str, types: WeightTypes) -> Iterator[TensorSpec]:
    yield _norm(prefix + "input_layernorm.weight", config)
    yield from _attention_specs(config, prefix + "self_attn.", types)
    yield _norm(prefix + "post_attention_layernorm.weight", config)
    if config.num_experts:
        yield _router(prefix + "mlp.gate.weight", config)
        yield from _mlp_specs(config, prefix + EXPERTS, types)
    else:
        yield from _mlp_specs(config, prefix + "mlp.", types)


def _attention_specs(config: ModelConfig, prefix: str, types: WeightTypes) -> Iterator[TensorSpec]:
    hidden, head = config.padded_hidden_size, config.padded_head_dim
    for letter in "qkv":
        split = Split.HEADS if letter == "q" else Split.KV_HEADS
        count = config.num_attention_heads if letter == "q" else config.num_key_value_heads
        name, rows, source = f"{prefix}{letter}_proj", count * head, count * config.head_dim
        full = name + ".weight"
        yield TensorSpec(
            full, split, rows, hidden, types.of(full), head, (source, config.hidden_size), row_chunks=count
        )
        if config.qkv_bias:
            yield TensorSpec(name + ".bias", split, rows, 1, F32, head, (source,), row_chunks=count, vector=True)
        if config.qk_norm and letter != "v":
            yield _vector(f"{prefix}{letter}_norm.weight", config.head_dim, head)
    full, count = prefix + "o_proj.weight", config.num_attention_heads
    yield TensorSpec(
        full, Split.HEADS, hidden, count * head, types.of(full), head, (config.hidden_size, count * config.head_dim),
        head, column_chunks=count,
    )  # fmt: skip
    if config.output_bias:
        yield _vector(prefix + "o_proj.bias", config.hidden_size, hidden)


def _mlp_specs(config: ModelConfig, prefix: str, types: WeightTypes) -> Iterator[TensorSpec]:
    hidden, inner = config.padded_hidden_size, config.padded_intermediate_size
    panel, experts = ffn_panel(config.intermediate_size), config.num_experts
    for part in ("gate", "up"):
        full, source = f"{prefix}{part}_proj.weight", (config.intermediate_size, config.hidden_size)
        yield TensorSpec(full, Split.FFN, inner, hidden, types.of(full), panel, source, experts=experts)
        if config.mlp_bias:
            yield TensorSpec(f"{prefix}{part}_proj.bias", Split.FFN, inner, 1, F32, panel, source[:1], vector=True)
    full, source = prefix + "down_proj.weight", (config.hidden_size, config.intermediate_size)
    yield TensorSpec(full, Split.FFN, hidden, inner, types.of(full), panel, source, panel, experts=experts)
    if config.mlp_bias:
        yield _vector(prefix + "down_proj.bias", config.hidden_size, hidden)
