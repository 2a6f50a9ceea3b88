"""The Llama decoder, split over ranks: two all-reduces a layer, one all-gather of the logits."""

import math

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.kernels import layer
from mpillama.kernels.attention import attention
from mpillama.kernels.rope import rope_angles
from mpillama.kernels.vector import add_rounded, add_to_all, round_to_float
from mpillama.layout.weight_types import LANES
from mpillama.model.cache import KVCache, LayerCache, Step
from mpillama.model.config import ModelConfig
from mpillama.model.experts import Experts
from mpillama.model.linear import any_quantised
from mpillama.model.partition import Partition, partition
from mpillama.model.tuning import Tuning, tune
from mpillama.model.weights import LayerWeights, Weights
from mpillama.model.workspace import Activations, StepArrays, Workspace

Array = np.ndarray


class DecoderLayer:
    """Pre-norm attention and MLP, each closed by one all-reduce."""

    def __init__(
        self, config: ModelConfig, weights: LayerWeights, window: int, heads_of_kv: Array, comm: Communicator,
        threads: int, tuning: Tuning,
    ):  # fmt: skip
        self.config = config
        self.weights = weights
        self.heads_of_kv = heads_of_kv
        self.comm = comm
        self.threads = threads
        self.tuning = tuning
        self.scale = 1.0 / math.sqrt(config.head_dim)
        self.window = window
        w = weights
        self.biases = None if w.q_proj_bias is None else (w.q_proj_bias, w.k_proj_bias, w.v_proj_bias)
        self.norms = None if w.q_norm is None else (w.q_norm, w.k_norm)
        self.mlp_biases = None if w.gate_proj_bias is None else (w.gate_proj_bias, w.up_proj_bias)
        self.experts = None if w.router is None else Experts(config, w, w.router)
        self.attention_quantised = any_quantised(w.q_proj, w.k_proj, w.v_proj)
        self.output_quantised = any_quantised(w.o_proj)
        self.mlp_quantised = any_quantised(w.gate_proj, w.up_proj)
        self.down_quantised = any_quantised(w.down_proj)

    def forward(self, a: StepArrays, step: Step, cache: LayerCache) -> None:
        """Advance the residual stream a.x float32 [tokens, hidden], which every rank holds in full."""
        add_rounded(a.x, self.comm.all_reduce(self._attention(a, step, cache)), self.threads)
        self._add_bias(a.x, self.weights.o_proj_bias)
        add_rounded(a.x, self.comm.all_reduce(self._mlp(a)), self.threads)
        self._add_bias(a.x, self.weights.down_proj_bias)

    def _attention(self, a: StepArrays, step: Step, cache: LayerCache) -> Array:
        """Attend over this rank's heads; the sum over ranks is the attention output."""
        w, c = self.weights, a.context
        h = self._normalise(a, w.input_layernorm, self.attention_quantised)
        layer.query_key_value(
            *w.q_proj.arrays, *w.k_proj.arrays, *w.v_proj.arrays, *h, a.q_rows, a.k_rows, a.v_rows,
            *self.tuning.arguments,
        )  # fmt: skip
        layer.rotate_and_store(
            a.q, a.k, a.v, self.biases, self.norms, self.config.rms_norm_eps, a.cosines, a.sines, cache, step.slots,
            self.threads,
        )  # fmt: skip
        attention(
            a.q, cache, self.heads_of_kv, step.segments, step.tables, self.scale, self.window, a.context_heads,
            self.output_quantised, c.values, c.scales, c.starts, self.threads,
        )  # fmt: skip
        layer.row_parallel(*w.o_proj.arrays, *c.arrays, a.partial, *self.tuning.arguments)
        return a.partial

    def _mlp(self, a: StepArrays) -> Array:
        """SwiGLU over this rank's panels; the sum over ranks is the MLP output."""
        w, g = self.weights, a.gate
        h = self._normalise(a, w.post_attention_layernorm, self.mlp_quantised)
        if self.experts is not None:
            return self.experts.forward(h, a.partial, self.tuning)
        layer.gate_up(
            *w.gate_proj.arrays, *w.up_proj.arrays, self.mlp_biases, None, *h, g.x, a.up, self.down_quantised,
            g.values, g.scales, g.starts, *self.tuning.arguments,
        )  # fmt: skip
        layer.row_parallel(*w.down_proj.arrays, *g.arrays, a.partial, *self.tuning.arguments)
        return a.partial

    def _add_bias(self, x: Array, bias: Array | None) -> None:
        if bias is not None:
            add_to_all(x, bias)

    def _normalise(self, a: StepArrays, weight: Array, quantised: bool) -> tuple[Array, Array, Array, Array]:
        h, c = a.hidden, self.config
        layer.normalise(
            a.x, weight, c.hidden_size, c.rms_norm_eps, h.x, quantised, h.values, h.scales, h.starts, self.threads
        )
        return h.arrays


class LlamaModel:
    """A rank's part of the decoder."""

    def __init__(self, config: ModelConfig, weights: Weights, comm: Communicator, threads: int):
        parts = partition(config, comm.size)
        self.tokens_run = 0
        self.config = config
        self.weights = weights
        self.part = parts[comm.rank]
        self.comm = comm
        self.threads = threads
        self.logit_widths = [len(p.vocab_groups) * LANES for p in parts]
        self.inverse_frequencies = np.array(config.inverse_frequencies(), np.float32)
        self.tuning = tune(threads, weights.lm_head)
        self.workspace = Workspace(config, self.part)
        heads_of_kv = query_heads_of_kv(config, self.part)
        self.layers = [
            DecoderLayer(config, w, window, heads_of_kv, comm, threads, self.tuning)
            for w, window in zip(weights.layers, config.windows, strict=True)
        ]

    def forward(self, step: Step, cache: KVCache) -> Array:
        """Run the step's tokens and return the wanted logits, float32 [len(step.logit_rows), vocab_size]."""
        self.advance(step, cache)
        return self.logits(step.logit_rows)

    def advance(self, step: Step, cache: KVCache) -> None:
        """Run the step's tokens; logits and hidden states of any of them can be had until the next step."""
        a = self.workspace.for_tokens(len(step.token_ids))
        self._embed(step.token_ids, a)
        rope_angles(step.positions, self.inverse_frequencies, self.config.rope_factor, a.cosines, a.sines)
        for index, decoder in enumerate(self.layers):
            decoder.forward(a, step, cache.layers[index])
        self.tokens_run += len(step.token_ids)

    def logits(self, rows: Array) -> Array:
        """What comes after tokens of the last step, float32 [len(rows), vocab_size]; all ranks ask for the same."""
        return self._logits(self.workspace.residual(0, self.workspace.capacity)[rows])

    def hidden_states(self, first: int, count: int) -> Array:
        """The last step's tokens after the last layer and norm, float32 [count, hidden_size]; no collective."""
        h = Activations.empty(count, self.config.padded_hidden_size)
        self._normalise(self.workspace.residual(first, count), h, quantised=False)
        return h.x[:, : self.config.hidden_size]

    def _embed(self, token_ids: Array, a: StepArrays) -> None:
        """Each token's row, which one rank has, to a.x."""
        rows = token_ids.astype(np.int64) - self.part.vocab_rows.start
        rows[rows >= len(self.part.vocab_rows)] = -1
        self.weights.embed_tokens.embed(rows, a.partial)
        round_to_float(self.comm.all_reduce(a.partial), a.x, self.threads)

    def _logits(self, x: Array) -> Array:
        if not len(x):
            return np.empty((0, self.config.vocab_size), np.float32)
        head = self.weights.lm_head
        h = Activations.empty(*x.shape)
        part = np.empty((len(x), self.logit_widths[self.comm.rank]), np.float32)
        self._normalise(x, h, any_quantised(head))
        layer.column_parallel(*head.arrays, *h.arrays, part, *self.tuning.arguments)
        return self.comm.all_gather_columns(part, self.logit_widths)[:, : self.config.vocab_size]

    def _normalise(self, x: Array, h: Activations, quantised: bool) -> None:
        """The model's last norm, of x [tokens, padded hidden] to h."""
        c = self.config
        layer.normalise(
            x, self.weights.norm, c.hidden_size, c.rms_norm_eps, h.x, quantised, h.values, h.scales, h.starts,
            self.threads,
        )  # fmt: skip


def query_heads_of_kv(config: ModelConfig, part: Partition) -> Array:
    """int64 [local kv heads + 1]: the local query heads of local KV head i are result[i] : result[i + 1]."""
    group = config.num_attention_heads // config.num_key_value_heads
    borders = [kv * group for kv in (*part.kv_heads, part.kv_heads.stop)]
    return np.clip(np.array(borders, np.int64) - part.heads.start, 0, len(part.heads))
