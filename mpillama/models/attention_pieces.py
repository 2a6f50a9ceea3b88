"""How kinds of attention work where each rank holds some positions; models/context_parallel.py has the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.library import Team

Array = np.ndarray

PIECE_BLOCKS = 16
"""Cache blocks of a sequence that lie on one rank, of kernels/src/context_parallel.h: one span or more of any kind."""
ROUND_BYTES = 16 << 20
"""About what a rank sends at once; a prompt's chunk over a long context goes in several rounds."""


@dataclass(frozen=True)
class PieceSizes:
    """What ranks tell each other of a token: queries of `heads` heads of `channels`, and `new` channels for the cache.

    For each head and span of `span` positions that it sees, `record` float32 numbers come back. A token sees the last
    `window` positions, or those of its `chunk`; 0 sees all.
    """

    heads: int
    channels: int
    new: int
    span: int
    record: int
    window: int = 0
    chunk: int = 0

    @property
    def width(self) -> int:
        """Channels of all ranks' messages of a token."""
        return self.heads * self.channels + self.new

    def first_seen(self, positions: Array) -> Array:
        """The first position that each token sees; int64."""
        first: Array = np.zeros_like(positions)
        if self.chunk:
            first = positions - positions % self.chunk
        elif self.window:
            first = np.maximum(0, positions + 1 - self.window)
        return first

    def spans_of(self, position: int) -> int:
        """How many spans a token there sees."""
        first = self.first_seen(np.array([position], np.int64))[0]
        return position // self.span + 1 - int(first) // self.span


class Pieces(Protocol):
    """A layer's attention in steps, between which ranks exchange something."""

    @property
    def sizes(self) -> PieceSizes:
        """What is exchanged."""

    @property
    def heads(self) -> Sequence[range]:
        """Each rank's heads."""

    @property
    def widths(self) -> Sequence[int]:
        """Channels of each rank's message of a token."""

    def project(self, team: Team, cache: Any, step: arguments.Step, message: Array) -> None:
        """Write queries, and new keys and values, of this rank's heads: float32 [tokens, its width].

        Where Attention.begin has something to sum, it has begun already. The cache is the layer's.
        """

    def place(self, messages: Sequence[Array], to: arguments.Pieces) -> object:
        """Give the kernels what all ranks have told; the result must outlive their use."""

    def attend(self, team: Team, step: arguments.Step, pieces: arguments.Pieces) -> None:
        """Records of this rank's positions for all heads."""

    def combine(self, team: Team, step: arguments.Step, pieces: arguments.Pieces) -> None:
        """What attention gives for this rank's heads, from all ranks' records of them."""

    def finish(self, team: Team, step: arguments.Step, total: arguments.Sum | None) -> bool:
        """What is left of the half layer, as Attention.run."""


class GroupedPieces:
    """Of grouped-query attention: `queries` and `kv` are each rank's heads, `group` heads share a KV head.

    `layer` is this rank's. A KV head that several ranks compute is told by the first of them.
    """

    def __init__(
        self, sizes: PieceSizes, layer: arguments.AttentionLayer, rank: int, queries: Sequence[range],
        kv: Sequence[range], group: int,
    ):  # fmt: skip
        self.sizes, self.layer, self.heads = sizes, layer, queries
        self._kv_ends = np.maximum.accumulate([0, *(own.stop for own in kv)]).tolist()
        told = [
            range(max(own.start, first), max(own.start, first, own.stop))
            for first, own in zip(self._kv_ends, kv, strict=False)
        ]
        self._told, self._first = [len(own) for own in told], told[rank].start - kv[rank].start
        self._rank, self._kv_heads = rank, sizes.heads // group
        starts = np.arange(0, sizes.heads + 1, group, dtype=np.int64)
        self.whole = arguments.AttentionLayer(
            eps=layer.eps, scale=layer.scale, soft_cap=layer.soft_cap, heads=sizes.heads, kv_heads=self._kv_heads,
            head_dim=layer.head_dim, channels=layer.channels, window=layer.window, chunk=layer.chunk,
            head_start=arguments.address(starts),
        )  # fmt: skip
        self._kept = starts

    @property
    def widths(self) -> list[int]:
        return [(len(own) + 2 * told) * self.layer.head_dim for own, told in zip(self.heads, self._told, strict=True)]

    def project(self, team: Team, cache: Any, step: arguments.Step, message: Array) -> None:
        self.layer.cache = self.whole.cache = cache
        if self.layer.head_norm != arguments.HeadNorm.WHOLE_PROJECTION:  # else Attention.begin has done it
            team.project(self.layer, step)
        team.rotate(self.layer, step, self._first, self._told[self._rank], message)

    def place(self, messages: Sequence[Array], to: arguments.Pieces) -> object:
        size, tokens = self.layer.head_dim, len(messages[0])
        borders = [(len(own) * size, told * size) for own, told in zip(self.heads, self._told, strict=True)]
        queries = np.concatenate([m[:, :q] for m, (q, _) in zip(messages, borders, strict=True)], axis=1)
        keys = np.concatenate([m[:, q : q + kv] for m, (q, kv) in zip(messages, borders, strict=True)], axis=1)
        values = np.concatenate([m[:, q + kv :] for m, (q, kv) in zip(messages, borders, strict=True)], axis=1)
        assert keys.shape == values.shape == (tokens, self._kv_heads * size)
        to.queries, to.keys, to.values = map(arguments.address, (queries, keys, values))
        return queries, keys, values

    def attend(self, team: Team, step: arguments.Step, pieces: arguments.Pieces) -> None:
        team.attend_pieces(self.whole, step, pieces)

    def combine(self, team: Team, step: arguments.Step, pieces: arguments.Pieces) -> None:
        team.combine_pieces(self.layer, step, pieces)

    def finish(self, team: Team, step: arguments.Step, total: arguments.Sum | None) -> bool:
        return team.project_attended(self.layer, step, total)


class LatentPieces:
    """Of multi-head latent attention, whose latents every rank computes; `layer` is this rank's."""

    def __init__(self, sizes: PieceSizes, layer: arguments.LatentLayer, heads: Sequence[range]):
        self.sizes, self.layer, self.heads = sizes, layer, heads
        self.whole = arguments.LatentLayer(
            scale=layer.scale, heads=sizes.heads, kv_rank=layer.kv_rank, nope=layer.nope, rope=layer.rope
        )

    @property
    def widths(self) -> list[int]:
        return [len(own) * self.sizes.channels for own in self.heads]

    def project(self, team: Team, cache: Any, step: arguments.Step, message: Array) -> None:
        self.layer.cache = self.whole.cache = cache
        team.project_latents(self.layer, step, message)

    def place(self, messages: Sequence[Array], to: arguments.Pieces) -> object:
        queries = np.concatenate(messages, axis=1)
        to.queries = arguments.address(queries)
        return queries

    def attend(self, team: Team, step: arguments.Step, pieces: arguments.Pieces) -> None:
        team.attend_latent_pieces(self.whole, step, pieces)

    def combine(self, team: Team, step: arguments.Step, pieces: arguments.Pieces) -> None:
        team.combine_latent_pieces(self.layer, step, pieces)

    def finish(self, team: Team, step: arguments.Step, total: arguments.Sum | None) -> bool:
        return team.project_attended_latents(self.layer, step, total)
