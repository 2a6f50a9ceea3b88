"""Compiling the kernels before they are needed: once for each node, the other ranks load them from the cache."""

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.comm.start import World
from mpillama.files.native import NativeModel
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


def warm_up(file: NativeModel, world: World, target: Target, kv_type: str) -> None:
    """Run a one-layer model of the file's weight types, so that each kernel is compiled for just these types."""
    types = list({s.weight_type.name: s.weight_type for s in file.specs if s.split is not Split.REPLICATED}.values())
    if world.neighbours.is_root:
        _run_all(types, target.threads, kv_type)
    world.neighbours.barrier()
    if not world.neighbours.is_root:
        _run_all(types, target.threads, kv_type)


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
