"""The shape and constants of a model, read from a Hugging Face configuration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mpillama.errors import UserError
from mpillama.models.config_values import ConfigValues, Json
from mpillama.models.families import FAMILIES
from mpillama.models.family import Block
from mpillama.models.partition import Partition, Split, partitions
from mpillama.models.rope import Rope, read_rope
from mpillama.models.tensors import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    TensorSpec,
    WeightTypes,
    layer_prefix,
    whole_vector,
)  # fmt: skip
from mpillama.quant.registry import head_type
from mpillama.quant.weight_type import BLOCK, LANES, WeightType, round_up


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and constants, in Hugging Face's names, and its layers.

    `lm_head` is false for models that make embeddings and have no head at all.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    lm_head: bool
    blocks: tuple[Block, ...]

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

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that RoPE turns, in every layer alike."""
        return self.blocks[0].attention.rotary_channels

    def inverse_frequencies(self) -> list[float]:
        """The angle of each pair of channels at position 1."""
        return self.rope.inverse_frequencies(self.rotary_channels)

    def first_layers(self, layers: int) -> "ModelConfig":
        """The same model with its first layers only."""
        return replace(self, blocks=self.blocks[:layers])

    # -- what ranks divide ------------------------------------------------------------------------------------------

    @property
    def vocabulary_split(self) -> Split:
        """Groups of 16 rows of the embedding and the head."""
        return Split("vocab_groups", round_up(self.vocab_size, LANES) // LANES)

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        """Everything by which ranks divide the model."""
        found = [split for kind in self.kinds for split in (*kind.attention.splits, kind.mlp.split)]
        return tuple(dict.fromkeys((*found, self.vocabulary_split)))

    def partition(self, size: int, weights: Sequence[float] | None = None) -> list[Partition]:
        """Each rank's part of the model; `weights` as in split_units."""
        return partitions(self.splits, size, weights)

    @property
    def most_busy_ranks(self) -> int:
        """The most ranks that all have something to do in every part of the model."""
        return min(split.count * split.group for split in self.splits)

    def tensors(self, types: WeightTypes) -> list[TensorSpec]:
        """Every tensor of the model in the order of the file."""
        specs = [self._vocabulary(EMBEDDING, types)]
        for number, block in enumerate(self.blocks):
            prefix = layer_prefix(number)
            specs.append(self._norm(prefix + block.attention_norm))
            specs.extend(block.attention.specs(prefix, self.hidden_size, types))
            specs.append(self._norm(prefix + block.mlp_norm))
            specs.extend(block.mlp.specs(prefix, self.hidden_size, types))
        specs.append(self._norm(FINAL_NORM))
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

    def _norm(self, name: str) -> TensorSpec:
        return whole_vector(name, self.hidden_size, self.padded_hidden_size)

    # -- reading ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: Json) -> "ModelConfig":
        """Read a config.json; UserError names what is missing, unknown or impossible."""
        family = FAMILIES[ConfigValues(source).expect("model_type", FAMILIES)]
        values = family.values(source)
        context = values.size("max_position_embeddings")
        config = cls(
            model_type=family.model_type,
            vocab_size=values.size("vocab_size"),
            hidden_size=values.size("hidden_size"),
            max_position_embeddings=context,
            rms_norm_eps=values.number("rms_norm_eps"),
            rope=read_rope(values, context),
            tie_word_embeddings=values.flag("tie_word_embeddings"),
            lm_head=values.flag("lm_head", True),
            blocks=family.blocks(values),
        )
        config._check_frequencies()
        return config

    def _check_frequencies(self) -> None:
        try:
            frequencies = self.inverse_frequencies()
        except (ValueError, ArithmeticError):
            frequencies = []
        if len(frequencies) != self.rotary_channels // 2 or not all(map(math.isfinite, frequencies)):
            raise UserError("The model's configuration has RoPE constants that give no frequencies: it is damaged.")
