"""Attention over deep contexts: how much of the read bandwidth a step of few rows reaches.

python benchmarks/deep_context.py --contexts 32768 65536 --rows 1 8 63 --kv-type q8 --threads 2

A model that is nothing but attention (32 heads, 8 KV heads of 128 channels, narrow otherwise) runs steps of one token
of each sequence; --one-sequence: of so many tokens of one sequence, as drafts are. --kind latent has DeepSeek V3's
attention instead, indexed that of V3.2, which scores all positions and attends to 2,048 of them, blocks that of MiniMax
M3, where an index chooses --blocks blocks of 128 positions for each of 4 KV heads. The cache is filled with numbers.
Where the sequences' caches do not fit into --memory, several sequences read the same blocks (as after a common prompt),
never two of them one after the other. Time is that of the kernels' part "attention", bytes are keys, values and scales
that the steps ask for, chosen or not: of one sequence's tokens once.
"""

import argparse

import numpy as np

from mpillama.comm.communicator import Communicator
from mpillama.engine.measure import read_bandwidth
from mpillama.kernels.library import PARTS
from mpillama.kernels.target import prepare, requested_isa
from mpillama.loading.synthetic import SyntheticWeights
from mpillama.models.attention import BLOCK_POSITIONS
from mpillama.models.cache import KVCache, blocks_for, cache_bytes, decode_step, single_sequence_step
from mpillama.models.config import ModelConfig
from mpillama.models.decoder import Decoder
from mpillama.models.tensors import WeightTypes
from mpillama.models.weights import load_weights
from mpillama.quant.registry import WEIGHT_TYPES

SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 1 << 18,
    "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip
LATENT = {
    **SHAPE, "model_type": "deepseek_v3", "num_attention_heads": 128, "num_key_value_heads": 128,
    "first_k_dense_replace": 1000,
}  # fmt: skip
BLOCK_SPARSE = {
    **SHAPE, "model_type": "minimax_m3_vl_text", "num_attention_heads": 64, "num_key_value_heads": 4,
    "partial_rotary_factor": 0.5, "dense_intermediate_size": 64,
}  # fmt: skip
KINDS = {
    "grouped": SHAPE, "latent": LATENT, "indexed": {**LATENT, "model_type": "deepseek_v32"}, "blocks": BLOCK_SPARSE,
}  # fmt: skip


def main() -> None:
    """Measure as the command line says and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 63])
    parser.add_argument("--kv-type", default="f16", choices=["f16", "f32", "q8"])
    parser.add_argument("--kind", default="grouped", choices=KINDS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory", type=float, default=3.0, help="GB of KV cache (default: 3)")
    parser.add_argument("--one-sequence", action="store_true")
    parser.add_argument("--blocks", type=int, default=16)
    options = parser.parse_args()
    config = ModelConfig.from_hf(shape(options.kind, options.layers, options.blocks))
    team = prepare(requested_isa(), options.threads).team
    part = config.partition(1)[0]
    weights = load_weights(
        config, config.tensors(WeightTypes(WEIGHT_TYPES["f32"])), part, SyntheticWeights().read, team=team
    )
    model = Decoder(config, weights, Communicator.alone(), team)
    print("| KV | positions | rows | ms a layer | GB/s | of read bandwidth |\n|---|---|---|---|---|---|")
    per_block = cache_bytes(config, part, 1, options.kv_type)
    for context in options.contexts:
        blocks = blocks_for(context + max(options.rows))
        apart = 1 if options.one_sequence else min(max(options.rows), int(options.memory * 1e9 / (blocks * per_block)))
        cache = filled_cache(model, blocks * max(1, apart), options.kv_type)
        for rows in options.rows:
            print(row(model, cache, options, context, rows, max(1, apart)), flush=True)
        del cache


def shape(kind: str, layers: int, blocks: int) -> dict[str, object]:
    """A model of so many layers; of MiniMax M3's those attend to so many blocks."""
    found = {**KINDS[kind], "num_hidden_layers": layers}
    if kind != "blocks":
        return found
    kinds = {"layer_types": ["minimax_m3_sparse"] * layers, "mlp_layer_types": ["dense"] * layers}
    return {**found, **kinds, "index_topk_blocks": blocks}


def filled_cache(model: Decoder, blocks: int, kv_type: str) -> KVCache:
    """A cache of numbers as a model's."""
    cache, rng = KVCache(model.config, model.part, blocks, kv_type), np.random.default_rng(0)
    for layer in cache.layers:
        for array in layer:
            flat = array.reshape(-1)
            tile = some_numbers(rng, array.dtype, min(1 << 20, flat.size))
            for first in range(0, flat.size, len(tile) or 1):
                flat[first : first + len(tile)] = tile[: flat.size - first]
    return cache


def some_numbers(rng: np.random.Generator, dtype: np.dtype, count: int) -> np.ndarray:
    """Normal numbers as f16 and f32 have them, bytes and scales as q8 has them."""
    normal = rng.standard_normal(count)
    if dtype == np.int8:
        return (40 * normal).clip(-127, 127).astype(np.int8)
    if dtype == np.uint16:
        return np.full(count, 0.025, np.float16).view(np.uint16)
    return normal.astype(np.float32) if dtype == np.float32 else normal.astype(np.float16).view(np.int16)


def row(model: Decoder, cache: KVCache, options: argparse.Namespace, context: int, rows: int, apart: int) -> str:
    """A row of the table."""
    each = blocks_for(context + rows)
    ids = np.arange(rows) % model.config.vocab_size
    if options.one_sequence:
        step = single_sequence_step(ids, context, np.arange(each), 0)
    else:
        of_row = np.arange(rows) % min(apart, rows)
        tables = of_row[:, None] * (cache.blocks // apart) + np.arange(each)
        step = decode_step(ids, np.full(rows, context), tables)
    model.advance(step, cache)
    before = read_bandwidth(model.comm, model.team)
    model.team.watch(True)
    for _ in range(options.steps):
        model.advance(step, cache)
    seconds = model.team.times()[:, PARTS.index("attention")].max() / options.steps
    model.team.watch(False)
    bandwidth = (before + read_bandwidth(model.comm, model.team)) / 2
    read = 1 if options.one_sequence else rows
    size = read * (context + 1) * cache_bytes(model.config, model.part, 1, options.kv_type) / BLOCK_POSITIONS
    ms, speed = 1e3 * seconds / len(model.layers), size / seconds / 1e9
    return f"| {options.kv_type} | {context} | {rows} | {ms:.1f} | {speed:.1f} | {size / seconds / bandwidth:.2f} |"


if __name__ == "__main__":
    main()
