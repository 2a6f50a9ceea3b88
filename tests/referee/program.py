"""The one place where the referee touches mpillama: a model made of given tensors, and steps of many sequences.

What is compiled is imported in functions only, after `start`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.kernels.isa import choose_isa, host_features, known_sets
from mpillama.kernels.library import Team
from mpillama.kernels.target import prepare, requested_isa

MakeTensor = Callable[[str, tuple[int, ...]], np.ndarray]
"""A tensor, float32, by Hugging Face's name and shape."""
Part = tuple[int, int, Sequence[int]]
"""Of a step: sequence, first position, token ids."""
Step = Callable[[Sequence[Part]], tuple[np.ndarray, np.ndarray]]
"""Runs tokens through the model; gives the logits and the last hidden states of all of them."""

DEMO = Path(__file__).parents[2] / "data" / "demo.h5"
DEMO_VOCABULARY = 2048


def start(threads: int) -> str:
    """Choose the instruction set that the environment asks for, in a process where nobody has; returns its name."""
    return prepare(requested_isa(), threads).isa.name


@cache
def _team(threads: int) -> Team:
    return prepare(requested_isa(), threads).team


def in_use(target: Any) -> str:
    """The name of the instruction set in the fixture `target` of tests/conftest.py."""
    return str(target.isa.name)


def instruction_sets() -> Mapping[str, str]:
    """Every instruction set, and why this machine cannot run it, "" if it can."""
    return {name: _lacking(name) for name in (known.name for known in known_sets())}


def _lacking(name: str) -> str:
    try:
        choose_isa(name, host_features())
    except UserError as error:
        return str(error)
    return ""


@contextmanager
def opened(
    config: Mapping[str, Any] | None, weights: str, tensor: MakeTensor, kv_type: str, threads: int,
    sequences: int, positions: int, tokens: int,
) -> Iterator[Step]:  # fmt: skip
    """A model on one rank, with a cache for as many sequences of as many positions, and steps of up to `tokens`.

    `weights` is a weight type, followed by those of matrices of their own: "q4_0 lm_head=f16 v_proj=q8_0". Without a
    configuration the model is the demo. Each sequence's cache blocks lie in no order.
    """
    from mpillama.engine.executor import Executor, Segment
    from mpillama.models.cache import blocks_for

    model = _demo(threads) if config is None else _made(config, weights, tensor, threads)
    each = blocks_for(positions)
    executor = Executor(model, positions, kv_type, tokens, sequences, each * sequences)
    order = np.argsort(np.arange(each * sequences) * 7919 % 10007, kind="stable").reshape(sequences, each)

    def step(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
        segments = [
            Segment(sequence, first, ids, len(ids), 0, () if first else order[sequence].tolist())
            for sequence, first, ids in parts
        ]
        logits = executor.forward(segments)
        return logits, executor.hidden_states(0, sum(len(ids) for _, _, ids in parts))

    yield step


def _made(config: Mapping[str, Any], weights: str, tensor: MakeTensor, threads: int) -> Any:
    from mpillama.comm.communicator import Communicator
    from mpillama.formats.native.writer import pack_tensor
    from mpillama.models.config import ModelConfig
    from mpillama.models.decoder import Decoder
    from mpillama.models.tensors import TensorSpec, WeightTypes
    from mpillama.models.weights import load_weights
    from mpillama.quant.registry import WEIGHT_TYPES

    default, *own = weights.split()
    types = {module: WEIGHT_TYPES[name] for module, _, name in (part.partition("=") for part in own)}
    read_config = ModelConfig.from_hf(config)
    names = [spec.name for spec in read_config.tensors(WeightTypes(WEIGHT_TYPES[default]))]
    by_name = {name: types[name.split(".")[-2]] for name in names if name.split(".")[-2] in types}
    specs = read_config.tensors(WeightTypes(WEIGHT_TYPES[default], by_name))

    def fill(spec: TensorSpec, units: range, arrays: Sequence[np.ndarray]) -> None:
        for part, name in enumerate(spec.source_names):
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is here on purpose
                packed = pack_tensor(spec, tensor(name, spec.source_shape))
            for array, values in zip(arrays, packed, strict=True):
                (array[part] if spec.experts else array)[...] = values

    loaded = load_weights(read_config, specs, read_config.partition(1)[0], fill)
    return Decoder(read_config, loaded, Communicator.alone(), _team(threads))


def _demo(threads: int) -> Any:
    from mpillama.comm.communicator import Communicator
    from mpillama.loading.model_file import open_model
    from mpillama.models.decoder import Decoder
    from mpillama.models.weights import load_weights

    file = open_model(str(DEMO))
    reader = file.reader(lambda count: None)
    try:
        weights = load_weights(file.config, file.specs, file.config.partition(1)[0], reader.read)
    finally:
        reader.close()
    return Decoder(file.config, weights, Communicator.alone(), _team(threads))
