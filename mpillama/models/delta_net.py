"""Gated delta nets (https://arxiv.org/abs/2412.06464): attention with a state of fixed size in place of the past."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.library import Team
from mpillama.models.attention import MOST_CHANNELS, CacheArray, KVType, Stripe
from mpillama.models.config_values import ConfigValues
from mpillama.models.linear import LayerWeights
from mpillama.models.partition import Partition, Split
from mpillama.models.tensors import PartOfHeads, TensorSpec, WeightTypes, whole_matrix, whole_vector
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import BLOCK, LANES, round_up

TAPS = 4
"""Tokens that the convolution sees, its own the last."""
PREFIX = "linear_attn."
GROUPED, GROUPED_GATES = "in_proj_qkvz", "in_proj_ba"


@dataclass(frozen=True)
class GatedDeltaNet:
    """Value heads in groups that share a head of queries and keys, each with a state [key_dim, value_dim].

    A checkpoint may have the projections together, by key heads: q, k, v and z as in_proj_qkvz, b and a as in_proj_ba.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    products: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "q/k/v": tuple(f"{PREFIX}in_proj_{part}.weight" for part in ("q", "k", "v", "z", "a", "b")),
        "o_proj": (f"{PREFIX}out_proj.weight",),
    }
    rotary_channels: ClassVar[int] = 0
    follows: ClassVar[bool] = False

    @classmethod
    def read(cls, values: ConfigValues) -> "GatedDeltaNet":
        """From Hugging Face's names."""
        if values.size("linear_conv_kernel_dim", TAPS) != TAPS:
            raise values.refuse("linear_conv_kernel_dim", f"mpillama runs convolutions of {TAPS} tokens only")
        found = cls(
            key_heads=values.size("linear_num_key_heads"),
            value_heads=values.size("linear_num_value_heads"),
            key_dim=values.size("linear_key_head_dim", limit=MOST_CHANNELS),
            value_dim=values.size("linear_value_head_dim", limit=MOST_CHANNELS),
        )
        if found.value_heads % found.key_heads:
            raise values.refuse("linear_num_value_heads", f"it must be a multiple of {found.key_heads} key heads")
        return found

    @property
    def group(self) -> int:
        """Value heads of a key head."""
        return self.value_heads // self.key_heads

    @property
    def value_split(self) -> Split:
        return Split("value_heads", self.value_heads)

    @property
    def key_split(self) -> Split:
        return Split("key_heads", self.key_heads, self.group)

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.value_split, self.key_split

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        prefix += PREFIX
        of_values = self.group * self.value_dim
        places = {"q": 0, "k": self.key_dim, "v": 2 * self.key_dim, "z": 2 * self.key_dim + of_values}
        whole = 2 * self.key_dim + 2 * of_values
        for part, first in places.items():
            split, dim = self._of(part)
            name, rows = f"{prefix}in_proj_{part}.weight", split.count * round_up(dim, BLOCK)
            of_key_head = split.count // self.key_heads * dim
            yield TensorSpec(
                name, split, rows, round_up(hidden_size, BLOCK), types.of(name), round_up(dim, BLOCK),
                (split.count * dim, hidden_size), row_chunks=split.count,
                part_of=PartOfHeads(f"{prefix}{GROUPED}.weight", self.key_heads, whole, first, of_key_head),
            )  # fmt: skip
        for part, first in (("b", 0), ("a", self.group)):
            name = f"{prefix}in_proj_{part}.weight"
            both = PartOfHeads(f"{prefix}{GROUPED_GATES}.weight", self.key_heads, 2 * self.group, first, self.group)
            # Rows of single heads are no groups of 16: every rank has them all.
            yield whole_matrix(name, self.value_heads, hidden_size, types.of(name), both)
        for part in "qkv":
            split, dim = self._of(part)
            unit = TAPS * round_up(dim, BLOCK)
            yield TensorSpec(
                f"{prefix}conv1d_{part}.weight", split, split.count * unit, 1, F32, unit, (split.count * dim * TAPS,),
                row_chunks=split.count, vector=True,
            )  # fmt: skip
        for name in ("A", "dt_bias"):
            count = self.value_heads
            yield TensorSpec(prefix + name, self.value_split, count, 1, F32, 1, (count,), vector=True)
        yield whole_vector(f"{prefix}norm.weight", self.value_dim, round_up(self.value_dim, BLOCK))
        name, dim = f"{prefix}out_proj.weight", round_up(self.value_dim, BLOCK)
        yield TensorSpec(
            name, self.value_split, round_up(hidden_size, BLOCK), self.value_heads * dim, types.of(name), dim,
            (hidden_size, self.value_heads * self.value_dim), dim, column_chunks=self.value_heads,
        )  # fmt: skip

    def _of(self, part: str) -> tuple[Split, int]:
        """The heads of a projection, and their channels."""
        return (self.key_split, self.key_dim) if part in "qk" else (self.value_split, self.value_dim)

    def cache_arrays(self, part: Partition, blocks: int, kv_type: KVType) -> Sequence[CacheArray]:
        return ()

    def positions_read(self, positions: int) -> Sequence[int]:
        return ()

    def state_arrays(self, part: Partition) -> Sequence[CacheArray]:
        """The last tokens before the convolution, and the states of heads, as kernels/src/delta_layer.h says."""
        keys, values = self._widths(part)
        heads, key_dim, value_dim = len(part[self.value_split]), *self._padded_dims()
        floats = np.dtype(np.float32)
        return ((TAPS - 1, 2 * keys + values), floats), ((heads, value_dim // LANES, key_dim, LANES), floats)

    @property
    def cache_stripes(self) -> Sequence[Sequence[Stripe]]:
        return ()

    @property
    def state_stripes(self) -> Sequence[Sequence[Stripe]]:
        """Of the convolution the channels of queries, keys and values; of the states the heads."""
        key_dim, value_dim = self._padded_dims()
        keys, values = Stripe(self.key_split, 1, key_dim), Stripe(self.value_split, 1, value_dim)
        return (keys, keys, values), (Stripe(self.value_split),)

    def _padded_dims(self) -> tuple[int, int]:
        return round_up(self.key_dim, BLOCK), round_up(self.value_dim, BLOCK)

    def _widths(self, part: Partition) -> tuple[int, int]:
        """A rank's channels of keys and of values."""
        key_dim, value_dim = self._padded_dims()
        return len(part[self.key_split]) * key_dim, len(part[self.value_split]) * value_dim

    def cache_argument(self, arrays: Sequence[np.ndarray], kv_type: KVType) -> arguments.States:
        return arguments.States(*map(arguments.address, arrays))

    def step_widths(self, part: Partition) -> Mapping[str, int]:
        """Of latent z, of gates a and b."""
        keys, values = self._widths(part)
        gates = 2 * round_up(self.value_heads, LANES)
        return {"q": keys, "k": keys, "v": values, "context": values, "latent": values, "gates": gates}

    def scratch(self, part: Partition, tokens: int, positions: int, threads: int) -> tuple[int, int]:
        return 0, 0

    def layer(
        self, weights: LayerWeights, part: Partition, hidden_size: int, norm: str, eps: float
    ) -> arguments.DeltaLayer:
        q, k, v, z, a, b = (weights.matrix(f"{PREFIX}in_proj_{name}.weight").column_parallel() for name in "qkvzab")
        taps, rates = [self._taps(weights, name) for name in "qkv"], weights.vector(f"{PREFIX}A")
        assert rates is not None
        decays = -rates
        starts, (key_dim, value_dim) = self.head_starts(part), self._padded_dims()
        layer = arguments.DeltaLayer(
            q=q, k=k, v=v, z=z, a=a, b=b, o=weights.matrix(f"{PREFIX}out_proj.weight").row_parallel(),
            norm=weights.address(norm), decays=arguments.address(decays),
            biases=weights.address(f"{PREFIX}dt_bias"), head_norm=weights.address(f"{PREFIX}norm.weight"), eps=eps,
            hidden_size=hidden_size, key_heads=len(part[self.key_split]), value_heads=len(part[self.value_split]),
            first_head=part[self.value_split].start, key_dim=key_dim, value_dim=value_dim, key_channels=self.key_dim,
            value_channels=self.value_dim,
        )  # fmt: skip
        layer.kept = starts, decays, *taps
        layer.q_taps, layer.k_taps, layer.v_taps = map(arguments.address, taps)
        layer.head_start = arguments.address(starts)
        return layer

    def _taps(self, weights: LayerWeights, part: str) -> np.ndarray:
        """[TAPS, channels]; a file has the taps of each channel together."""
        stored = weights.vector(f"{PREFIX}conv1d_{part}.weight")
        assert stored is not None
        return np.ascontiguousarray(stored.reshape(-1, TAPS).T)

    def head_starts(self, part: Partition) -> np.ndarray:
        """int64 [local key heads + 1]: the local value heads of local key head i are result[i] : result[i + 1]."""
        values, keys = part[self.value_split], part[self.key_split]
        borders = [head * self.group for head in (*keys, keys.stop)]
        return np.clip(np.array(borders, np.int64) - values.start, 0, len(values))

    def begin(self, team: Team, layer: arguments.DeltaLayer, step: arguments.Step) -> bool:
        return False

    def run(
        self,
        team: Team,
        layer: arguments.DeltaLayer,
        cache: arguments.States,
        step: arguments.Step,
        total: arguments.Sum | None,
    ) -> bool:
        layer.states = cache
        return team.delta_half(layer, step, total)

    def output_bias_of(self, weights: LayerWeights) -> np.ndarray | None:
        return None

    piece_sizes: ClassVar[None] = None

    def in_pieces(self, layer: arguments.DeltaLayer, parts: Sequence[Partition], rank: int) -> None:
        return None
