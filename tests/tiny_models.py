"""Small random models, the same on every run, for tests in this process and under mpirun (no pytest needed here).

The weights are scaled so that the logits have a spread above 1 and attention picks out positions: a wrong angle, mask
or head shows.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mpillama.formats.native.writer import write_model
from mpillama.models.config import ModelConfig
from mpillama.models.tensors import EMBEDDING, LM_HEAD, TensorSpec, WeightTypes
from mpillama.quant.registry import WEIGHT_TYPES

Tensors = dict[str, np.ndarray]

AWKWARD: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 200,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 20,
    "vocab_size": 101,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""Sizes that divide by nothing: 7 blocks of hidden channels, padded heads, 11 panels, 7 groups of the vocabulary."""

PLAIN: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "tie_word_embeddings": True,
}
"""Tied embeddings, two query heads for each KV head, head_dim not hidden / heads, and every branch of llama3's RoPE."""

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
BOS, EOS = 0, 1
TOY_VOCABULARY = 320
TOY: Mapping[str, Any] = {
    **PLAIN,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": TOY_VOCABULARY,
    "max_position_embeddings": 8192,
    "rope_scaling": None,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
"""A model that the command line runs: it babbles, for up to 8192 tokens if EOS is held off by a logit bias."""

LATENT_TOY: Mapping[str, Any] = {
    **TOY,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 6,
    "q_lora_rank": 40,
    "kv_lora_rank": 56,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 2,
}
"""The same with latent attention."""

DELTA_TOY: Mapping[str, Any] = {
    **TOY,
    "model_type": "qwen3_next",
    "full_attention_interval": 2,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 40,
    "partial_rotary_factor": 0.5,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 64,
}
"""The same with a gated delta net before each layer of attention, and experts."""

BLOCK_SPARSE_TOY: Mapping[str, Any] = {
    **TOY,
    "model_type": "minimax_m3_vl_text",
    "layer_types": ["minimax_m3_sparse"] * 2,
    "mlp_layer_types": ["dense"] * 2,
    "dense_intermediate_size": 128,
    "index_n_heads": 3,
    "index_head_dim": 32,
    "index_block_size": 64,
    "index_topk_blocks": 2,
}
"""The same with attention to two blocks that an index chooses."""

TOY_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = (
    "Once upon a time a llama waited in the queue of a small cluster.",
    "The scheduler said: be patient, your job is next! The llama hummed.",
    "Every rank held hands in a ring, and the sum went round and round.",
)


def write_awkward(path: str | Path, weight_type: str) -> None:
    """Write the model whose sizes divide by nothing; `weight_type` is a name of WEIGHT_TYPES."""
    write_random(path, AWKWARD, weight_type)


def write_plain(path: str | Path, weight_type: str) -> None:
    """Write the tied model with llama3 RoPE scaling."""
    write_random(path, PLAIN, weight_type)


def write_toy(path: str | Path, weight_type: str = "q8_0", config: Mapping[str, Any] = TOY) -> None:
    """Write a model with tokenizer, chat template, BOS and EOS, ready for `python -m mpillama`."""
    texts = {
        "tokenizer.json": toy_tokenizer(),
        "chat_template.jinja": TOY_CHAT_TEMPLATE.encode(),
        "generation_config.json": json.dumps({"bos_token_id": BOS, "eos_token_id": [EOS]}).encode(),
    }
    write_random(path, config, weight_type, texts)


def write_delta(path: str | Path, weight_type: str = "q8_0") -> None:
    """Write a model with recurrent states, ready for the same."""
    write_toy(path, weight_type, DELTA_TOY)


def write_random(
    path: str | Path, config: Mapping[str, Any], weight_type: str, texts: Mapping[str, bytes] | None = None
) -> None:
    """Write a model of random_tensors(config)."""
    tensors = random_tensors(config)
    write_model(str(path), config, WEIGHT_TYPES[weight_type], tensors.__getitem__, texts or {})


def specs_of(config: Mapping[str, Any], weight_type: str = "f32") -> list[TensorSpec]:
    """The tensors of a model in one weight type."""
    return ModelConfig.from_hf(config).tensors(WeightTypes(WEIGHT_TYPES[weight_type]))


def random_tensors(config: Mapping[str, Any], seed: int = 7) -> Tensors:
    """Every tensor of a model under Hugging Face's name, float32 in the checkpoint's shape."""
    rng = np.random.default_rng(seed)
    return {name: _random_tensor(spec, rng) for spec in specs_of(config) for name in spec.source_names}


def _random_tensor(spec: TensorSpec, rng: np.random.Generator) -> np.ndarray:
    if spec.vector:
        return rng.uniform(0.6, 1.4, spec.source_shape).astype(np.float32)
    return (rng.standard_normal(spec.source_shape) * _gain(spec)).astype(np.float32)


def _gain(spec: TensorSpec) -> float:
    """Standard deviation of a matrix: inputs of size 1 give outputs of size 1, queries and keys 1.6."""
    if spec.name in (EMBEDDING, LM_HEAD):
        return 2.0 / spec.source_shape[1] ** 0.5
    sharp = "q_proj" in spec.name or "k_proj" in spec.name
    return float((1.6 if sharp else 1.0) / spec.source_shape[1] ** 0.5)


@cache
def toy_tokenizer() -> bytes:
    """A trained byte-level BPE `tokenizer.json` of TOY_VOCABULARY tokens or a few less."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOY_VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe.to_str().encode()
