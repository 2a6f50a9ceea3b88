"""Which units of the model belong to which rank.

Units are query heads, panels of the FFN, and groups of 16 vocabulary rows; a rank has a contiguous range of each.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mpillama.model.config import ModelConfig
from mpillama.quant.weight_type import LANES, round_up


def split_units(units: int, size: int, weights: Sequence[float] | None = None) -> list[range]:
    """Divide range(units) over `size` ranks in contiguous ranges.

    Without weights the sizes differ by at most one and the first ranks have the remainder. With weights (one for each
    rank, not negative, not all 0) the borders lie at the rounded running sums of the shares.
    """
    if weights is None:
        base, rest = divmod(units, size)
        borders = [rank * base + min(rank, rest) for rank in range(size + 1)]
    else:
        total, running, borders = sum(weights), 0.0, [0]
        for weight in weights:
            running += weight
            borders.append(min(units, int(units * running / total + 0.5)))
        borders[-1] = units
    return [range(a, b) for a, b in itertools.pairwise(borders)]


def ffn_panel(intermediate_size: int) -> int:
    """Columns of a panel of down_proj: the largest of 128, 64, 32 that divides the padded size."""
    padded = round_up(intermediate_size, 32)
    return next(p for p in (128, 64, 32) if padded % p == 0)


@dataclass(frozen=True)
class Partition:
    """One rank's ranges of units; `kv_heads` are those that its query heads need, so neighbours may share one."""

    heads: range
    kv_heads: range
    ffn_panels: range
    vocab_groups: range

    @property
    def vocab_rows(self) -> range:
        """Rows of the (padded) vocabulary."""
        return range(self.vocab_groups.start * LANES, self.vocab_groups.stop * LANES)

    def is_idle(self) -> bool:
        """Whether some part of the model has nothing for this rank to do."""
        return not (self.heads and self.ffn_panels and self.vocab_groups)


def partition(config: ModelConfig, size: int, weights: Sequence[float] | None = None) -> list[Partition]:
    """Split a model over `size` ranks; returns each rank's part."""
    heads = split_units(config.num_attention_heads, size, weights)
    panels = split_units(config.padded_intermediate_size // ffn_panel(config.intermediate_size), size, weights)
    vocab = split_units(round_up(config.vocab_size, LANES) // LANES, size, weights)
    kv_heads = [_kv_heads(h, config.num_attention_heads // config.num_key_value_heads) for h in heads]
    return [Partition(*ranges) for ranges in zip(heads, kv_heads, panels, vocab, strict=True)]


def most_busy_ranks(config: ModelConfig) -> int:
    """The most ranks that all have something to do in every part of the model."""
    panels = config.padded_intermediate_size // ffn_panel(config.intermediate_size)
    return min(config.num_attention_heads, panels, round_up(config.vocab_size, LANES) // LANES)


def _kv_heads(heads: range, group: int) -> range:
    """The KV heads that a range of query heads attends with."""
    if not heads:
        return range(0)
    return range(heads.start // group, heads[-1] // group + 1)
