"""How many bytes a rank takes: the one model of memory behind `plan`, the check before loading, the log and `generate`.

Weights, KV cache, recurrent states and step buffers are computed by the functions that allocate them; what Python and
the libraries take was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mpillama.models.cache import cache_bytes, cache_read_bytes, held_blocks, state_bytes
from mpillama.models.config import ModelConfig
from mpillama.models.partition import Division, Partition
from mpillama.models.tensors import EMBEDDING, LM_HEAD, TensorSpec
from mpillama.models.weights import arena_bytes, slice_bytes
from mpillama.models.workspace import scratch_bytes, workspace_bytes

PYTHON_BYTES = 75_000_000
"""Resident bytes of a rank with kernels and MPI but without a model: 74 to 77 MB were measured on 2 to 6 ranks."""
ROOT_BYTES = 15_000_000
"""What rank 0 has beyond that, for HDF5, tokenizer and templates: 14 to 16 MB were measured."""
TOKENIZER_BYTES = 1500
"""Resident bytes on rank 0 for each entry of the vocabulary: 191 MB for 127,000 were measured."""
SHARED_WINDOW_BYTES = 16 * (1 << 17)
"""A rank's part of the shared-memory reduction, which a host holds once; each process of the host maps all of them."""
RESERVE = 64 << 20
"""Bytes that must stay free for each rank, for temporary objects."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank takes.

    `embedding` (with the head) is a part of `weights`, `reads` what is read of the file; `tokenizer` is a part of
    `python`, which else is there before a model is loaded. `draft` is all that a draft model takes besides. Of
    `kv_cache` a step at the end of the context reads `cache_read`.
    """

    weights: int
    embedding: int
    kv_cache: int
    states: int
    buffers: int
    python: int
    tokenizer: int
    reads: int
    has_head: bool = True
    draft: int = 0
    cache_read: int = 0

    @property
    def total(self) -> int:
        """Resident bytes once the whole context is used."""
        return self.weights + self.kv_cache + self.states + self.buffers + self.python + self.draft

    @property
    def to_allocate(self) -> int:
        """Of these, what a process that has just started still takes."""
        return self.weights + self.kv_cache + self.states + self.buffers + self.tokenizer


@dataclass(frozen=True)
class MemoryModel:
    """A model divided so, up to `sequences` sequences at a time, steps of up to `chunk` prompt tokens.

    `states` are the state slots, if it has recurrent layers; `threads` are those of a rank.
    """

    config: ModelConfig
    specs: Sequence[TensorSpec]
    division: Division
    kv_type: str
    chunk: int
    sequences: int = 1
    has_tokenizer: bool = True
    states: int = 0
    threads: int = 1

    def of_rank(self, rank: int, part: Partition, context: int) -> RankMemory:
        """What a rank takes if each sequence has a cache of `context` positions, which may be 0."""
        config = self.config
        window = SHARED_WINDOW_BYTES if self.division.ranks > 1 else 0
        logits = 8 * config.vocab_size * self.sequences
        tokenizer = TOKENIZER_BYTES * config.vocab_size if self.has_tokenizer and rank == 0 else 0
        tokens = self._tokens(context)
        # What steps under way have left, one for each other stage.
        earlier = 4 * tokens * config.padded_hidden_size * (self.division.stages - 1) * part.is_last
        return RankMemory(
            weights=arena_bytes(self.specs, part),
            embedding=slice_bytes([spec for spec in self.specs if spec.name in (EMBEDDING, LM_HEAD)], part),
            kv_cache=held_blocks(context, part.holders) * self.sequences * self.cache_block_bytes(part),
            states=state_bytes(config, part, self.states),
            buffers=workspace_bytes(config, part, tokens) + self.scratch(part, context) + logits + window + earlier,
            python=PYTHON_BYTES + (ROOT_BYTES + tokenizer if rank == 0 else 0),
            tokenizer=tokenizer,
            reads=slice_bytes(self.specs, part),
            has_head=part.is_last,
            cache_read=cache_read_bytes(config, part, context, self.kv_type) * self.sequences,
        )

    def scratch(self, part: Partition, context: int) -> int:
        """Bytes that a rank's kernels take for themselves if a sequence has `context` positions."""
        return scratch_bytes(self.config, part, self._tokens(context), context, self.threads)

    def _tokens(self, context: int) -> int:
        """Of the largest step."""
        return max(self.sequences, min(self.chunk, context or self.chunk))

    def of_ranks(self, context: int) -> list[RankMemory]:
        """What each rank takes; of thousands of ranks most are alike and computed once."""
        known, found = dict[tuple[int, ...], RankMemory](), []
        for rank, part in enumerate(self.config.partition(self.division)):
            stage = (part.layers.start, part.layers.stop) if part.layers else ()
            sizes = (int(rank == 0), *stage, *(len(units) for units in part.ranges.values()))
            if sizes not in known:
                known[sizes] = self.of_rank(rank, part, context)
            found.append(known[sizes])
        return found

    def cache_block_bytes(self, part: Partition) -> int:
        """Bytes of a rank's keys and values of 64 positions that it holds."""
        return cache_bytes(self.config, part, 1, self.kv_type)


@dataclass(frozen=True)
class RankUsage:
    """What one rank's memory was used for, in bytes.

    `kv_cache` has room for the context, of which `kv_cache_filled` was written, and only that is resident; so it is
    with `states`, slot by slot. `process` is all that is resident, Python and libraries too. `draft` is what a draft
    model takes beside the model: weights, cache, states and buffers.
    """

    weights: int
    kv_cache: int
    kv_cache_filled: int
    states: int
    buffers: int
    process: int
    draft: int = 0


def memory_of_ranks(model: MemoryModel, blocks: int, positions: int, processes: Sequence[int]) -> list[RankUsage]:
    """Each rank's memory with a cache of `blocks` blocks, `positions` of it filled; `processes` are resident bytes."""
    parts, holders = model.config.partition(model.division), model.division.holders
    filled = held_blocks(positions, holders)
    return [
        RankUsage(
            of_rank.weights,
            blocks // holders * model.cache_block_bytes(part),
            filled * model.cache_block_bytes(part),
            of_rank.states,
            of_rank.buffers,
            process,
        )
        for of_rank, part, process in zip(model.of_ranks(0), parts, processes, strict=True)
    ]
