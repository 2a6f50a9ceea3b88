"""Running the first layers of a model only, and extrapolating to the whole: real reads, real shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mpillama.engine.engine import Engine
from mpillama.errors import UserError
from mpillama.loading.memory import MemoryModel
from mpillama.loading.model_file import ModelFile, SliceReader
from mpillama.models.config import ModelConfig
from mpillama.models.tensors import TensorSpec, WeightTypes
from mpillama.quant.weight_type import WeightType


@dataclass(frozen=True)
class TruncatedModel:
    """A model file of which only the first layers are used; the other properties are those of the whole model."""

    whole: ModelFile
    layers: int

    @property
    def path(self) -> str:
        return self.whole.path

    @property
    def files(self) -> Mapping[str, int]:
        return self.whole.files

    @property
    def config_json(self) -> Mapping[str, Any]:
        return self.whole.config_json

    @property
    def texts(self) -> Mapping[str, bytes]:
        return self.whole.texts

    @property
    def weight_types(self) -> WeightTypes:
        return self.whole.weight_types

    @property
    def metadata_sha256(self) -> str:
        return self.whole.metadata_sha256

    @property
    def config(self) -> ModelConfig:
        return self.whole.config.first_layers(self.layers)

    @property
    def specs(self) -> list[TensorSpec]:
        return self.config.tensors(self.weight_types)

    def requantised(self) -> Mapping[str, tuple[WeightType, int]]:
        return self.whole.requantised()

    def stored_bytes(self, spec: TensorSpec, units: range) -> int:
        return self.whole.stored_bytes(spec, units)

    def reader(self, on_bytes: Callable[[int], None], workers: int = 1, verify: bool = False) -> SliceReader:
        return self.whole.reader(on_bytes, workers, verify)


def truncated(file: ModelFile, layers: int | None) -> ModelFile:
    """The file itself, or its first layers, with --layers."""
    if layers is None:
        return file
    if not 1 <= layers <= file.config.num_hidden_layers:
        raise UserError(f"--layers is {layers}: this model has 1 to {file.config.num_hidden_layers} layers.")
    return TruncatedModel(file, layers)


@dataclass(frozen=True)
class Extrapolation:
    """What the whole model needs, from a trial; bytes and seconds are those of the fullest and slowest rank."""

    layers: int
    whole_layers: int
    memory_bytes_per_rank: int
    load_seconds: float
    decode_tokens_per_second: float


def extrapolate(
    file: TruncatedModel, engine: Engine, positions: int, load_seconds: float, memory: list[int], kv_type: str
) -> Extrapolation:
    """Scale measured figures by the bytes that the whole model has more; `memory` is each rank's resident bytes.

    The trial's cache is resident for the `positions` that were written, the whole model's is counted to the end of the
    context. Recurrent states are counted as if all were written.
    """
    division, states = engine.executor.model.division, engine.executor.states
    small = _bytes_of_ranks(MemoryModel(file.config, file.specs, division, kv_type, 1, states=states), positions)
    larger = MemoryModel(file.whole.config, file.whole.specs, division, kv_type, 1, states=states)
    whole = _bytes_of_ranks(larger, engine.longest)
    most = max(m - sum(s) + sum(w) for m, s, w in zip(memory, small, whole, strict=True))
    ratio = max(w[0] / s[0] for s, w in zip(small, whole, strict=True))
    speed = engine.counts.decode.tokens_per_second / ratio
    layers = file.config.num_hidden_layers, file.whole.config.num_hidden_layers
    return Extrapolation(*layers, most, load_seconds * ratio, speed)


def _bytes_of_ranks(model: MemoryModel, context: int) -> list[tuple[int, int]]:
    """Each rank's weights, and the cache up to the positions of the context."""
    return [(memory.weights, memory.kv_cache + memory.states) for memory in model.of_ranks(context)]
