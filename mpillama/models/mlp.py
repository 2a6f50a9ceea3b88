"""Kinds of MLP, the second half of a decoder layer; see attention.py for what a kind is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from mpillama.kernels import arguments
from mpillama.kernels.arguments import TILE_WIDTH, Activation
from mpillama.kernels.library import Team
from mpillama.models.config_values import ConfigValues
from mpillama.models.linear import LayerWeights
from mpillama.models.partition import Partition, Split
from mpillama.models.router import Router
from mpillama.models.tensors import EXPERTS, TensorSpec, WeightTypes, whole_matrix, whole_vector
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import BLOCK, round_up


class Mlp(Protocol):
    """What any kind of MLP says of itself."""

    @property
    def products(self) -> Mapping[str, tuple[str, ...]]:
        """Of kernels.library.PARTS, the matrices that each reads, by their names within the layer."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """By which units ranks divide it, the one that has most of the work first."""

    def step_width(self, part: Partition) -> int:
        """Channels of the step's arrays gate and up on a rank."""

    def scratch(self, part: Partition, hidden_size: int, tokens: int, threads: int) -> int:
        """Bytes that the threads have in common for steps of up to so many tokens, as far as they are many."""

    @property
    def idle(self) -> float:
        """The share of its matrices of experts that a token leaves unread."""

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        """Its tensors in the order of the file; `prefix` is that of the layer."""

    def layer(self, weights: LayerWeights, part: Partition, hidden_size: int, norm: str, eps: float) -> Any:
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
    """down(activation(gate(x)) * up(x)); `bias` adds one to each of the three.

    `alpha` and `limit` are those of the clamped activation, kernels/src/elementwise.h.
    """

    intermediate_size: int
    bias: bool = False
    activation: Activation = Activation.SILU
    alpha: float = 0.0
    limit: float = 0.0

    prefix: ClassVar[str] = "mlp."

    @classmethod
    def read(cls, values: ConfigValues) -> "GatedMlp":
        """From Hugging Face's names."""
        return cls(values.size("intermediate_size"), values.flag("mlp_bias"), read_activation(values))

    @property
    def products(self) -> Mapping[str, tuple[str, ...]]:
        gate, up, down = (f"{self.prefix}{part}_proj.weight" for part in ("gate", "up", "down"))
        return {"gate/up": (gate, up), "down": (down,)}

    @property
    def padded_size(self) -> int:
        """intermediate_size with zeros up to whole blocks of 32."""
        return round_up(self.intermediate_size, BLOCK)

    @property
    def panel(self) -> int:
        """Inner channels of a unit."""
        return ffn_panel(self.intermediate_size)

    @property
    def split(self) -> Split:
        """Its own units."""
        return Split("ffn_panels", self.padded_size // self.panel)

    @property
    def splits(self) -> tuple[Split, ...]:
        return (self.split,)

    def step_width(self, part: Partition) -> int:
        return len(part[self.split]) * self.panel

    def scratch(self, part: Partition, hidden_size: int, tokens: int, threads: int) -> int:
        return 0

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
                yield TensorSpec(
                    name + ".bias", split, self.padded_size, 1, F32, panel, source[:1], vector=True, experts=experts
                )
        name, source = f"{prefix}{self.prefix}down_proj", (hidden_size, self.intermediate_size)
        yield TensorSpec(
            name + ".weight", split, hidden, self.padded_size, types.of(name + ".weight"), panel, source, panel,
            experts=experts, chosen=chosen,
        )  # fmt: skip
        if self.bias:
            yield replace(whole_vector(name + ".bias", hidden_size, hidden), experts=experts)

    def layer(
        self, weights: LayerWeights, part: Partition, hidden_size: int, norm: str, eps: float
    ) -> arguments.MlpLayer:
        gate, up, down = (weights.matrix(f"{self.prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
        return arguments.MlpLayer(
            gate=gate.column_parallel(), up=up.column_parallel(), down=down.row_parallel(), norm=weights.address(norm),
            gate_bias=weights.address(f"{self.prefix}gate_proj.bias"), eps=eps, hidden_size=hidden_size,
            up_bias=weights.address(f"{self.prefix}up_proj.bias"), activation=self.activation,
            alpha=self.alpha, limit=self.limit,
        )  # fmt: skip

    def run(self, team: Team, layer: arguments.MlpLayer, step: arguments.Step, total: arguments.Sum | None) -> bool:
        return team.mlp_half(layer, step, total)

    def output_bias_of(self, weights: LayerWeights) -> np.ndarray | None:
        return weights.vector(f"{self.prefix}down_proj.bias")


@dataclass(frozen=True)
class SharedExpert(GatedMlp):
    """The expert that all tokens share; with `gated` its result is weighed by the sigmoid of a logit of its own."""

    gated: bool = False

    prefix: ClassVar[str] = "mlp.shared_experts."
    gate_name: ClassVar[str] = "mlp.shared_expert_gate.weight"

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        yield from super().specs(prefix, hidden_size, types)
        if self.gated:
            yield whole_matrix(prefix + self.gate_name, 1, hidden_size, F32)

    def add_to(self, layer: arguments.MlpLayer, weights: LayerWeights) -> None:
        """Tell the kernels of it, beside the experts of a layer."""
        gate, up, down = (weights.matrix(f"{self.prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
        layer.shared_gate, layer.shared_up = gate.column_parallel(), up.column_parallel()
        layer.shared_down = down.row_parallel()
        if self.gated:
            layer.shared_router = weights.matrix(self.gate_name).column_parallel()


@dataclass(frozen=True)
class Experts(GatedMlp):
    """A mixture of gated MLPs among which a router chooses for each token, and perhaps one that all tokens share.

    Biases are those of each expert, weighed as its result is. `weighs_inputs`: a token's share is a factor of what its
    expert sees instead.
    """

    router: Router = Router(1, 1)
    shared: SharedExpert | None = None
    weighs_inputs: bool = False

    prefix: ClassVar[str] = EXPERTS

    @classmethod
    def read(cls, values: ConfigValues, router: Router | None = None, shared: SharedExpert | None = None) -> "Experts":
        """From Hugging Face's names; without a router the family has Mixtral's."""
        key = "intermediate_size" if values.get("moe_intermediate_size") is None else "moe_intermediate_size"
        return cls(
            values.size(key), activation=read_activation(values), router=router or Router.read(values), shared=shared
        )

    @property
    def products(self) -> Mapping[str, tuple[str, ...]]:
        found = {"router": ("mlp.gate.weight",), **super().products}
        for part, matrices in (self.shared.products if self.shared else {}).items():
            found[part] = (*found[part], *matrices)
        return found

    @property
    def splits(self) -> tuple[Split, ...]:
        return (self.split, *(self.shared.splits if self.shared else ()))

    def step_width(self, part: Partition) -> int:
        """Those of the shared expert: what the others compute lies in memory of the threads."""
        return self.shared.step_width(part) if self.shared else super().step_width(part)

    def scratch(self, part: Partition, hidden_size: int, tokens: int, threads: int) -> int:
        """As kernels/src/experts.h: the activations of all pairs of tokens and experts, and each thread's sums."""
        hidden, inner, pairs = round_up(hidden_size, BLOCK), super().step_width(part), tokens * self.router.chosen
        tiled = pairs if tokens == 1 else pairs + (TILE_WIDTH - 1) * min(self.router.count, pairs)
        # Of a block of 32 its values, a scale and two sums.
        activations = (4 * pairs + tiled * (BLOCK + 12) // BLOCK) * (hidden + inner)
        return activations + 4 * pairs * inner + 8 * threads * hidden

    @property
    def idle(self) -> float:
        return self.router.idle

    def specs(self, prefix: str, hidden_size: int, types: WeightTypes) -> Iterator[TensorSpec]:
        yield from self.router.specs(prefix, hidden_size)
        yield from self._matrices(prefix, hidden_size, types, self.router.count, self.router.chosen)
        if self.shared:
            yield from self.shared.specs(prefix, hidden_size, types)

    def layer(
        self, weights: LayerWeights, part: Partition, hidden_size: int, norm: str, eps: float
    ) -> arguments.MlpLayer:
        layer = super().layer(weights, part, hidden_size, norm, eps)
        layer.router, layer.weighs_inputs = self.router.argument(weights), self.weighs_inputs
        if 0 in part[self.split]:  # one rank adds what is not divided
            layer.down_bias = weights.address(f"{self.prefix}down_proj.bias")
        if self.shared:
            self.shared.add_to(layer, weights)
        return layer

    def output_bias_of(self, weights: LayerWeights) -> None:
        """None: those of experts depend on the token."""


ACTIVATIONS = {"silu": Activation.SILU, "swish": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}


def read_activation(values: ConfigValues, key: str = "hidden_act") -> Activation:
    return ACTIVATIONS[values.expect(key, ACTIVATIONS, "silu")]
