"""Compiling the kernels before they are needed: once for each node, the other ranks load them from the cache."""

from collections.abc import Sequence

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.comm.shared_memory import SharedReduction
from mpillama.comm.start import World
from mpillama.kernels.shared_sum import sum_shared, views
from mpillama.kernels.target import Target
from mpillama.layout.weight_types import WeightType
from mpillama.model.cache import KVCache, single_sequence_step
from mpillama.model.config import ModelConfig
from mpillama.model.llama import LlamaModel
from mpillama.model.partition import partition
from mpillama.model.tensors import Split, TensorSpec, WeightTypes, tensor_specs
from mpillama.model.weights import load_weights

SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 32,
    "vocab_size": 16,
}
TOKENS = 9
"""Enough tokens to pass through the tiles for many and for single tokens."""


def matrix_types(specs: Sequence[TensorSpec]) -> list[WeightType]:
    """The weight types of a model's matrices, each once."""
    return list({s.weight_type.name: s.weight_type for s in specs if s.split is not Split.REPLICATED}.values())


def warm_up(types: list[WeightType], world: World, target: Target, kv_type: str) -> None:
    """Run a one-layer model of each weight type, so that each kernel is compiled for just these types."""
    if world.neighbours.is_root:
        _run_all(types, target.threads, kv_type)
    world.neighbours.barrier()
    if not world.neighbours.is_root:
        _run_all(types, target.threads, kv_type)


def choose_reduction(comm: Communicator, world: World, hidden_size: int, chunk: int) -> None:
    """Let the ranks of one host add up through shared memory where that is faster than MPI."""
    if comm.size > 1 and world.neighbours.size == comm.size:
        shared = SharedReduction(comm.mpi, sum_shared, views)
        sizes = sorted({hidden_size * tokens for tokens in (1, 8, 32, chunk)})
        comm.choose_reduction(shared, sizes)


def _run_all(types: list[WeightType], threads: int, kv_type: str) -> None:
    for weight_type in types:
        _run_small_model(weight_type, threads, kv_type)


def _run_small_model(weight_type: WeightType, threads: int, kv_type: str) -> None:
    config = ModelConfig.from_hf(SMALL)
    part = partition(config, 1)[0]
    weights = load_weights(config, tensor_specs(config, WeightTypes(weight_type)), part, _zeros)
    model = LlamaModel(config, weights, Communicator.alone(), threads)
    cache, table = KVCache(config, part, 1, kv_type), np.zeros(1, np.int64)
    for tokens in (TOKENS, 1):
        model.forward(single_sequence_step(np.zeros(tokens, np.int64), 0, table, 1), cache)


def _zeros(spec: TensorSpec, units: range, arrays: object) -> None:
    """Leave the weights as the zeros that fresh memory holds."""
