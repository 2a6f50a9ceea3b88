"""A foreign checkpoint as a model that runs: its configuration, the weight type of each tensor, and what is missing."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint, StoredRows, StoredTensor
from mpillama.formats.checkpoint_reader import CheckpointReader, Rows
from mpillama.formats.foreign import PathSource
from mpillama.formats.part_of_heads import part_of_heads
from mpillama.formats.scaled_tensor import ScaledTensor
from mpillama.models.config import ModelConfig
from mpillama.models.family import DRAFT_LAYERS
from mpillama.models.sparse_latent_attention import WHOLE_INDEXER
from mpillama.models.tensors import EMBEDDING, LM_HEAD, TensorSpec, WeightTypes, layer_prefix
from mpillama.quant.registry import WEIGHT_TYPES
from mpillama.quant.types.q8_0 import Q8_0
from mpillama.quant.weight_type import Float32, WeightType

AS_STORED = "as-stored"
CHOSEN = Q8_0
"""Stands for the type to be chosen; matrices that have another one, such as routers, have it always."""


@dataclass(frozen=True)
class CheckpointModel:
    """What rank 0 reads of a foreign checkpoint and gives to the others; see NativeModel for the native file's.

    `importance` says by tensor how much each column counts when it is quantised.
    """

    checkpoint: Checkpoint
    weight_types: WeightTypes
    importance: Mapping[str, Float32] | None = field(default=None, repr=False)

    @property
    def path(self) -> str:
        """Where it lies."""
        return self.checkpoint.path

    @property
    def files(self) -> Mapping[str, int]:
        """Its files and their sizes, as rank 0 sees them."""
        return dict(zip(self.checkpoint.files, self.checkpoint.file_sizes, strict=True))

    @property
    def config_json(self) -> Mapping[str, Any]:
        """The configuration in Hugging Face's spelling."""
        return self.checkpoint.config_json

    @property
    def texts(self) -> Mapping[str, bytes]:
        """Tokenizer, chat template and so on, by file name."""
        return self.checkpoint.texts

    @cached_property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return ModelConfig.from_hf(self.config_json)

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """The model's tensors, in the order of a native file."""
        return self.config.tensors(self.weight_types)

    @cached_property
    def metadata_sha256(self) -> str:
        """SHA-256 over everything that is not weights: it tells checkpoints apart, but not their values."""
        c = self.checkpoint
        table = [[t.name, list(t.shape), t.stored, t.file, t.offset, *_others(t)] for t in c.tensors.values()]
        head = [c.config_json, table, list(c.file_sizes), {k: len(v) for k, v in sorted(c.texts.items())}]
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for _, text in sorted(c.texts.items()):
            digest.update(text)
        return digest.hexdigest()

    def stored_bytes(self, spec: TensorSpec, units: range) -> int:
        """The bytes of the files that these units of a tensor take, blocks that are shared left aside."""
        tensors = [self.checkpoint.tensors[name] for name in spec.source_names]
        return sum(t.bytes for t in tensors) * len(units) // spec.units

    def reader(self, on_bytes: Callable[[int], None], workers: int = 1, verify: bool = False) -> CheckpointReader:
        """Open the files for reading slices; UserError if they are to be verified."""
        if verify:
            raise UserError(f"{self.path}: this format has no checksums: leave --verify out, or convert the model.")
        return CheckpointReader(self.checkpoint, on_bytes, workers, importance=self.importance)

    def requantised(self) -> Mapping[str, tuple[WeightType, int]]:
        """Stored types that are turned into others since no kernel knows them: into which, and how many weights."""
        found: dict[str, tuple[WeightType, int]] = {}
        for tensor in self.checkpoint.tensors.values():
            if tensor.loses:
                kept, count = found.get(tensor.stored, (tensor.held_as(), 0))
                found[tensor.stored] = kept, count + prod(tensor.shape)
        return found


def checkpoint_model(checkpoint: Checkpoint, weights: str) -> CheckpointModel:
    """Check a checkpoint against its configuration and choose the weight types; `weights` is a name or as-stored."""
    config = ModelConfig.from_hf(checkpoint.config_json)
    checkpoint = _without_idle_indexers(_without_drafts(checkpoint, config), config)
    specs = config.tensors(WeightTypes(CHOSEN))
    checkpoint = _without_zero_biases(_with_parts(checkpoint, specs), specs)
    _check_tensors(checkpoint, config, specs)
    if weights != AS_STORED:
        return CheckpointModel(checkpoint, config.quantised_to(WEIGHT_TYPES[weights]))
    matrices = [s for s in specs if s.weight_type is CHOSEN]
    types = {s.name: _held_as(s, checkpoint) for s in matrices}
    _tell_experts_that_differ(checkpoint, matrices, types)
    default = Counter(types.values()).most_common(1)[0][0]
    others = {name: kind for name, kind in types.items() if kind != default}
    return CheckpointModel(checkpoint, WeightTypes(default, others or None))


def _held_as(spec: TensorSpec, checkpoint: Checkpoint) -> WeightType:
    """The type of a matrix in memory: that of its experts with the most bits, if they differ."""
    types = {checkpoint.tensors[name].held_as(spec.column_chunk) for name in spec.source_names}
    return max(types, key=lambda t: (t.group_bytes(spec.panel or spec.columns), t.name))


def _tell_experts_that_differ(
    checkpoint: Checkpoint, matrices: Sequence[TensorSpec], types: Mapping[str, WeightType]
) -> None:
    """Say which experts' weights are in another type than their own, since others of their layer have more bits."""
    counts: Counter[tuple[str, str]] = Counter()
    for spec in matrices:
        kept = types[spec.name]
        for tensor in (checkpoint.tensors[name] for name in spec.source_names):
            own = tensor.held_as(spec.column_chunk)
            if own != kept:
                counts[own.name, kept.name] += prod(tensor.shape)
    for (stored, held), count in counts.items():
        logging.getLogger(__name__).warning(
            "%s: %s weights of experts are %s and become %s, which others of their layers are.",
            checkpoint.path, f"{count:,}", stored, held, extra={"of_run": True},
        )  # fmt: skip


def _others(tensor: StoredTensor) -> list[Any]:
    """What else tells a tensor that is spread over several arrays."""
    if isinstance(tensor, ScaledTensor):
        return [[[p.name, p.dtype, list(p.shape), p.file, p.offset] for p in tensor.parts]]
    return []


DRAFTS = re.compile(r"(?:(?:model\.layers|blk)\.(?P<layer>[0-9]{1,6})|(?:model\.)?mtp)\..*", re.DOTALL)
"""Tensors of layers that only draft tokens, by the names of formats; they have a number or a prefix of their own."""


def _without_drafts(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    """The checkpoint without layers that only draft tokens, as transformers loads it, which is told."""
    drafting, first = checkpoint.config_json.get(DRAFT_LAYERS), config.num_hidden_layers
    layers = range(first, first + drafting if isinstance(drafting, int) else first)
    left_out = [
        name
        for name in checkpoint.tensors
        if (found := DRAFTS.fullmatch(name)) and (found["layer"] is None or int(found["layer"]) in layers)
    ]
    return _without(checkpoint, left_out, "layers that only draft tokens", ", unless --mtp takes them")


def _without_idle_indexers(checkpoint: Checkpoint, config: ModelConfig) -> Checkpoint:
    """The checkpoint without indexers of layers that see what another one has chosen, which is told.

    Published files of GLM repeat the other layer's there; transformers and llama.cpp pass over them.
    """
    idle = [layer_prefix(i) + WHOLE_INDEXER for i, block in enumerate(config.blocks) if block.attention.follows]
    left_out = [name for name in checkpoint.tensors if name.startswith(tuple(idle))]
    return _without(checkpoint, left_out, "indexers of layers that see what another one has chosen")


def _without(checkpoint: Checkpoint, left_out: Sequence[str], of: str, unless: str = "") -> Checkpoint:
    if not left_out:
        return checkpoint
    logging.getLogger(__name__).info(
        "%s: %d tensors of %s (%s and so on) are left out%s.", checkpoint.path, len(left_out), of, left_out[0], unless
    )
    dropped = set(left_out)
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in dropped}
    return replace(checkpoint, tensors=kept)


def _with_parts(checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> Checkpoint:
    """With the tensors that are parts of another one in its place; of a file that has both, the parts count."""
    table = dict(checkpoint.tensors)
    for spec in specs:
        if spec.name not in table and (part := part_of_heads(spec, checkpoint.tensors)):
            table[spec.name] = part
    for spec in specs:
        if spec.part_of and spec.name in table:
            table.pop(spec.part_of.name, None)
    return replace(checkpoint, tensors=table)


BIAS = ".bias"


def _without_zero_biases(checkpoint: Checkpoint, specs: Sequence[TensorSpec]) -> Checkpoint:
    """Without biases that are zero and that the model has not: AutoGPTQ writes one for every matrix."""
    wanted, source = {name for spec in specs for name in spec.source_names}, PathSource(checkpoint.files)

    def is_zero(name: str, tensor: StoredTensor) -> bool:
        if name in wanted or not name.endswith(BIAS) or name.removesuffix(BIAS) + ".weight" not in wanted:
            return False
        if len(tensor.shape) != 1:
            return False
        read = tensor.read(source, range(1), range(tensor.shape[0]))
        return not read.decode().any()

    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_zero(name, tensor)}
    return replace(checkpoint, tensors=kept)


def _check_tensors(checkpoint: Checkpoint, config: ModelConfig, specs: list[TensorSpec]) -> None:
    """Refuse missing, extra and wrong-shaped tensors by name."""
    wanted = {name: spec.source_shape for spec in specs for name in spec.source_names}
    ignored = {LM_HEAD} if config.tie_word_embeddings else set()
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        raise UserError(
            f"{checkpoint.path}: the tensor {missing[0]!r} is missing{_more(missing)}: the checkpoint is incomplete or "
            "its configuration belongs to another model."
        )
    extra = [name for name in checkpoint.tensors if name not in wanted and name not in ignored]
    if extra:
        raise UserError(
            f"{checkpoint.path}: the tensor {extra[0]!r} is not part of a {config.model_type} model{_more(extra)}: "
            "mpillama would leave it out, so it does not run this checkpoint."
        )
    for name, shape in wanted.items():
        found = checkpoint.tensors[name].shape
        if found != shape:
            raise UserError(
                f"{checkpoint.path}: tensor {name} has shape {list(found)}, the configuration asks for {list(shape)}."
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# -- Which output head a Hugging Face checkpoint has: one of its own, its embedding, or none --------------------------


TIED = "tie_word_embeddings"
HEADLESS: Mapping[str, Any] = {"lm_head": False}
"""What a configuration says of a model without a head; the key is our own."""
PREFIX = "model."
RUN_BYTES = 16 << 20
"""About as much of each tensor is compared at a time."""

Table = Mapping[str, StoredTensor]


def with_prefix(table: Table) -> Table:
    """The tensors of a model that was stored without its head, and so without the prefix, under their usual names."""
    if any(name.startswith(PREFIX) for name in table) or EMBEDDING.removeprefix(PREFIX) not in table:
        return table
    return {name if name == LM_HEAD else PREFIX + name: tensor for name, tensor in table.items()}


def settle_head(
    path: str, config: Mapping[str, Any], table: Table, files: Sequence[str], embeds: bool
) -> tuple[Mapping[str, Any], Table]:
    """Configuration and tensors, such that the configuration says of the head what is true of the tensors.

    As in transformers, a head that differs from the embedding is used although the configuration ties both, and of two
    tied tensors either may be left out. `embeds`: the model was stored as one that makes embeddings.
    """
    if LM_HEAD not in table:
        return ({**config, **HEADLESS} if embeds else config), table
    if not config.get(TIED):
        return config, table
    if EMBEDDING not in table:
        return config, {EMBEDDING: table[LM_HEAD], **{n: t for n, t in table.items() if n != LM_HEAD}}
    if _equal(table[EMBEDDING], table[LM_HEAD], files):
        return config, table
    logging.getLogger(__name__).warning(
        "%s: its configuration ties the output head to the embedding (%s), but %s differs from the embedding: it is "
        "used, as transformers does; with false there the configuration would be right.",
        path, TIED, LM_HEAD, extra={"of_run": True},
    )  # fmt: skip
    return {**config, TIED: False}, table


def _equal(first: StoredTensor, second: StoredTensor, files: Sequence[str]) -> bool:
    """Whether two tensors hold the same values, read up to where they differ."""
    if first.shape != second.shape or len(first.shape) != 2:
        return False
    runs = zip(_runs(first, files), _runs(second, files), strict=True)
    return all(_same(a, b) for a, b in runs)


def _same(first: Rows, second: Rows) -> bool:
    if isinstance(first, StoredRows) and isinstance(second, StoredRows) and first.type == second.type:
        return np.array_equal(first.raw, second.raw)
    return np.array_equal(first.decode(), second.decode())


def _runs(tensor: StoredTensor, files: Sequence[str]) -> Iterator[Rows]:
    """The rows of a matrix, some at a time: as many for any type of the same width."""
    rows, columns = tensor.shape
    step, source = max(1, RUN_BYTES // (4 * columns)), PathSource(files)
    for start in range(0, rows, step):
        yield tensor.read(source, range(start, min(start + step, rows)), range(columns))


def refuse_headless(path: str, has_head: bool) -> None:
    """UserError for a model that cannot tell which token comes next."""
    if not has_head:
        raise UserError(
            f"{path}: a model without an output head ({LM_HEAD}), made for embeddings: it cannot continue a text; "
            "`serve` answers POST /v1/embeddings with it."
        )
