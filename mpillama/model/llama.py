"""The Llama decoder, split over ranks: two all-reduces a layer, one all-gather of the logits."""

import math

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.kernels import attention, rope, vector
from mpillama.layout.weight_types import LANES
from mpillama.model.cache import KVCache, Step
from mpillama.model.config import ModelConfig
from mpillama.model.linear import Activations, Matrix
from mpillama.model.partition import Partition, partition
from mpillama.model.weights import LayerWeights, Weights

Array = np.ndarray


class RotaryEmbedding:
    """The angles of a step's positions, the same for every layer."""

    def __init__(self, config: ModelConfig):
        self.inverse_frequencies = np.array(config.inverse_frequencies(), np.float32)

    def angles(self, positions: Array) -> tuple[Array, Array]:
        """cos and sin, float32 [tokens, head_dim / 2]."""
        shape = (len(positions), len(self.inverse_frequencies))
        cosines, sines = np.empty(shape, np.float32), np.empty(shape, np.float32)
        rope.rope_angles(positions, self.inverse_frequencies, cosines, sines)
        return cosines, sines


class DecoderLayer:
    """Pre-norm attention and MLP, each closed by one all-reduce."""

    def __init__(
        self, config: ModelConfig, weights: LayerWeights, heads_of_kv: Array, comm: Communicator, threads: int
    ):
        self.config = config
        self.weights = weights
        self.heads_of_kv = heads_of_kv
        self.comm = comm
        self.threads = threads

    def forward(self, x: Array, step: Step, angles: tuple[Array, Array], keys: Array, values: Array) -> Array:
        """Advance the residual stream `x` float32 [tokens, hidden], which every rank holds in full."""
        x = x + self.comm.all_reduce(self._attention(x, step, angles, keys, values))
        x = x + self.comm.all_reduce(self._mlp(x))
        return x

    def _attention(self, x: Array, step: Step, angles: tuple[Array, Array], keys: Array, values: Array) -> Array:
        """Attend over this rank's heads; the sum over ranks is the attention output."""
        w = self.weights
        h = self._norm(x, w.input_layernorm)
        q, k, v = (self._heads(p, h) for p in (w.q_proj, w.k_proj, w.v_proj))
        rope.rotate(q, *angles, self.threads)
        rope.rotate(k, *angles, self.threads)
        rope.store_keys_values(k, v, keys, values, step.slots, self.threads)
        out = np.empty_like(q)
        scale = 1.0 / math.sqrt(self.config.head_dim)
        attention.attention(
            q, keys, values, self.heads_of_kv, step.segments, step.tables, scale, out, self.threads
        )  # fmt: skip
        return w.o_proj.row_parallel(Activations(out.reshape(len(x), -1), self.threads))

    def _mlp(self, x: Array) -> Array:
        """SwiGLU over this rank's panels; the sum over ranks is the MLP output."""
        w = self.weights
        h = self._norm(x, w.post_attention_layernorm)
        gate, up = w.gate_proj.column_parallel(h), w.up_proj.column_parallel(h)
        vector.silu_multiply(gate, up, gate, self.threads)
        return w.down_proj.row_parallel(Activations(gate, self.threads))

    def _heads(self, projection: Matrix, h: Activations) -> Array:
        """Project to this rank's heads: float32 [tokens, heads, head_dim]."""
        return projection.column_parallel(h).reshape(len(h.x), -1, self.config.padded_head_dim)

    def _norm(self, x: Array, weight: Array) -> Activations:
        return rms_norm(x, weight, self.config, self.threads)


class LlamaModel:
    """A rank's part of the decoder."""

    def __init__(self, config: ModelConfig, weights: Weights, comm: Communicator, threads: int):
        parts = partition(config, comm.size)
        self.config = config
        self.weights = weights
        self.part = parts[comm.rank]
        self.comm = comm
        self.threads = threads
        self.logit_widths = [len(p.vocab_groups) * LANES for p in parts]
        self.rotary = RotaryEmbedding(config)
        heads_of_kv = query_heads_of_kv(config, self.part)
        self.layers = [DecoderLayer(config, w, heads_of_kv, comm, threads) for w in weights.layers]

    def forward(self, step: Step, cache: KVCache) -> Array:
        """Run the step's tokens and return the wanted logits, float32 [len(step.logit_rows), vocab_size]."""
        x = self._embed(step.token_ids)
        angles = self.rotary.angles(step.positions)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer.forward(x, step, angles, keys, values)
        return self._logits(x[step.logit_rows])

    def _embed(self, token_ids: Array) -> Array:
        """Each token's row, which one rank has: float32 [tokens, hidden]."""
        rows = token_ids.astype(np.int64) - self.part.vocab_rows.start
        rows[rows >= len(self.part.vocab_rows)] = -1
        return self.comm.all_reduce(self.weights.embed_tokens.embed(rows, self.config.padded_hidden_size))

    def _logits(self, x: Array) -> Array:
        if not len(x):
            return np.empty((0, self.config.vocab_size), np.float32)
        h = rms_norm(x, self.weights.norm, self.config, self.threads)
        part = self.weights.lm_head.column_parallel(h)
        return self.comm.all_gather_columns(part, self.logit_widths)[:, : self.config.vocab_size]


def rms_norm(x: Array, weight: Array, config: ModelConfig, threads: int) -> Activations:
    """Normalise [tokens, hidden] for the matrices that follow."""
    out = np.empty_like(x)
    vector.rms_norm(x, weight, config.hidden_size, config.rms_norm_eps, out, threads)
    return Activations(out, threads)


def query_heads_of_kv(config: ModelConfig, part: Partition) -> Array:
    """int64 [local kv heads + 1]: the local query heads of local KV head i are result[i] : result[i + 1]."""
    group = config.num_attention_heads // config.num_key_value_heads
    borders = [kv * group for kv in (*part.kv_heads, part.kv_heads.stop)]
    return np.clip(np.array(borders, np.int64) - part.heads.start, 0, len(part.heads))
