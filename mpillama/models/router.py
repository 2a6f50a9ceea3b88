"""How tokens choose among experts: scores, which of them are chosen, and the shares that the chosen ones have."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpillama.errors import UserError
from mpillama.kernels import arguments
from mpillama.models.config_values import ConfigValues
from mpillama.models.linear import LayerWeights
from mpillama.models.tensors import TensorSpec, whole_matrix, whole_vector
from mpillama.quant.types.f32 import F32
from mpillama.quant.weight_type import LANES, round_up

MOST_EXPERTS = 4096
SCORES: Mapping[str, int] = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2, "logits": 3, "logits_to_sigmoid": 4}
"""What a logit becomes, by the numbers of kernels/src/router.h.

Of plain logits shares are a softmax of the chosen, or the sigmoid of each.
"""
WEIGHT, BIAS, CORRECTION = "mlp.gate.weight", "mlp.gate.bias", "mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class Router:
    """Each token takes the `chosen` of `count` experts that have the highest scores; ties go to the lower number.

    `bias` is a vector added to the logits, `correction` one added to the scores by which experts are chosen, but not to
    those that become shares. Of `groups` of neighbours only the `chosen_groups` best count, each by the sum of its two
    highest scores. `renormalise` divides the shares by their sum and `epsilon`; `scaling` multiplies them at the end.
    """

    count: int
    chosen: int
    scores: str = "softmax"
    renormalise: bool = False
    epsilon: float = 0.0
    scaling: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    bias: bool = False
    correction: bool = False

    @classmethod
    def read(cls, values: ConfigValues, **kind: Any) -> "Router":
        """From Hugging Face's names; `kind` are fields that the family decides."""
        # transformers 5 writes num_local_experts for some families, transformers 4 num_experts for the same.
        count = values.get("num_local_experts", values.get("n_routed_experts"))
        found = cls(
            count=values.size("num_experts", count, limit=MOST_EXPERTS),
            chosen=values.size("num_experts_per_tok"),
            **{"renormalise": values.flag("norm_topk_prob"), **kind},
        )
        if found.chosen > found.count:
            raise UserError(
                f"The model's configuration has num_experts_per_tok={found.chosen}, but only {found.count} experts: "
                "the file is damaged."
            )
        return found

    @classmethod
    def read_grouped(cls, values: ConfigValues, **kind: Any) -> "Router":
        """As read, for routers of DeepSeek V3's kind: sigmoids with a correction, and groups of experts."""
        groups, chosen_groups = values.size("n_group", 1), values.size("topk_group", 1)
        fields = {"scores": "sigmoid", "correction": True, "epsilon": 1e-20, "groups": groups}
        fields |= {"chosen_groups": chosen_groups, "scaling": values.number("routed_scaling_factor", 1.0)}
        found = cls.read(values, **(fields | kind))
        size, rest = divmod(found.count, groups)
        if groups > 1 and (rest or size < 2):
            raise values.refuse("n_group", f"{found.count} experts cannot be divided into groups of two or more each")
        if chosen_groups > groups or found.chosen > size * chosen_groups:
            raise values.refuse(
                "topk_group", f"of {groups} groups of {size} experts it must leave room for {found.chosen}"
            )
        return found

    @property
    def idle(self) -> float:
        """The share of experts that a token leaves unread."""
        return 1 - self.chosen / self.count

    def specs(self, prefix: str, hidden_size: int) -> Iterator[TensorSpec]:
        """Its tensors, float32 in any model: near ties decide."""
        yield whole_matrix(prefix + WEIGHT, self.count, hidden_size, F32)
        for name, wanted in ((BIAS, self.bias), (CORRECTION, self.correction)):
            if wanted:
                yield whole_vector(prefix + name, self.count, round_up(self.count, LANES))

    def argument(self, weights: LayerWeights) -> arguments.Router:
        """For kernels."""
        return arguments.Router(
            matrix=weights.matrix(WEIGHT).column_parallel(), bias=weights.address(BIAS),
            correction=weights.address(CORRECTION), epsilon=self.epsilon, scaling=self.scaling,
            scores=SCORES[self.scores], chosen=self.chosen, renormalise=self.renormalise, groups=self.groups,
            chosen_groups=self.chosen_groups,
        )  # fmt: skip
