"""The mixture of experts of a layer (https://arxiv.org/abs/2401.04088): a router and many small MLPs."""

import numpy as np

from mpillama.kernels import experts, layer
from mpillama.model.config import ModelConfig
from mpillama.model.linear import Matrix, any_quantised
from mpillama.model.tuning import Tuning
from mpillama.model.weights import LayerWeights

Array = np.ndarray


class Experts:
    """This rank's slice of every expert of a layer."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, router: Matrix):
        self.config = config
        self.weights = weights
        self.router = router
        self.quantised = any_quantised(weights.gate_proj, weights.up_proj)
        self.down_quantised = any_quantised(weights.down_proj)

    def forward(self, h: tuple[Array, Array, Array, Array], partial: Array, tuning: Tuning) -> Array:
        """Each token's chosen experts' results, float64 [tokens, hidden]; every rank makes the same choice."""
        w, tokens, count = self.weights, len(h[0]), self.config.num_experts_per_tok
        chosen, shares = np.empty((tokens, count), np.int64), np.empty((tokens, count), np.float32)
        logits = np.empty((tokens, self.router.rows), np.float32)
        layer.column_parallel(*self.router.arrays, *h, logits, *tuning.arguments)
        experts.choose_experts(logits, self.config.num_experts, self.config.norm_topk_prob, chosen, shares)
        experts.mixture(
            *w.gate_proj.arrays, *w.up_proj.arrays, *w.down_proj.arrays, chosen, shares, self.quantised, *h,
            self.down_quantised, partial, *tuning.arguments,
        )  # fmt: skip
        return partial
