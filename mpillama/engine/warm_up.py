"""Compiling the kernels before they are needed: once for each node, the other ranks load them from the cache."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.comm.shared_memory import SharedReduction
from mpillama.comm.start import World
from mpillama.kernels.shared_sum import sum_shared, views
from mpillama.kernels.target import Target
from mpillama.layout.weight_types import F32, WeightType
from mpillama.model.cache import KVCache, single_sequence_step
from mpillama.model.config import ModelConfig
from mpillama.model.llama import LlamaModel
from mpillama.model.partition import partition
from mpillama.model.tensors import TensorSpec, WeightTypes, layer_prefix, tensor_specs
from mpillama.model.weights import load_weights

LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")
TOKENS = 9
"""Enough tokens to pass through the tiles for many and for single tokens."""


def warm_up(config: ModelConfig, specs: Sequence[TensorSpec], world: World, target: Target, kv_type: str) -> None:
    """Run one-layer models like the real one, so that each kernel is compiled for just its types."""
    small, kinds = _small(config), layer_kinds(specs)
    run_all = lambda: _run_all(small, kinds, target.threads, kv_type)  # noqa: E731
    with world.comm.doing("preparing kernels, which are compiled once and kept"):
        if world.neighbours.is_root:
            world.comm.busy(run_all)
        world.neighbours.barrier()
        if not world.neighbours.is_root:
            world.comm.busy(run_all)
        world.comm.barrier()  # what other hosts take is told, too


def layer_kinds(specs: Sequence[TensorSpec]) -> list[WeightTypes]:
    """The different combinations of weight types in a layer, each as that of a model's first layer."""
    common: dict[str, WeightType] = {}
    layers: dict[str, dict[str, WeightType]] = defaultdict(dict)
    for spec in specs:
        if match := LAYER_NAME.match(spec.name):
            layers[match[1]][LAYER_NAME.sub(layer_prefix(0), spec.name)] = spec.weight_type
        else:
            common[spec.name] = spec.weight_type
    kinds = {tuple((n, t.name) for n, t in layer.items()): {**common, **layer} for layer in layers.values()}
    return [WeightTypes(F32, kind) for kind in kinds.values()]


def _small(config: ModelConfig) -> ModelConfig:
    """A model of the same kind and the least size; its compiled kernels are the same."""
    return replace(
        config,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=16,
        rope_scaling=None,
        windows=config.windows[:1],
        num_experts=min(config.num_experts, 2),
        num_experts_per_tok=min(config.num_experts_per_tok, 2),
    )


def choose_reduction(comm: Communicator, world: World, hidden_size: int, chunk: int) -> None:
    """Let the ranks of one host add up through shared memory where that is faster than MPI."""
    if comm.size > 1 and world.neighbours.size == comm.size:
        with comm.watch.blocking("the making of memory that the ranks share"):
            shared = SharedReduction(comm.mpi, sum_shared, views)
        sizes = sorted({hidden_size * tokens for tokens in (1, 8, 32, chunk)})
        comm.choose_reduction(shared, sizes)


def _run_all(config: ModelConfig, kinds: list[WeightTypes], threads: int, kv_type: str) -> None:
    for types in kinds:
        _run_small_model(config, types, threads, kv_type)


def _run_small_model(config: ModelConfig, types: WeightTypes, threads: int, kv_type: str) -> None:
    part = partition(config, 1)[0]
    weights = load_weights(config, tensor_specs(config, types), part, _zeros)
    model = LlamaModel(config, weights, Communicator.alone(), threads)
    cache, table = KVCache(config, part, 1, kv_type), np.zeros(1, np.int64)
    for tokens in (TOKENS, 1):
        model.forward(single_sequence_step(np.zeros(tokens, np.int64), 0, table, 1), cache)


def _zeros(spec: TensorSpec, units: range, arrays: object) -> None:
    """Leave the weights as the zeros that fresh memory holds."""
