"""Configurations of well-known models, for planning and measuring without a file (from their published config.json)."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpillama.errors import UserError
from mpillama.models.config import ModelConfig
from mpillama.models.tensors import EMBEDDING, LM_HEAD, TensorSpec, WeightTypes
from mpillama.quant.registry import WEIGHT_TYPES, weight_type_named
from mpillama.quant.types.q8_0 import Q8_0
from mpillama.quant.weight_type import WeightType

CHOSEN = Q8_0
"""Stands for the type to be chosen; matrices that have another one, such as routers, have it always."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_ROPE,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "head_dim": 128,
    "num_key_value_heads": 8,
}
EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
}
MIXTRAL = {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}

HY3 = {
    "model_type": "hy_v3",
    "vocab_size": 120832,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 11158840.0,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "num_shared_experts": 1,
    "router_scaling_factor": 2.826,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}

GLM4 = {
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.5,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "attention_bias": True,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
GLM45_AIR = {
    "max_position_embeddings": 131072,
    "n_routed_experts": 128,
    "moe_intermediate_size": 1408,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}
GLM46 = {
    "max_position_embeddings": 202752,
    "use_qk_norm": True,
    "n_routed_experts": 160,
    "moe_intermediate_size": 1536,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}
MINIMAX_M2 = {
    "model_type": "minimax_m2",
    "vocab_size": 200064,
    "max_position_embeddings": 196608,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "rotary_dim": 64,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
MINIMAX_M3 = {
    "model_type": "minimax_m3_vl_text",
    "vocab_size": 200064,
    "max_position_embeddings": 524288,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "partial_rotary_factor": 0.5,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "dense_intermediate_size": 12288,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "index_topk_blocks": 16,
    "index_block_size": 128,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57,
    "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "tie_word_embeddings": False,
}
KIMI = {
    **DEEPSEEK,
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": {**YARN, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "first_k_dense_replace": 1,
}
DEEPSEEK_V32 = {
    **DEEPSEEK,
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
GLM5 = {
    **{key: value for key, value in DEEPSEEK_V32.items() if key != "rope_scaling"},
    "model_type": "glm_moe_dsa",
    "vocab_size": 154880,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "index_n_heads": 32,
}

GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "head_dim": 64,
    "num_key_value_heads": 8,
    "attention_bias": True,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}


def _sizes(base: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    return {
        **base,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **other,
    }


LLAMA4 = {
    "model_type": "llama4_text",
    "vocab_size": 202048,
    "max_position_embeddings": 10485760,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {**LLAMA3_ROPE, "factor": 16.0, "high_freq_factor": 1.0},
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
}
MINISTRAL3 = {
    "model_type": "ministral3",
    "vocab_size": 131072,
    "rope_scaling": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
PHI = {
    "model_type": "phi3",
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "num_key_value_heads": 10,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
}
OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
}
GRANITE = {
    "model_type": "granite",
    "vocab_size": 49159,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e7,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 16.0,
}
SMOLLM3 = {"model_type": "smollm3", "vocab_size": 128256, "max_position_embeddings": 65536, "rope_theta": 5e6}
MISTRAL_SMALL = {**MISTRAL, "vocab_size": 131072, "max_position_embeddings": 131072, "rope_theta": 1e9}

QWEN35 = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e7,
    "head_dim": 256,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "tie_word_embeddings": False,
}
QWEN35_MOE = {**QWEN35, "model_type": "qwen3_5_moe_text", "num_experts": 256, "num_experts_per_tok": 8}
QWEN35_LARGE = {
    "linear_num_value_heads": 64,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
}
QWEN35_LARGEST = {**QWEN35_LARGE, "num_experts": 512, "num_experts_per_tok": 10}
QWEN3_NEXT = {
    **QWEN35,
    "model_type": "qwen3_next",
    "vocab_size": 151936,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
}

SMALL_ROPE = {**LLAMA3_ROPE, "factor": 32.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _sizes(LLAMA3, 2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, rope_scaling=SMALL_ROPE),
    "llama-3.2-3b": _sizes(LLAMA3, 3072, 8192, 28, 24, tie_word_embeddings=True, rope_scaling=SMALL_ROPE),
    "llama-3.1-8b": _sizes(LLAMA3, 4096, 14336, 32, 32),
    "llama-3.1-70b": _sizes(LLAMA3, 8192, 28672, 80, 64),
    "llama-3.1-405b": _sizes(LLAMA3, 16384, 53248, 126, 128),
    "llama-4-scout": _sizes(LLAMA4, 5120, 8192, 48, 40),
    "mistral-7b": _sizes(MISTRAL, 4096, 14336, 32, 32),
    "mixtral-8x7b": _sizes({**MISTRAL, **MIXTRAL}, 4096, 14336, 32, 32),
    "mistral-small-24b": _sizes(MISTRAL_SMALL, 5120, 32768, 40, 32),
    "ministral-3-8b": _sizes(MINISTRAL3, 4096, 14336, 34, 32),
    "phi-4": _sizes(PHI, 5120, 17920, 40, 40),
    "gemma-2-9b": _sizes({"model_type": "gemma2"}, 3584, 14336, 42, 16, num_key_value_heads=8),
    "gemma-2-27b": _sizes(
        {"model_type": "gemma2"}, 4608, 36864, 46, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144
    ),
    "gemma-3-4b": _sizes(GEMMA3, 2560, 10240, 34, 8),
    "gemma-3-27b": _sizes(GEMMA3, 5376, 21504, 62, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
    "olmo-2-7b": _sizes(OLMO2, 4096, 11008, 32, 32),
    "olmo-2-32b": _sizes(OLMO2, 5120, 27648, 64, 40, num_key_value_heads=8),
    "granite-3.3-8b": _sizes(GRANITE, 4096, 12800, 40, 32),
    "smollm3-3b": _sizes(SMOLLM3, 2048, 11008, 36, 16),
    "qwen3-0.6b": _sizes(QWEN3, 1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-8b": _sizes(QWEN3, 4096, 12288, 36, 32),
    "qwen3-32b": _sizes(QWEN3, 5120, 25600, 64, 64),
    "qwen3-30b-a3b": _sizes({**QWEN3, **EXPERTS, "model_type": "qwen3_moe"}, 2048, 6144, 48, 32),
    "qwen3-235b-a22b": _sizes(
        {**QWEN3, **EXPERTS, "model_type": "qwen3_moe", "moe_intermediate_size": 1536}, 4096, 12288, 94, 64
    ),
    "qwen3-next-80b": _sizes(QWEN3_NEXT, 2048, 5120, 48, 16),
    "qwen3.5-9b": _sizes(QWEN35, 4096, 12288, 32, 16, num_key_value_heads=4),
    "qwen3.5-27b": _sizes(QWEN35, 5120, 17408, 64, 24, num_key_value_heads=4, linear_num_value_heads=48),
    "qwen3.5-35b-a3b": _sizes(QWEN35_MOE, 2048, 512, 40, 16),
    "qwen3.5-122b-a10b": _sizes({**QWEN35_MOE, **QWEN35_LARGE}, 3072, 1024, 48, 32),
    "qwen3.5-397b": _sizes({**QWEN35_MOE, **QWEN35_LARGEST}, 4096, 1024, 60, 32),
    "glm-4.5-air": _sizes({**GLM4, **GLM45_AIR}, 4096, 10944, 46, 96),
    "glm-4.6": _sizes({**GLM4, **GLM46}, 5120, 12288, 92, 96),
    "minimax-m2": _sizes(MINIMAX_M2, 3072, 1536, 62, 48),
    "minimax-m3": _sizes(MINIMAX_M3, 6144, 3072, 60, 64),
    "gpt-oss-20b": _sizes(GPT_OSS, 2880, 2880, 24, 64, num_local_experts=32),
    "gpt-oss-120b": _sizes(GPT_OSS, 2880, 2880, 36, 64, num_local_experts=128),
    "deepseek-r1": _sizes(DEEPSEEK, 7168, 18432, 61, 128),
    "deepseek-v3.2": _sizes(DEEPSEEK_V32, 7168, 18432, 61, 128),
    "kimi-k2": _sizes(KIMI, 7168, 18432, 61, 64),
    "glm-5": _sizes(GLM5, 6144, 12288, 78, 64),
    "hy3": _sizes(HY3, 4096, 13312, 80, 64),
}


def shape_config(name: str) -> dict[str, Any]:
    """The configuration of a named shape; UserError lists the names."""
    if name not in SHAPES:
        raise UserError(f"--shape {name} is not known: choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]


# -- in which types they are published ------------------------------------------------------------------------------

AS_PUBLISHED = "as-published"


@dataclass(frozen=True)
class Published:
    """The types of a model's files: of its matrices, of its routed experts, of embedding and head.

    Matrices whose names the pattern `kept` matches are in bfloat16, too.
    """

    matrices: str = "bf16"
    experts: str = ""
    vocabulary: str = "bf16"
    kept: str = ""

    def of(self, spec: TensorSpec) -> WeightType:
        """The type of a matrix in memory; a quantised one that is turned becomes float32."""
        name = self.vocabulary if spec.name in (EMBEDDING, LM_HEAD) else self.matrices
        name = "bf16" if self.kept and re.search(self.kept, spec.name) else name
        name = self.experts or name if spec.experts else name
        found = weight_type_named("f32" if spec.part_of and spec.part_of.turned and name != "bf16" else name)
        assert found is not None
        return found


FP8 = Published("fp8")
FP8_DELTA = Published("fp8", kept=r"\.(in_proj_[ab]|shared_expert_gate)\.")
PUBLISHED: Mapping[str, Published] = {
    "glm-4.5-air": FP8,
    "glm-4.6": FP8,
    "minimax-m2": FP8,
    "deepseek-r1": FP8,
    "deepseek-v3.2": FP8,
    "glm-5": FP8,
    "kimi-k2": Published(experts="int4/32"),
    "qwen3-next-80b": FP8_DELTA,
    "qwen3.5-27b": FP8_DELTA,
    "qwen3.5-35b-a3b": FP8_DELTA,
    "qwen3.5-122b-a10b": FP8_DELTA,
    "qwen3.5-397b": FP8_DELTA,
    "hy3": FP8,
    "gpt-oss-20b": Published(experts="mxfp4"),
    "gpt-oss-120b": Published(experts="mxfp4"),
}
"""Those with another type than bfloat16: the smallest files of their makers. Kimi K2's are those of K2 Thinking."""


def types_of_shape(name: str, weights: str, config: ModelConfig) -> WeightTypes:
    """The types of a shape's matrices: a name, as published, or as stored, which is q4_0 for lack of a file."""
    if weights != AS_PUBLISHED:
        return config.quantised_to(WEIGHT_TYPES["q4_0" if weights == "as-stored" else weights])
    published = PUBLISHED.get(name, Published())
    kinds = {s.name: published.of(s) for s in config.tensors(WeightTypes(CHOSEN)) if s.weight_type is CHOSEN}
    default = Counter(kinds.values()).most_common(1)[0][0]
    return WeightTypes(default, {key: kind for key, kind in kinds.items() if kind != default} or None)
