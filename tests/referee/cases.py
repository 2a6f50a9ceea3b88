"""What the referee computes: tiny models of every kind, and the steps that tokens take through them.

Weights and tokens are made of a generator's raw bits with integers and powers of two only, so that neither NumPy's
version nor the C library has a say. A case's digest depends on its model, weight and KV types and on the tokens alone:
cases that differ in chunks, company or threads have one name for it (`key`).
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.referee import program

Steps = tuple[tuple[tuple[int, int], ...], ...]
"""Of each step, the sequences and how many tokens of each."""
Edit = Callable[[str, np.ndarray], None]
"""Changes a tensor in place."""

WEIGHTS = ("f32", "f16", "bf16", "q8_0", "q4_0")
SUPER_BLOCKS = ("q4_k", "q6_k", "q5_k", "q3_k", "q2_k", "iq4_xs")
OF_GROUPS = ("fp8", "int4", "int4_f16", "int4_bf16", "int8", "nvfp4")
LATER_WEIGHTS = ("q5_0", "iq4_nl", "mxfp4", "q4_1", "q5_1", *SUPER_BLOCKS, *OF_GROUPS)
"""Types that came later: in cases of their own, so that the others stay what they are."""
KV_TYPES = ("f32", "f16", "q8")
LATER_KV_TYPE = "q4"
"""In cases of its own for the same reason."""


def no_edit(name: str, tensor: np.ndarray) -> None:
    """Leave the tensor as it is."""


@dataclass(frozen=True)
class Case:
    """A model, and tokens that go through it."""

    key: str
    way: str
    config: Mapping[str, Any] | None
    weights: str
    kv_type: str
    steps: Steps
    threads: int = 2
    edit: Edit = no_edit

    @property
    def name(self) -> str:
        """What the test is called."""
        return f"{self.key}, {self.way}"

    def digests(self) -> dict[str, str]:
        """SHA-256 of the logits and of the last hidden states of all tokens, sequence after sequence."""
        count = 1 + max(sequence for step in self.steps for sequence, _ in step)
        lengths = [0] * count
        found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(count)]
        for step in self.steps:
            for sequence, tokens in step:
                lengths[sequence] += tokens
        vocabulary = self.config["vocab_size"] if self.config else program.DEMO_VOCABULARY
        texts = [tokens_of(sequence, length, vocabulary) for sequence, length in enumerate(lengths)]
        most = max(sum(tokens for _, tokens in step) for step in self.steps)
        firsts = [0] * count
        with program.opened(
            self.config, self.weights, self.tensor, self.kv_type, self.threads, count, max(lengths), most
        ) as run:
            for step in self.steps:
                parts = [(s, firsts[s], texts[s][firsts[s] : firsts[s] + tokens]) for s, tokens in step]
                rows = run(parts)
                first = 0
                for sequence, tokens in step:
                    found[sequence].append(tuple(r[first : first + tokens] for r in rows))  # type: ignore[arg-type]
                    firsts[sequence] += tokens
                    first += tokens
        pairs = [pair for sequence in found for pair in sequence]
        return {kind: digest([pair[i] for pair in pairs]) for i, kind in enumerate(("logits", "hidden"))}

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of the model."""
        made = random_tensor(name, shape)
        self.edit(name, made)
        return made


def digest(parts: list[np.ndarray]) -> str:
    """SHA-256 of float32 arrays; all NaNs count as one, since processors make different ones."""
    sha = hashlib.sha256()
    for part in parts:
        values = np.array(part, "<f4")
        values[np.isnan(values)] = np.nan
        sha.update(values.tobytes())
    return sha.hexdigest()


def raw(seed: int, count: int) -> np.ndarray:
    """The generator's own bits, uint64 [count], which no version of NumPy may change."""
    return np.random.PCG64(seed).random_raw(count)


def tokens_of(sequence: int, count: int, vocabulary: int) -> list[int]:
    """Token ids from the whole vocabulary."""
    return [int(bits >> np.uint64(16)) % vocabulary for bits in raw(1000 + sequence, count)]


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers of 18 bits in the shape of a bell, scaled by a power of two.

    Vectors lie around 1 (biases around 0); a matrix gives of inputs of size 1 outputs of about that size, the
    vocabulary's, queries' and keys' somewhat larger ones.
    """
    bits = raw(zlib.crc32(name.encode()), int(np.prod(shape)))
    octets = bits.astype("<u8").view(np.uint8).reshape(-1, 8).astype(np.int64)
    bell = ((octets[:, :7].sum(axis=1) - 892) * 256 + octets[:, 7]).reshape(shape)  # standard deviation 50,000
    if len(shape) == 1:
        return (bell * 2.0**-18 + (0.0 if name.endswith("bias") else 1.0)).astype(np.float32)
    wide = any(part in name for part in ("q_proj", "k_proj", "embed_tokens", "lm_head"))
    return (bell * 2.0 ** (-15 - shape[1].bit_length() // 2 + (-1 if not wide else 0))).astype(np.float32)


# -- steps -----------------------------------------------------------------------------------------------------------


def chunks(count: int, size: int, singly: int = 0) -> Steps:
    """One sequence in chunks, its last tokens one by one."""
    ahead = count - singly
    sizes = [min(size, ahead - first) for first in range(0, ahead, size)] + [1] * singly
    return tuple(((0, n),) for n in sizes)


def company(sequences: int) -> Steps:
    """Sequences that come a few at a time while the others decode; then all decode, some with two tokens."""
    lengths = [66 if s == 0 else 1 + s * 7 % 13 for s in range(sequences)]
    wave = -(-sequences // 4)
    steps: list[list[tuple[int, int]]] = []
    for first in range(0, sequences, wave):
        step = [(s, 1) for s in range(first)] + [(s, lengths[s]) for s in range(first, min(first + wave, sequences))]
        steps.append(step[::-1] if len(steps) % 2 else step)
    every = range(sequences)
    steps += [[(s, 1) for s in every], [(s, 2 if s % 3 == 1 else 1) for s in every], [(s, 1) for s in every]]
    return tuple(map(tuple, steps))


def alone(steps: Steps) -> Steps:
    """The same tokens, one sequence after the other, each in one step."""
    totals: dict[int, int] = {}
    for step in steps:
        for sequence, tokens in step:
            totals[sequence] = totals.get(sequence, 0) + tokens
    return tuple(((sequence, totals[sequence]),) for sequence in sorted(totals))


# -- models ----------------------------------------------------------------------------------------------------------

AWKWARD: Mapping[str, Any] = {
    "model_type": "llama", "hidden_size": 200, "intermediate_size": 344, "num_hidden_layers": 2,
    "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 20, "vocab_size": 101,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
SMALL: Mapping[str, Any] = {
    **AWKWARD, "hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 45,
}  # fmt: skip
WIDE: Mapping[str, Any] = {
    **SMALL, "hidden_size": 512, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 1,
}  # fmt: skip
LONG: Mapping[str, Any] = {
    **AWKWARD, "model_type": "mistral", "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 33, "sliding_window": None,
}  # fmt: skip
EXPERTS: Mapping[str, Any] = {"num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 72}
LATENT: Mapping[str, Any] = {
    **SMALL, "num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 40, "kv_lora_rank": 72,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 10, "v_head_dim": 20, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 72, "first_k_dense_replace": 1,
}  # fmt: skip
INDEXED: Mapping[str, Any] = {"index_n_heads": 19, "index_head_dim": 40, "index_topk": 17}
INDEXER_TYPES = ["full", "shared", "full"]
DELTA: Mapping[str, Any] = {
    **SMALL, "num_attention_heads": 6, "head_dim": 24, "rms_norm_eps": 1e-6, "linear_num_key_heads": 3,
    "linear_num_value_heads": 6, "linear_key_head_dim": 20, "linear_value_head_dim": 36,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
BLOCK_SPARSE: Mapping[str, Any] = {
    **SMALL, "model_type": "minimax_m3_vl_text", "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 24,
    "partial_rotary_factor": 0.5, "rotary_dim": 12, "index_n_heads": 2, "index_head_dim": 20,
    "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"], "num_local_experts": 9, "num_experts_per_tok": 3,
    "intermediate_size": 72, "dense_intermediate_size": 100, "shared_intermediate_size": 40,
}  # fmt: skip
SHARED: Mapping[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 40}
QWEN: Mapping[str, Any] = {**SMALL, "head_dim": 24, "rms_norm_eps": 1e-6, "rope_theta": 1e6}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    """A configuration's words for scaled RoPE."""
    return {"rope_scaling": {"rope_type": kind, **fields}}


FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {**SMALL, "tie_word_embeddings": True},
    "llama with llama3's RoPE": {
        **SMALL,
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    },
    "llama with YaRN": {**SMALL, **rope("yarn", factor=4.0, original_max_position_embeddings=32)},
    "llama with linear RoPE": {**SMALL, **rope("linear", factor=4.0)},
    "llama with biases": {**SMALL, "attention_bias": True, "mlp_bias": True},
    "mistral with a window": {**SMALL, "model_type": "mistral", "sliding_window": 11},
    "mixtral": {
        **SMALL, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None,
    },
    "qwen2": {**QWEN, "model_type": "qwen2", "num_attention_heads": 6},
    "qwen2 with a window": {
        **QWEN, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1,
    },
    "qwen3": {**QWEN, "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3 with biases": {**QWEN, "model_type": "qwen3", "attention_bias": True},
    "qwen3_moe": {**QWEN, **EXPERTS, "model_type": "qwen3_moe", "norm_topk_prob": True},
    "qwen3_moe without renormalising": {**QWEN, **EXPERTS, "model_type": "qwen3_moe", "norm_topk_prob": False},
    "seed_oss": {**QWEN, "model_type": "seed_oss", "attention_out_bias": True},
    "olmo2": {**SMALL, "model_type": "olmo2", "num_attention_heads": 6, "num_key_value_heads": 3},
    "granite": {
        **SMALL, "model_type": "granite", "attention_multiplier": 0.2, "embedding_multiplier": 5.0,
        "residual_multiplier": 0.22, "logits_scaling": 3.0,
    },
    "smollm3": {**SMALL, "model_type": "smollm3", "no_rope_layers": [1, 0]},
    "ministral": {
        **SMALL, "model_type": "ministral", "sliding_window": 11,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "ministral3": {
        **SMALL, "model_type": "ministral3",
        **rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.3),
    },
    "phi3": {**SMALL, "model_type": "phi3", "partial_rotary_factor": 0.7, "sliding_window": 30},
    "gemma2": {
        **SMALL, "model_type": "gemma2", "query_pre_attn_scalar": 20, "sliding_window": 13,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        **SMALL, "model_type": "gemma3_text", "query_pre_attn_scalar": 20, "sliding_window": 13,
        "sliding_window_pattern": 2, "rope_local_base_freq": 100.0, **rope("linear", factor=4.0),
    },
}  # fmt: skip
LATER_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "hy_v3": {**QWEN, **EXPERTS, "model_type": "hy_v3", "num_attention_heads": 6},
    "glm4_moe": {
        **QWEN, **EXPERTS, "model_type": "glm4_moe", "attention_bias": True, "use_qk_norm": True, "n_group": 3,
        "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5,
    },
    "glm4_moe without norms and groups": {
        **QWEN, **EXPERTS, "model_type": "glm4_moe", "attention_bias": True, "n_shared_experts": 1,
        "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
    },
    "gpt_oss": {
        **QWEN, **EXPERTS, "model_type": "gpt_oss", "num_attention_heads": 6, "sliding_window": 20,
        **rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False),
    },
    "minimax_m2": {**QWEN, **EXPERTS, "model_type": "minimax_m2", "num_attention_heads": 6, "rotary_dim": 16},
    "minimax_m3_vl_text": {
        **BLOCK_SPARSE, "index_block_size": 64, "index_topk_blocks": 1, "index_local_blocks": 0,
    },
    "deepseek_v3": {
        **LATENT, "model_type": "deepseek_v3",
        **rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0),
    },
    "kimi_k2": {**LATENT, "model_type": "kimi_k2", "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "deepseek_v32": {
        **LATENT, **INDEXED, "model_type": "deepseek_v32",
        **rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0),
    },
    "glm_moe_dsa": {
        **LATENT, **INDEXED, "model_type": "glm_moe_dsa", "num_hidden_layers": 3, "indexer_types": INDEXER_TYPES,
        "n_group": 1, "topk_group": 1,
    },
    "llama4_text": {
        **QWEN, "model_type": "llama4_text", "num_local_experts": 9, "num_experts_per_tok": 2, "intermediate_size": 72,
        "intermediate_size_mlp": 100, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0],
        "attention_chunk_size": 20, "floor_scale": 16, "attn_scale": 0.3,
    },
    "qwen3_next": {**DELTA, **SHARED, "model_type": "qwen3_next"},
    "qwen3_5_text": {**DELTA, "model_type": "qwen3_5_text", "linear_num_value_heads": 3},
    "qwen3_5_moe_text": {**DELTA, **SHARED, "model_type": "qwen3_5_moe_text"},
}  # fmt: skip

# -- special values --------------------------------------------------------------------------------------------------


def scaled(power: int, *modules: str) -> Edit:
    """Some modules' tensors times a power of two."""

    def edit(name: str, tensor: np.ndarray) -> None:
        if any(module in name for module in modules):
            tensor *= np.float32(2.0**power)

    return edit


def odd_head(name: str, tensor: np.ndarray) -> None:
    """Not a number, infinities, zeros and numbers too large for float16 in some rows of the head."""
    if name == "lm_head.weight":
        tensor[5, 3], tensor[7, 40], tensor[8, 71] = np.nan, np.inf, -np.inf
        tensor[11], tensor[13] = 0.0, -0.0
        tensor[20:23] *= np.float32(2.0**30)
        tensor[24:26] *= np.float32(2.0**-30)
        tensor[27] = np.float32(0.5)


def odd_tokens(name: str, tensor: np.ndarray) -> None:
    """Tokens of zeros, of tiny numbers, of zeros in part, and a late one of numbers that only float32 holds."""
    if name == "model.embed_tokens.weight":
        text = tokens_of(0, 30, len(tensor))
        tensor[text[2]] = tensor[text[3]] = 0.0
        tensor[text[5]] *= np.float32(2.0**-60)
        tensor[text[7], 50:] = 0.0
        tensor[text[18], :40] *= np.float32(2.0**60)


def odd_router(name: str, tensor: np.ndarray) -> None:
    """Experts that are chosen alike, and one whose logit may not be a number."""
    if name.endswith("mlp.gate.weight"):
        tensor[3] = tensor[1]
        tensor[4] = tensor[0]
        if ".1." in name:
            tensor[2, 7] = np.inf


def zero_rows(name: str, tensor: np.ndarray) -> None:
    """Rows and whole blocks of zeros in every matrix, no gate at all in the second layer."""
    if tensor.ndim == 2:
        tensor[::5] = 0.0
        tensor[:, 32:64] = 0.0
    if "layers.1.mlp.gate_proj" in name:
        tensor[:] = 0.0


def large(*modules: str) -> Edit:
    """Large numbers from some modules, and in the last layer a channel that float16 holds for some tokens only."""

    def edit(name: str, tensor: np.ndarray) -> None:
        if any(module in name for module in modules):
            tensor *= np.float32(2.0**8)
            if "layers.1." in name:
                tensor[1] *= np.float32(2.0**7)

    return edit


def overflow(name: str, tensor: np.ndarray) -> None:
    """One channel of the last layer's MLP is infinite or zero, as its gate is open or shut."""
    if "layers.1.mlp.gate_proj" in name or "layers.1.mlp.up_proj" in name:
        tensor[3] *= np.float32(2.0**14)
    if "layers.1.post_attention_layernorm" in name:
        tensor *= np.float32(2.0**53)


def beyond_grid(name: str, tensor: np.ndarray) -> None:
    """Sums of more than 2^22, from weights that float16 holds."""
    if "v_proj" in name or "up_proj" in name:
        tensor *= np.float32(2.0**8)
    if "o_proj" in name or "down_proj" in name:
        tensor *= np.float32(2.0**16)


NORMS = ("layernorm", "model.norm")
SPECIAL: Mapping[str, Edit] = {
    "odd rows in the head": odd_head,
    "odd tokens": odd_tokens,
    "zero rows": zero_rows,
    "activations of 1e30": scaled(100, "model.norm"),
    "activations of 1e12 in attention": scaled(40, "input_layernorm"),
    "activations of 1e30 in the MLP": scaled(50, "post_attention_layernorm"),
    "overflow in the MLP": overflow,
    "nothing but overflow": scaled(110, *NORMS),
    "small activations": scaled(-100, *NORMS),
    "tiny activations": scaled(-130, *NORMS),
    "tiny weights": scaled(-18, "_proj.weight"),
    "large keys": large("k_proj.weight"),
    "large values": large("v_proj.weight"),
    "sums beyond the grid": beyond_grid,
}


# -- the cases -------------------------------------------------------------------------------------------------------


def all_cases() -> list[Case]:
    """Every case; their names differ."""
    makers = (demo, awkward, heads, panels, mixed_types, families, batches, experts, long_context, special, later)
    makers += (later_cache, block_sparse)
    return [case for make in makers for case in make()]


def each_way(key: str, ways: Mapping[str, tuple[Steps, int]], **model: Any) -> Iterator[Case]:
    """One digest that several steps and numbers of threads must give."""
    for way, (steps, threads) in ways.items():
        yield Case(key, way, steps=steps, threads=threads, **model)


def in_chunks(count: int, *sizes: tuple[int, int], singly: int = 0) -> dict[str, tuple[Steps, int]]:
    """Ways of (chunk, threads)."""
    return {
        f"chunk {size}, {threads} thread{'s' * (threads > 1)}": (
            chunks(count, size, singly if size > 1 else 0),
            threads,
        )
        for size, threads in sizes
    }


def demo() -> Iterator[Case]:
    """The model in data/, which is q8_0."""
    model = {"config": None, "weights": "as-stored"}
    yield from each_way("demo, KV f16", in_chunks(150, (256, 2), (7, 1), (64, 3), singly=6), kv_type="f16", **model)
    for kv_type in ("f32", "q8"):
        yield from each_way(f"demo, KV {kv_type}", in_chunks(70, (256, 2)), kv_type=kv_type, **model)


def awkward() -> Iterator[Case]:
    """Sizes that divide by nothing, in every weight and KV type."""
    for weights in WEIGHTS:
        for kv_type in KV_TYPES:
            ways = in_chunks(75, (256, 2), (7, 1), singly=3)
            if kv_type == "f16":
                ways |= in_chunks(75, (1, 2), (64, 3))
            yield from each_way(
                f"awkward {weights}, KV {kv_type}", ways, config=AWKWARD, weights=weights, kv_type=kv_type
            )
        yield from each_way(
            f"awkward {weights}, 300 tokens", in_chunks(300, (256, 2), (64, 1)), config=AWKWARD, weights=weights,
            kv_type="f16",
        )  # fmt: skip


def heads() -> Iterator[Case]:
    """Widths of heads, and query heads for each KV head, up to more than a group of 16."""
    shapes = ((8, 3, 3), (48, 3, 1), (80, 5, 1), (96, 7, 1), (128, 4, 2), (2, 18, 1), (64, 20, 1), (34, 33, 1))
    for i, (head_dim, query, kv) in enumerate(shapes):
        config = {
            **SMALL, "hidden_size": (72, 100, 33, 31)[i % 4], "head_dim": head_dim, "num_attention_heads": query,
            "num_key_value_heads": kv, "num_hidden_layers": 1,
        }  # fmt: skip
        for j, kv_type in enumerate(KV_TYPES):
            weights = WEIGHTS[(i + 2 * j) % len(WEIGHTS)]
            key = f"{query} heads of {head_dim} on {kv}, {weights}, KV {kv_type}"
            yield from each_way(
                key, in_chunks(70, (64, 2), (7, 1), singly=2), config=config, weights=weights, kv_type=kv_type
            )


def panels() -> Iterator[Case]:
    """Panels of 128, 64 and 32 columns, and vocabularies that fill no group of 16."""
    shapes = ((256, 16), (384, 17), (192, 15), (320, 33), (96, 1), (33, 100), (5, 130), (160, 96))
    for i, (inner, vocabulary) in enumerate(shapes):
        config = {**SMALL, "intermediate_size": inner, "vocab_size": vocabulary, "num_hidden_layers": 1}
        for j in range(3):
            weights = WEIGHTS[(i + 2 * j) % len(WEIGHTS)]
            key = f"FFN of {inner}, vocabulary of {vocabulary}, {weights}"
            yield from each_way(
                key, in_chunks(40, (256, 2), (17, 3), singly=2), config=config, weights=weights, kv_type="f16"
            )


def mixed_types() -> Iterator[Case]:
    """Matrices of several types in one model."""
    for weights in (
        "q4_0 lm_head=q8_0 embed_tokens=f16 down_proj=q8_0",
        "q8_0 o_proj=bf16 down_proj=f32 lm_head=f16",
        "f16 o_proj=q8_0 down_proj=q4_0 embed_tokens=q4_0",
        "q4_0 v_proj=q8_0 up_proj=q8_0",
        "bf16 gate_proj=q8_0 q_proj=q8_0",
    ):
        yield from each_way(
            f"mixed {weights}", in_chunks(40, (256, 2), (7, 1), singly=2), config=SMALL, weights=weights, kv_type="f16"
        )


def families() -> Iterator[Case]:
    """Every family in every weight type; of those that came later the place in the list does not matter."""
    numbered = [*enumerate(FAMILIES.items()), *((len(name), (name, c)) for name, c in LATER_FAMILIES.items())]
    for i, (family, config) in numbered:
        for j, weights in enumerate(WEIGHTS):
            kv_type = KV_TYPES[(i + j) % len(KV_TYPES)]
            yield from each_way(
                f"{family}, {weights}, KV {kv_type}", in_chunks(70, (256, 2), (13, 1), singly=2), config=config,
                weights=weights, kv_type=kv_type,
            )  # fmt: skip


def batches() -> Iterator[Case]:
    """Sequences at different positions in one step, some with prompts and some with single tokens."""
    for i, count in enumerate((1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 40)):
        for j, weights in enumerate(WEIGHTS):
            if j in (i % 5, (i + 3) % 5) or count in (2, 17, 40):
                kv_type, steps = KV_TYPES[(i + j) % len(KV_TYPES)], company(count)
                ways = {"together": (steps, 2)}
                if count in (5, 17):
                    ways |= {"alone": (alone(steps), 1), "together, 3 threads": (steps, 3)}
                yield from each_way(
                    f"{count} sequences, {weights}, KV {kv_type}", ways, config=SMALL, weights=weights, kv_type=kv_type
                )


def experts() -> Iterator[Case]:
    """Steps of one token, of two, and of so many that an expert has more than a tile of 16."""
    for family in ("mixtral", "qwen3_moe"):
        for weights in WEIGHTS:
            ways = in_chunks(80, (1, 2), (2, 1), (17, 3), (40, 2))
            yield from each_way(
                f"experts of {family}, {weights}", ways, config=FAMILIES[family], weights=weights, kv_type="f16"
            )
    few = {**FAMILIES["mixtral"], "num_local_experts": 2, "num_experts_per_tok": 2}
    yield from each_way(
        "two experts of two, q4_0", in_chunks(40, (40, 2), (1, 2)), config=few, weights="q4_0", kv_type="f16"
    )
    for weights in ("f32", "q8_0"):
        yield from each_way(
            f"experts with equal and infinite logits, {weights}", in_chunks(40, (40, 2), (1, 1)),
            config=FAMILIES["qwen3_moe"], weights=weights, kv_type="f16", edit=odd_router,
        )  # fmt: skip


def long_context() -> Iterator[Case]:
    """Past two spans of 1,024 positions, with windows that end inside a block, inside a span, and beyond one."""
    for window in (None, 100, 1500):
        for kv_type, weights in zip(KV_TYPES, ("f32", "q8_0", "q4_0"), strict=True):
            ways = in_chunks(2150, (256, 2), singly=5)
            if kv_type == "f16":
                ways |= in_chunks(2150, (300, 3))
            yield from each_way(
                f"2150 positions, window {window}, {weights}, KV {kv_type}", ways,
                config={**LONG, "sliding_window": window}, weights=weights, kv_type=kv_type,
            )  # fmt: skip
    steps = (((0, 1020),), ((0, 3), (1, 1000)), *[((0, 1), (1, 27)), ((1, 1), (0, 1))] * 3)
    for kv_type in KV_TYPES:
        yield Case(
            f"two long sequences, KV {kv_type}", "together", {**LONG, "num_hidden_layers": 1}, "q8_0", kv_type, steps
        )


def special() -> Iterator[Case]:
    """Numbers at the ends of their types."""
    for i, (what, edit) in enumerate(SPECIAL.items()):
        for j, weights in enumerate(WEIGHTS):
            kv_types = KV_TYPES if "large" in what or "attention" in what else (KV_TYPES[(i + j) % len(KV_TYPES)],)
            for kv_type in kv_types:
                yield from each_way(
                    f"{what}, {weights}, KV {kv_type}", in_chunks(30, (256, 2), (1, 1)), config=SMALL, weights=weights,
                    kv_type=kv_type, edit=edit,
                )  # fmt: skip
    window = {**SMALL, "model_type": "mistral", "sliding_window": 5}
    for weights in WEIGHTS:
        yield from each_way(
            f"odd tokens that leave the window, {weights}", in_chunks(80, (256, 2), (7, 1)), config=window,
            weights=weights, kv_type="f16", edit=odd_tokens,
        )  # fmt: skip


def later() -> Iterator[Case]:
    """Sizes that divide by nothing, experts, and numbers at the ends of their types, in the types that came later."""
    for i, weights in enumerate(LATER_WEIGHTS):
        kv_type = KV_TYPES[i % len(KV_TYPES)]
        yield from each_way(
            f"awkward {weights}, KV {kv_type}", in_chunks(75, (256, 2), (7, 1), (1, 2), (64, 3), singly=3),
            config=AWKWARD, weights=weights, kv_type=kv_type,
        )  # fmt: skip
        yield from each_way(
            f"qwen3_moe, {weights}", in_chunks(40, (40, 2), (1, 2)), config=FAMILIES["qwen3_moe"], weights=weights,
            kv_type="f16",
        )  # fmt: skip
        for what, edit in SPECIAL.items():
            yield from each_way(
                f"{what}, {weights}", in_chunks(30, (256, 2), (1, 1)), config=SMALL, weights=weights, kv_type="f16",
                edit=edit,
            )  # fmt: skip
    for weights in (*SUPER_BLOCKS, *OF_GROUPS):
        yield from each_way(
            f"rows of whole super-blocks, {weights}", in_chunks(40, (40, 2), (7, 1), (1, 2)), config=WIDE,
            weights=weights, kv_type="f16",
        )  # fmt: skip


def later_cache() -> Iterator[Case]:
    """Widths of heads, latents, windows, company, spans, and numbers at the ends of their types, in 4 bits."""
    kv_type = LATER_KV_TYPE
    yield from each_way("demo, KV q4", in_chunks(70, (256, 2)), config=None, weights="as-stored", kv_type=kv_type)
    for weights in ("f32", "q8_0", "q4_0"):
        yield from each_way(
            f"awkward {weights}, KV q4", in_chunks(75, (256, 2), (7, 1), (1, 2), (64, 3), singly=3), config=AWKWARD,
            weights=weights, kv_type=kv_type,
        )  # fmt: skip
    for head_dim, query, kv in ((8, 3, 3), (80, 5, 1), (96, 7, 1), (128, 4, 2), (64, 20, 1)):
        config = {
            **SMALL, "head_dim": head_dim, "num_attention_heads": query, "num_key_value_heads": kv,
            "num_hidden_layers": 1,
        }  # fmt: skip
        yield from each_way(
            f"{query} heads of {head_dim} on {kv}, f32, KV q4", in_chunks(70, (64, 2), (7, 1), singly=2), config=config,
            weights="f32", kv_type=kv_type,
        )  # fmt: skip
    for family in ("deepseek_v3", "kimi_k2", "gpt_oss", "qwen3_next", "llama4_text"):
        yield from each_way(
            f"{family}, q8_0, KV q4", in_chunks(70, (256, 2), (13, 1), singly=2), config=LATER_FAMILIES[family],
            weights="q8_0", kv_type=kv_type,
        )  # fmt: skip
    for count in (5, 17):
        steps = company(count)
        yield from each_way(
            f"{count} sequences, q8_0, KV q4", {"together": (steps, 2), "alone": (alone(steps), 1)}, config=SMALL,
            weights="q8_0", kv_type=kv_type,
        )  # fmt: skip
    for window in (None, 100, 1500):
        yield from each_way(
            f"2150 positions, window {window}, q8_0, KV q4", in_chunks(2150, (256, 2), (300, 3), singly=5),
            config={**LONG, "sliding_window": window}, weights="q8_0", kv_type=kv_type,
        )  # fmt: skip
    for what in ("odd tokens", "activations of 1e12 in attention", "tiny activations", "large keys", "large values"):
        yield from each_way(
            f"{what}, q8_0, KV q4", in_chunks(30, (256, 2), (1, 1)), config=SMALL, weights="q8_0", kv_type=kv_type,
            edit=SPECIAL[what],
        )  # fmt: skip


def block_sparse() -> Iterator[Case]:
    """Blocks that are chosen among many, of one span and of several, and a sequence that need not choose beside one."""
    few = {**BLOCK_SPARSE, "index_block_size": 64, "index_topk_blocks": 2, "index_local_blocks": 1}
    for kv_type in (*KV_TYPES, LATER_KV_TYPE):
        yield from each_way(
            f"two blocks of 64, f32, KV {kv_type}", in_chunks(330, (512, 2), (100, 3), (7, 1), singly=3), config=few,
            weights="f32", kv_type=kv_type,
        )  # fmt: skip
    steps: Steps = (((0, 290), (1, 30)), ((0, 1), (1, 1)), ((1, 120), (0, 1)), ((0, 1), (1, 1)))
    yield from each_way(
        "two blocks of 64, two sequences, q8_0", {"together": (steps, 2), "alone": (alone(steps), 1)}, config=few,
        weights="q8_0", kv_type="f16",
    )  # fmt: skip
    long = {
        **few, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 3, "num_key_value_heads": 1,
        "index_n_heads": 1, "layer_types": ["minimax_m3_sparse"], "mlp_layer_types": ["dense"],
    }  # fmt: skip
    for block, chosen, kv_type in ((128, 4, "f16"), (256, 3, "q8"), (1024, 2, "q4"), (64, 9, "f32")):
        yield from each_way(
            f"{chosen} blocks of {block}, 2150 positions, KV {kv_type}", in_chunks(2150, (256, 2), (300, 3), singly=5),
            config={**long, "index_block_size": block, "index_topk_blocks": chosen}, weights="f32", kv_type=kv_type,
        )  # fmt: skip
