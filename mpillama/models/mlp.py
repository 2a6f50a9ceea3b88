"""Kinds of MLP, the second half of a decoder layer; see attention.py for what a kind is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from mpillama.errors import UserError
from mpillama.kernels import arguments
from mpillama.kernels.arguments import Activation
from mpillama.kernels.library import Team
from mpillama.models.config_values import ConfigValues
from mpillama.models.linear import LayerWeights
from mpillama.models.partition import Split
from mpillama.models.tensors import EXPERTS, TensorSpec, WeightTypes, whole_matrix, whole_vector
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import BLOCK, round_up

MOST_EXPERTS = 4096


class Mlp(Protocol):
    """What any kind of MLP says of itself."""

    products: ClassVar[Mapping[str, tuple[str, ...]]]
    """Of kernels.library.PARTS, the matrices that each reads, by their names within the layer."""

    @property
    def split(self) -> Split:
        """By which units ranks divide it."""

    @property
    def panel(self) -> int:
        """Inner channels of a unit."""

    @property
    def idle(self) -> float:
        """The share of its matrices of experts that a token leaves unread."""

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        """Its tensors in the order of the file; `prefix` is that of the layer."""

    def layer(self, weights: LayerWeights, hidden_size: int, norm: str, eps: float) -> Any:
        """What kernels are told of a layer; `norm` names the vector of its norm."""

    def run(self, team: Team, layer: Any, step: arguments.Step, total: arguments.Sum | None) -> bool:
        """Norm and MLP: the rest as Team.mlp_half says."""

    def output_bias_of(self, weights: LayerWeights) -> np.ndarray | None:
        """What is added once after the sum over ranks."""


def ffn_panel(intermediate_size: int) -> int:
    """Columns of a panel of down_proj: the largest of 128, 64, 32 that divides the padded size."""
    padded = round_up(intermediate_size, BLOCK)
    return next(p for p in (128, 64, 32) if padded % p == 0)


@dataclass(frozen=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x)); `bias` adds one to each of the three."""

    intermediate_size: int
    bias: bool = False
    activation: Activation = Activation.SILU

    prefix: ClassVar[str] = "mlp."
    products: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "gate/up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "down": ("mlp.down_proj.weight",),
    }

    @classmethod
    def read(cls, values: ConfigValues) -> "GatedMlp":
        """From Hugging Face's names."""
        return cls(values.size("intermediate_size"), values.flag("mlp_bias"), read_activation(values))

    @property
    def padded_size(self) -> int:
        """intermediate_size with zeros up to whole blocks of 32."""
        return round_up(self.intermediate_size, BLOCK)

    @property
    def panel(self) -> int:
        return ffn_panel(self.intermediate_size)

    @property
    def split(self) -> Split:
        return Split("ffn_panels", self.padded_size // self.panel)

    @property
    def idle(self) -> float:
        return 0.0

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        yield from self._matrices(prefix, hidden_size, types)

    def _matrices(
        self, prefix: str, hidden_size: int, types: WeightTypes, experts: int = 0, chosen: int = 1
    ) -> Iterator[TensorSpec]:
        hidden, panel, split = round_up(hidden_size, BLOCK), self.panel, self.split
        for part in ("gate", "up"):
            name, source = f"{prefix}{self.prefix}{part}_proj", (self.intermediate_size, hidden_size)
            yield TensorSpec(
                name + ".weight", split, self.padded_size, hidden, types.of(name + ".weight"), panel, source,
                experts=experts, chosen=chosen,
            )  # fmt: skip
            if self.bias:
                yield TensorSpec(name + ".bias", split, self.padded_size, 1, F32, panel, source[:1], vector=True)
        name, source = f"{prefix}{self.prefix}down_proj", (hidden_size, self.intermediate_size)
        yield TensorSpec(
            name + ".weight", split, hidden, self.padded_size, types.of(name + ".weight"), panel, source, panel,
            experts=experts, chosen=chosen,
        )  # fmt: skip
        if self.bias:
            yield whole_vector(name + ".bias", hidden_size, hidden)

    def layer(self, weights: LayerWeights, hidden_size: int, norm: str, eps: float) -> arguments.MlpLayer:
        gate, up, down = (weights.matrix(f"{self.prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
        return arguments.MlpLayer(
            gate=gate.column_parallel(), up=up.column_parallel(), down=down.row_parallel(), norm=weights.address(norm),
            gate_bias=weights.address(f"{self.prefix}gate_proj.bias"), eps=eps, hidden_size=hidden_size,
            up_bias=weights.address(f"{self.prefix}up_proj.bias"), activation=self.activation,
        )  # fmt: skip

    def run(self, team: Team, layer: arguments.MlpLayer, step: arguments.Step, total: arguments.Sum | None) -> bool:
        return team.mlp_half(layer, step, total)

    def output_bias_of(self, weights: LayerWeights) -> np.ndarray | None:
        return weights.vector(f"{self.prefix}down_proj.bias")


@dataclass(frozen=True)
class Experts(GatedMlp):
    """A mixture of `count` gated MLPs, of which a router chooses `chosen` for a token; softmax over all of them.

    `renormalise`: the shares of the chosen ones add up to 1.
    """

    count: int = 0
    chosen: int = 0
    renormalise: bool = False

    prefix: ClassVar[str] = EXPERTS
    products: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "router": ("mlp.gate.weight",),
        "gate/up": (f"{EXPERTS}gate_proj.weight", f"{EXPERTS}up_proj.weight"),
        "down": (f"{EXPERTS}down_proj.weight",),
    }

    @classmethod
    def read(cls, values: ConfigValues) -> "Experts":
        key = "intermediate_size" if values.get("moe_intermediate_size") is None else "moe_intermediate_size"
        found = cls(
            intermediate_size=values.size(key),
            activation=read_activation(values),
            # transformers 5 writes num_local_experts for all families, transformers 4 num_experts for Qwen's.
            count=values.size("num_experts", values.get("num_local_experts"), limit=MOST_EXPERTS),
            chosen=values.size("num_experts_per_tok"),
            renormalise=values.flag("norm_topk_prob"),
        )
        if found.chosen > found.count:
            raise UserError(
                f"The model's configuration has num_experts_per_tok={found.chosen}, but only {found.count} experts: "
                "the file is damaged."
            )
        return found

    @property
    def idle(self) -> float:
        return 1 - self.chosen / self.count

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        yield whole_matrix(prefix + "mlp.gate.weight", self.count, hidden_size, F32)  # near ties decide
        yield from self._matrices(prefix, hidden_size, types, self.count, self.chosen)

    def layer(self, weights: LayerWeights, hidden_size: int, norm: str, eps: float) -> arguments.MlpLayer:
        layer = super().layer(weights, hidden_size, norm, eps)
        layer.router = weights.matrix("mlp.gate.weight").column_parallel()
        layer.chosen, layer.renormalise = self.chosen, self.renormalise
        return layer


ACTIVATIONS = {"silu": Activation.SILU, "swish": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}


def read_activation(values: ConfigValues, key: str = "hidden_act") -> Activation:
    return ACTIVATIONS[values.expect(key, ACTIVATIONS, "silu")]
