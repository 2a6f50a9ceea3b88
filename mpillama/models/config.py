"""The shape and constants of a model, read from a Hugging Face configuration."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from mpillama.errors import UserError
from mpillama.models.attention import KV_TYPES
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families import FAMILIES
from mpillama.models.family import Block, OuterFactors
from mpillama.models.partition import Division, Partition, Split, divide_layers, partitions
from mpillama.models.rope import Rope, Rotation
from mpillama.models.tensors import (
    EH_PROJ,
    EMBEDDING,
    EMBEDDING_NORM,
    FINAL_NORM,
    HIDDEN_NORM,
    LM_HEAD,
    TensorSpec,
    WeightTypes,
    layer_prefix,
    whole_vector,
)  # fmt: skip
from mpillama.quant.registry import head_type
from mpillama.quant.types.bf16 import BF16
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import BLOCK, LANES, WeightType, round_up

MTP = "multi_token_prediction"
"""Our own key: the model is the layer that drafts tokens for the model of the configuration."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and constants, in Hugging Face's names, and its layers.

    `max_position_embeddings` is the context of a run that asks for no other, `longest_context` the longest.
    `lm_head` is false for models that make embeddings and have no head at all. `mtp`: it is the layer that drafts
    tokens for a model: the attention of the last layer that keeps no state and follows no other, the MLP of the last.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    longest_context: int
    rms_norm_eps: float
    rope: Rope
    factors: OuterFactors
    tie_word_embeddings: bool
    lm_head: bool
    blocks: tuple[Block, ...]
    mtp: bool = False

    @property
    def num_hidden_layers(self) -> int:
        return len(self.blocks)

    @property
    def padded_hidden_size(self) -> int:
        """hidden_size with zeros up to whole blocks of 32."""
        return round_up(self.hidden_size, BLOCK)

    @cached_property
    def kinds(self) -> tuple[Block, ...]:
        """The layers that differ, once each."""
        return tuple(dict.fromkeys(self.blocks))

    def rotation_of(self, block: Block) -> Rotation:
        """How a layer turns queries and keys."""
        return Rotation(block.rope or self.rope, block.attention.rotary_channels)

    @cached_property
    def rotations(self) -> tuple[Rotation, ...]:
        """The rotations that differ, the first layer's first."""
        return tuple(dict.fromkeys(map(self.rotation_of, self.kinds)))

    def inverse_frequencies(self) -> list[float]:
        """Of the first layer's RoPE, the angle of each pair of channels at position 1."""
        return self.rotations[0].inverse_frequencies()

    @property
    def has_state(self) -> bool:
        """Whether some layer keeps a state of each sequence, which cannot be cut back."""
        alone = self.partition(1)[0]
        return any(kind.attention.state_arrays(alone) for kind in self.kinds)

    @property
    def divides_positions(self) -> bool:
        """Whether each rank may hold some positions of the cache."""
        alone, kv_type = self.partition(1)[0], KV_TYPES["f32"]
        kinds = [kind.attention for kind in self.kinds]
        return not any(kind.piece_sizes is None and kind.cache_arrays(alone, 1, kv_type) for kind in kinds)

    @property
    def has_post_norms(self) -> bool:
        """Whether a norm follows on attention or MLP in some layer."""
        return any(kind.has_post_norms for kind in self.kinds)

    def for_context(self, context: int | None) -> "ModelConfig":
        """The model as it runs with so long sequences."""
        return self if context is None else replace(self, rope=self.rope.for_context(context))

    def first_layers(self, layers: int) -> "ModelConfig":
        """The same model with its first layers only."""
        return replace(self, blocks=self.blocks[:layers])

    def some_layers(self, layers: int) -> "ModelConfig":
        """The same model with so many layers: of every kind in proportion, and at least one while there is room."""
        counts = Counter(self.blocks)
        taken = Counter(dict.fromkeys(self.kinds[:layers], 1))
        while taken.total() < min(layers, len(self.blocks)):
            most = max(counts, key=lambda kind: (counts[kind] - taken[kind]) / counts[kind] if taken[kind] else 0.0)
            taken[most] += 1
        chosen = []
        for block in self.blocks:
            if taken[block] > 0:
                chosen.append(block)
                taken[block] -= 1
        return replace(self, blocks=tuple(chosen))

    # -- what ranks divide ------------------------------------------------------------------------------------------

    @cached_property
    def vocabulary_split(self) -> Split:
        """Groups of 16 rows of the embedding and the head."""
        return Split("vocab_groups", round_up(self.vocab_size, LANES) // LANES)

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        """Everything by which ranks divide the model."""
        found = [split for kind in self.kinds for split in (*kind.attention.splits, *kind.mlp.splits)]
        return tuple(dict.fromkeys((*found, self.vocabulary_split)))

    def partition(self, division: Division | int) -> list[Partition]:
        """Each rank's part of the model; a number divides it evenly over so many ranks."""
        if isinstance(division, int):
            division = Division(division)
        if division.stages == 1:
            parts = partitions(self.splits, division.ranks, division.shares)
            return [replace(part, holders=division.holders) for part in parts]
        layers, size, found = self.layers_of_stages(division.stages), division.group, list[Partition]()
        for first in range(0, division.ranks, size):
            stage = division.stage_of(first)
            outer = frozenset(self._outer_tensors(stage == 0, stage == division.stages - 1))
            shares = division.shares[first : first + size] if division.shares else None
            found += [
                replace(
                    part,
                    layers=layers[stage],
                    outer=outer,
                    is_first=stage == 0,
                    is_last=stage == division.stages - 1,
                    holders=division.holders,
                )
                for part in partitions(self.splits, size, shares)
            ]
        return found

    def layers_of_stages(self, stages: int) -> tuple[range, ...]:
        """Each stage's layers: about the same number of weights, with those of the embedding and the head."""
        sizes = {kind: self._weights_of(kind) for kind in self.kinds}
        head, firsts = self.vocab_size * self.hidden_size, [*self._first_layers, self.num_hidden_layers]
        costs = tuple(sum(sizes[block] for block in self.blocks[a:b]) for a, b in pairwise(firsts))
        found = divide_layers(costs, head, head * self.lm_head, stages)
        return tuple(range(firsts[own.start], firsts[own.stop]) for own in found)

    @property
    def _first_layers(self) -> list[int]:
        """Where a stage may begin: layers that do not follow the one before."""
        return [layer for layer, block in enumerate(self.blocks) if layer == 0 or not block.attention.follows]

    @property
    def most_stages(self) -> int:
        return len(self._first_layers)

    def _weights_of(self, block: Block) -> int:
        types = WeightTypes(F32)
        specs = (*block.attention.specs("", self.hidden_size, types), *block.mlp.specs("", self.hidden_size, types))
        return sum(spec.rows * spec.columns * max(1, spec.experts) for spec in specs)

    def _outer_tensors(self, is_first: bool, is_last: bool) -> Iterator[str]:
        """What a stage holds besides its layers."""
        if is_first or (is_last and self.tie_word_embeddings):
            yield EMBEDDING
        if is_last:
            yield from (FINAL_NORM, LM_HEAD)

    @property
    def most_busy_ranks(self) -> int:
        """The most ranks that all have something to do in every part of the model."""
        return min(split.count * split.group for split in self.splits)

    def tensors(self, types: WeightTypes) -> list[TensorSpec]:
        """Every tensor of the model in the order of the file."""
        specs = [self._vocabulary(EMBEDDING, types), *self._joint_input()]
        for number, block in enumerate(self.blocks):
            prefix = layer_prefix(number)
            specs.extend(self._norms(prefix, block.attention_norm))
            specs.extend(block.attention.specs(prefix, self.hidden_size, types))
            specs.extend(self._norms(prefix, block.attention_post_norm, block.mlp_norm))
            specs.extend(block.mlp.specs(prefix, self.hidden_size, types))
            specs.extend(self._norms(prefix, block.mlp_post_norm))
        specs.extend(self._norms("", FINAL_NORM))
        if self.lm_head and not self.tie_word_embeddings:
            specs.append(self._vocabulary(LM_HEAD, types))
        return specs

    def quantised_to(self, kind: WeightType) -> WeightTypes:
        """The types of all matrices where one is asked for: the output head may get one with more bits."""
        head, better = EMBEDDING if self.tie_word_embeddings else LM_HEAD, head_type(kind)
        return WeightTypes(kind, {head: better} if self.lm_head and better != kind else None)

    def _vocabulary(self, name: str, types: WeightTypes) -> TensorSpec:
        rows, source = round_up(self.vocab_size, LANES), (self.vocab_size, self.hidden_size)
        return TensorSpec(name, self.vocabulary_split, rows, self.padded_hidden_size, types.of(name), LANES, source)

    def _joint_input(self) -> Iterator[TensorSpec]:
        """What a layer that drafts tokens makes its input with, on every rank: in bfloat16, since it is not quantised
        what goes in.
        """
        if self.mtp:
            yield from self._norms("", EMBEDDING_NORM, HIDDEN_NORM)
            rows, source = self.padded_hidden_size, (self.hidden_size, 2 * self.hidden_size)
            yield TensorSpec(EH_PROJ, None, rows, 2 * rows, BF16, rows, source, column_chunks=2)

    def _norms(self, prefix: str, *names: str) -> Iterator[TensorSpec]:
        for name in filter(None, names):
            yield whole_vector(prefix + name, self.hidden_size, self.padded_hidden_size)

    # -- reading ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: Json) -> "ModelConfig":
        """Read a config.json; UserError names what is missing, unknown or impossible."""
        family = FAMILIES[ConfigValues(source).expect("model_type", FAMILIES)]
        values = family.values(source)
        context = values.size("max_position_embeddings")
        rope = family.rope(values, context)
        config = cls(
            model_type=family.model_type,
            vocab_size=values.size("vocab_size"),
            hidden_size=values.size("hidden_size"),
            max_position_embeddings=rope.usual_context(context),
            longest_context=context,
            rms_norm_eps=values.number("rms_norm_eps"),
            rope=rope,
            factors=family.factors(values),
            tie_word_embeddings=values.flag("tie_word_embeddings"),
            lm_head=values.flag("lm_head", True),
            blocks=family.blocks(values),
        )
        if values.flag(MTP, False):
            alone = config.partition(1)[0]
            kinds = [b for b in config.blocks if not b.attention.state_arrays(alone) and not b.attention.follows]
            block = replace(kinds[-1], mlp=config.blocks[-1].mlp)
            config = replace(config, blocks=(block,), mtp=True)
        config._check_frequencies()
        return config

    def _check_frequencies(self) -> None:
        longest = self.for_context(self.longest_context)
        for rotation in dict.fromkeys((*self.rotations, *longest.rotations)):
            try:
                frequencies = rotation.inverse_frequencies()
            except (ValueError, ArithmeticError):
                frequencies = []
            if len(frequencies) != rotation.channels // 2 or not all(map(math.isfinite, frequencies)):
                raise UserError("The model's configuration has RoPE constants that give no frequencies: it is damaged.")
