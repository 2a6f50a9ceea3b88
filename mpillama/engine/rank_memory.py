"""What a rank's memory is used for, as the closing line tells it: of a process the model is only a part."""

from dataclasses import dataclass

from mpillama.engine.executor import Executor
from mpillama.model.cache import blocks_for, cache_bytes
from mpillama.model.partition import partition
from mpillama.model.tensors import TensorSpec
from mpillama.model.weights import arena_bytes
from mpillama.model.workspace import workspace_bytes


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    `kv_cache` has room for the context, of which `kv_cache_filled` was written, and only that is resident. `process` is
    all that is resident, Python and libraries too.
    """

    weights: int
    kv_cache: int
    kv_cache_filled: int
    buffers: int
    process: int


def memory_of_ranks(
    executor: Executor, specs: list[TensorSpec], kv_type: str, positions: int, processes: list[int]
) -> list[RankMemory]:
    """Each rank's memory, in order of rank; `positions` of the cache are filled, `processes` are the resident bytes."""
    config, tokens = executor.model.config, executor.model.workspace.capacity
    return [
        RankMemory(
            arena_bytes(specs, part),
            cache_bytes(config, part, executor.blocks, kv_type),
            cache_bytes(config, part, blocks_for(positions), kv_type),
            workspace_bytes(config, part, tokens),
            process,
        )
        for part, process in zip(partition(config, executor.comm.size), processes, strict=True)
    ]
