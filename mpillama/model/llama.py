"""The Llama decoder, split over ranks: two all-reduces a layer, one all-gather of the logits."""

import ctypes
import math
from collections.abc import Callable
from typing import cast

import numpy as np

from mpillama.comm.backoff import Backoff
from mpillama.comm.communicator import Communicator
from mpillama.comm.shared_memory import YIELDS
from mpillama.kernels import arguments
from mpillama.kernels.library import Team
from mpillama.kernels.shared_sum import PROGRESS_STRIDE, SharedWindow
from mpillama.model.cache import KVCache, Step
from mpillama.model.config import ModelConfig
from mpillama.model.linear import any_quantised
from mpillama.model.partition import Partition, partition
from mpillama.model.tuning import choose_in_flight
from mpillama.model.weights import LayerWeights, Weights
from mpillama.model.workspace import Activations, StepArrays, Workspace
from mpillama.quant.weight_type import LANES

Array = np.ndarray


class ResidualSum:
    """Adds the sum over ranks of what half a layer computes to the residual stream.

    Where the ranks share memory, threads add up in the half's own region, each its columns as soon as they are ready.
    """

    def __init__(self, comm: Communicator, team: Team):
        self.comm = comm
        self.team = team
        self._progress = np.zeros((team.threads, PROGRESS_STRIDE), np.int64)
        self._sum = arguments.Sum(
            progress=arguments.address(self._progress), spins=Backoff(comm.yields).spins, yields=YIELDS
        )

    def __call__(self, half: Callable[..., bool], layer: object, a: StepArrays, bias: Array | None) -> None:
        """Run a half layer and add its sum, then the bias, to a.x."""
        shared = self.comm.shared_for(a.partial.size)
        if self.comm.size > 1 and shared is None:
            half(layer, a.argument)
            self.team.add_rounded(a.x, self.comm.all_reduce(a.partial), bias)
            return
        total = self._sum
        total.bias, total.waited = arguments.address(bias), 0
        if shared is not None:
            window = cast(SharedWindow, shared.shared)
            total.window = ctypes.addressof(window.argument)
            total.sequence = shared.next_sequence(window.exchanges(*a.partial.shape))
        done = half(layer, a.argument, total)
        if shared is not None:
            go_on = lambda: self.team.finish_sum(a.argument, total)  # noqa: E731
            self.comm.finish_all_reduce(done, total.waited * 1e-9, go_on)


class DecoderLayer:
    """Pre-norm attention and MLP, each closed by one all-reduce."""

    def __init__(
        self,
        config: ModelConfig,
        weights: LayerWeights,
        window: int,
        heads_of_kv: Array,
        all_reduce: "ResidualSum",
    ):
        self.weights = weights
        self.team = all_reduce.team
        self.all_reduce = all_reduce
        self.attention = _attention_layer(config, weights, window, heads_of_kv)
        self.mlp = _mlp_layer(config, weights)

    def forward(self, a: StepArrays, cache: arguments.Cache) -> None:
        """Advance the residual stream a.x float32 [tokens, hidden], which every rank holds in full."""
        self.attention.cache = cache
        self.all_reduce(self.team.attention_half, self.attention, a, self.weights.o_proj_bias)
        self.all_reduce(self.team.mlp_half, self.mlp, a, self.weights.down_proj_bias)


def _attention_layer(config: ModelConfig, w: LayerWeights, window: int, heads_of_kv: Array) -> arguments.AttentionLayer:
    layer = arguments.AttentionLayer(
        q=w.q_proj.column_parallel(), k=w.k_proj.column_parallel(), v=w.v_proj.column_parallel(),
        o=w.o_proj.row_parallel(), eps=config.rms_norm_eps, scale=1.0 / math.sqrt(config.head_dim),
        hidden_size=config.hidden_size, heads=int(heads_of_kv[-1]), kv_heads=len(heads_of_kv) - 1,
        head_dim=config.padded_head_dim, window=window,
    )  # fmt: skip
    vectors = {
        "norm": w.input_layernorm, "q_bias": w.q_proj_bias, "k_bias": w.k_proj_bias, "v_bias": w.v_proj_bias,
        "q_norm": w.q_norm, "k_norm": w.k_norm, "head_start": heads_of_kv,
    }  # fmt: skip
    for name, vector in vectors.items():
        setattr(layer, name, arguments.address(vector))
    return layer


def _mlp_layer(config: ModelConfig, w: LayerWeights) -> arguments.MlpLayer:
    layer = arguments.MlpLayer(
        gate=w.gate_proj.column_parallel(), up=w.up_proj.column_parallel(), down=w.down_proj.row_parallel(),
        norm=arguments.address(w.post_attention_layernorm), gate_bias=arguments.address(w.gate_proj_bias),
        up_bias=arguments.address(w.up_proj_bias), eps=config.rms_norm_eps, hidden_size=config.hidden_size,
        chosen=config.num_experts_per_tok, renormalise=config.norm_topk_prob,
    )  # fmt: skip
    if w.router is not None:
        layer.router = w.router.column_parallel()
    return layer


class LlamaModel:
    """A rank's part of the decoder."""

    def __init__(self, config: ModelConfig, weights: Weights, comm: Communicator, team: Team):
        parts = partition(config, comm.size)
        self.tokens_run = 0
        self.config = config
        self.weights = weights
        self.part = parts[comm.rank]
        self.comm = comm
        self.team = team
        self.logit_widths = [len(p.vocab_groups) * LANES for p in parts]
        self.inverse_frequencies = np.array(config.inverse_frequencies(), np.float32)
        self.in_flight = choose_in_flight(team, weights.lm_head)
        self.workspace = Workspace(config, self.part)
        self.heads_of_kv = query_heads_of_kv(config, self.part)
        self.embedding, self.head = weights.embed_tokens.column_parallel(), weights.lm_head.column_parallel()
        all_reduce = ResidualSum(comm, team)
        self.layers = [
            DecoderLayer(config, w, window, self.heads_of_kv, all_reduce)
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
        self.team.library.angles(step.positions, self.inverse_frequencies, self.config.rope_factor, a.cosines, a.sines)
        step.describe(a.argument)
        a.argument.in_flight = self.in_flight
        for decoder, layer_cache in zip(self.layers, cache.arguments, strict=False):
            decoder.forward(a, layer_cache)
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
        self.team.library.embed_rows(self.embedding, rows, a.partial)
        self.team.round_to_float(self.comm.all_reduce(a.partial), a.x)

    def _logits(self, x: Array) -> Array:
        if not len(x):
            return np.empty((0, self.config.vocab_size), np.float32)
        head = self.weights.lm_head
        h = Activations.empty(*x.shape)
        part = np.empty((len(x), self.logit_widths[self.comm.rank]), np.float32)
        self._normalise(x, h, any_quantised(head))
        self.team.column_parallel(self.head, h.argument(), part, self.in_flight)
        return self.comm.all_gather_columns(part, self.logit_widths)[:, : self.config.vocab_size]

    def _normalise(self, x: Array, h: Activations, quantised: bool) -> None:
        """The model's last norm, of x [tokens, padded hidden] to h."""
        c = self.config
        self.team.normalise(x, self.weights.norm, c.hidden_size, c.rms_norm_eps, quantised, h.argument())


def query_heads_of_kv(config: ModelConfig, part: Partition) -> Array:
    """int64 [local kv heads + 1]: the local query heads of local KV head i are result[i] : result[i + 1]."""
    group = config.num_attention_heads // config.num_key_value_heads
    borders = [kv * group for kv in (*part.kv_heads, part.kv_heads.stop)]
    return np.clip(np.array(borders, np.int64) - part.heads.start, 0, len(part.heads))
