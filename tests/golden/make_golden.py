"""Tiny random models, their logits, and rendered chat templates, all by the transformers library: the tests' truth.

Run it in an environment with torch, transformers and jinja2 (versions: README.md), from the root of the repository:

    python tests/golden/make_golden.py [NAME …]

It rewrites the models of these names, or everything in this folder but the texts written by hand (README.md,
chat_templates/*.jinja and chat_templates/conversations.json). CI does not run it.
"""

import json
import sys
import zlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from jinja2.exceptions import TemplateError
from tokenizers import decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
VOCAB = 272
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BOS, EOS = VOCAB - 5, (VOCAB - 4, VOCAB - 1)
CONTINUATION = 8  # tokens chosen greedily after the prompt
TEXT = ["the cat sat on the mat", "the dog and the other dog"] * 4
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": list(EOS),
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@dataclass(frozen=True)
class Family:
    """What is special about one model; `weights_of` names another one whose weights it shares.

    `called` is its model_type for models that are published under another name than their class has in transformers.
    """

    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    prompt: int = 12
    norms: float = 1.0  # about which the weights of norms lie
    weights_of: str = ""
    called: str = ""


def rope(rope_type: str, theta: float = 10000.0, **constants: float) -> dict[str, Any]:
    """A `rope_parameters` entry."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta} | constants}


LLAMA3_ROPE = rope(  # of the 8 frequencies one stays, two are smoothed, five are divided
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN_ROPE = rope("yarn", 100.0, factor=2.0, original_max_position_embeddings=256)  # 8 frequencies, 6 within the ramp

LLAMA4: Mapping[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "interleave_moe_layer_step": 2,
}
PHI_LONG: Mapping[str, Any] = {
    "num_hidden_layers": 2,
    "pad_token_id": EOS[0],
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0, 1.3, 2.7],
        "long_factor": [1.1, 3.1, 9.3],
    },
}
YARN_MAGNITUDES = rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=128, mscale=0.6, mscale_all_dim=0.6)
LATENT: Mapping[str, Any] = {  # heads that no number of ranks divides, groups of experts, an expert of no whole panels
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": True,
}

INDEXED: Mapping[str, Any] = LATENT | {  # of 24 positions 5 are seen
    "index_n_heads": 11,  # with few of them many scores are 0
    "index_head_dim": 20,
    "index_topk": 5,
}

DELTA: Mapping[str, Any] = {  # seven groups of two heads in both kinds of layers, of which RoPE turns 4 channels
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 14,
    "num_key_value_heads": 7,
    "head_dim": 16,
    "linear_num_key_heads": 7,
    "linear_num_value_heads": 14,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
}
DELTA_MOE: Mapping[str, Any] = DELTA | {
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 24,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", {"head_dim": 16}, torch.float32, prompt=16),
    "llama_yarn": Family("llama", {"head_dim": 16} | YARN_ROPE, torch.float32, prompt=16, weights_of="llama"),
    "llama_linear": Family(
        "llama", {"head_dim": 16} | rope("linear", factor=4.0), torch.float32, prompt=16, weights_of="llama"
    ),
    "llama3": Family("llama", {"head_dim": 16, "tie_word_embeddings": True} | LLAMA3_ROPE, prompt=16),
    "llama_bias": Family("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": Family("mistral", {"sliding_window": 8, "tie_word_embeddings": True}, torch.float16, prompt=16),
    "qwen2": Family("qwen2", {"use_sliding_window": False, "sliding_window": 8, "tie_word_embeddings": True}),
    "qwen3": Family("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "seed_oss": Family("seed_oss", {"head_dim": 16, "attention_out_bias": True, "tie_word_embeddings": True}),
    "olmo2": Family("olmo2", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}, torch.float32),
    "granite": Family(
        "granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
        torch.float32,
    ),
    "smollm3": Family(
        "smollm3",
        {"num_hidden_layers": 4, "intermediate_size": 40, "pad_token_id": EOS[0]},
        torch.float32,
        prompt=16,
    ),
    "ministral": Family(
        "ministral",
        {"head_dim": 12, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        torch.float16,
        prompt=16,
    ),
    "ministral3": Family(
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 2.0,
                "original_max_position_embeddings": 6,
                "max_position_embeddings": 512,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.4,
            },
        },
        torch.float32,
        prompt=16,
    ),
    "phi3": Family(
        "phi3",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 48,
            "sliding_window": 9,
            "pad_token_id": EOS[0],
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 512,
        },
        torch.float32,
        prompt=16,
    ),
    "phi3_longrope": Family("phi3", PHI_LONG | {"original_max_position_embeddings": 256}, prompt=16),
    "phi3_beyond": Family(
        "phi3", PHI_LONG | {"original_max_position_embeddings": 8}, prompt=16, weights_of="phi3_longrope"
    ),
    "gemma2": Family(
        "gemma2",
        {
            "num_hidden_layers": 3,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 9.0,
            "pad_token_id": EOS[0],
        },
        torch.float32,
        prompt=16,
        norms=0.0,
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "sliding_window_pattern": 3,
            "pad_token_id": EOS[0],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        torch.float32,
        prompt=16,
        norms=0.0,
    ),
    "llama4": Family(
        "llama4_text", LLAMA4 | {"attention_chunk_size": 6, "floor_scale": 4, "attn_scale": 0.5}, prompt=16
    ),
    "llama4_usual": Family("llama4_text", LLAMA4, prompt=16, weights_of="llama4"),
    "mixtral": Family("mixtral", {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family(
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "tie_word_embeddings": True,
        },
    ),
    "hy_v3": Family(
        "hy_v3",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 7,  # no number of ranks divides them
            "num_key_value_heads": 7,
            "head_dim": 8,
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_moe": Family(
        "glm4_moe",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 14,
            "num_key_value_heads": 7,
            "head_dim": 12,  # of which RoPE turns 6
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 10,
            "n_group": 5,
            "topk_group": 3,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "tie_word_embeddings": True,
        },
    ),
    "minimax_m2": Family(
        "minimax_m2",
        {
            "num_attention_heads": 14,
            "num_key_value_heads": 7,
            "head_dim": 12,
            "rotary_dim": 8,
            "intermediate_size": 40,
            "num_local_experts": 9,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
        },
    ),
    "minimax_m3": Family(
        "minimax_m3_vl_text",
        {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_attention_heads": 14,
            "num_key_value_heads": 7,
            "head_dim": 12,
            "rotary_dim": 6,
            "partial_rotary_factor": 0.5,
            "intermediate_size": 40,
            "dense_intermediate_size": 56,
            "shared_intermediate_size": 40,
            "num_local_experts": 9,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.7,
            "index_n_heads": 7,
            "index_head_dim": 10,
            "index_block_size": 64,
            "index_topk_blocks": 2,
            "tie_word_embeddings": True,
        },
        prompt=264,  # the last tokens choose two of five blocks
        norms=0.0,
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 14,
            "num_key_value_heads": 7,
            "head_dim": 12,
            "intermediate_size": 40,
            "num_local_experts": 9,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "tie_word_embeddings": True,
        }
        | rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=4.0, truncate=False),
        prompt=24,
    ),
    "deepseek_v3": Family("deepseek_v3", LATENT | YARN_MAGNITUDES),
    "kimi_k2": Family(
        "deepseek_v3",
        LATENT
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "n_routed_experts": 6},
        called="kimi_k2",
    ),
    "deepseek_v32": Family("deepseek_v32", INDEXED | YARN_MAGNITUDES, prompt=24),
    "glm_moe_dsa": Family(  # the third and fourth layer see what the second does
        "glm_moe_dsa",
        INDEXED
        | {"num_hidden_layers": 5, "index_topk_freq": 3, "index_n_heads": 19, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 2},
        prompt=24,
    ),
    "qwen3_next": Family("qwen3_next", DELTA_MOE, prompt=24, norms=0.0),
    "qwen3_5": Family("qwen3_5_text", DELTA | {"tie_word_embeddings": True}, prompt=24, norms=0.0),
    "qwen3_5_moe": Family(
        "qwen3_5_moe_text", DELTA_MOE | {"linear_num_key_heads": 3, "linear_num_value_heads": 9}, prompt=24, norms=0.0
    ),
}


def main() -> None:
    """Write the models that are named, or everything anew."""
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        write_family(name, FAMILIES[name])
    if sys.argv[1:]:
        return
    write_tokenizer(HERE / "tokenizer")
    for name, family in FAMILIES.items():
        write_family(name, family)
    write_renderings(HERE / "chat_templates")
    write_config_fields(HERE / "config_fields.json")


def write_family(name: str, family: Family) -> None:
    """Save one model, its tokenizer (a link) and its logits for a prompt."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model = random_model(family)
    save_model(model, family, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        link(folder / file, Path("..") / "tokenizer" / file)
    prompt = random_prompt(name, family.prompt)
    np.savez_compressed(
        folder / "golden.npz",
        ids=np.array(prompt, np.int32),
        logits=logits(model, prompt),
        continuation=np.array(continuation(model, prompt), np.int32),
        **chosen_experts(model, prompt),
        **chosen_positions(model, prompt),
    )


def random_model(family: Family) -> transformers.PreTrainedModel:
    """A float32 model whose weights are exact in the family's dtype."""
    # A copy, since some configurations write into what they are given.
    config = transformers.AutoConfig.for_model(family.model_type, **deepcopy(SIZES | family.options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        corrections = [pair for pair in model.named_buffers() if "correction" in pair[0]]
        for name, parameter in [*model.named_parameters(), *corrections]:
            values = torch.from_numpy(random_values(name, tuple(parameter.shape), family.norms))
            parameter.copy_(values.to(family.dtype).float())
    return model.eval()


def random_values(name: str, shape: tuple[int, ...], norms: float) -> np.ndarray:
    """Larger than what training starts from, so that every mistake shows in the logits."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if name.endswith("A_log"):  # some heads forget at once, others hardly
        return 2 * normal - 1
    if "conv1d" in name:
        return 0.5 * normal
    if "linear_attn.norm" in name:
        return 1 + 0.3 * normal
    if "norm" in name:
        return norms + 0.3 * normal
    if name.endswith("gate_up_proj_bias"):  # some are beyond the limits of 7
        return 5 * normal
    # Routers that hardly hesitate, biases of the size of values.
    if name.endswith(("mlp.gate.weight", "router.weight", "bias")):
        return 0.5 * normal
    return 0.2 * normal


def save_model(model: transformers.PreTrainedModel, family: Family, folder: Path) -> None:
    """Write config.json and model.safetensors, in the family's dtype; the model stays float32."""
    stored = transformers.AutoModelForCausalLM.from_config(model.config, dtype=family.dtype)
    stored.load_state_dict(model.state_dict())
    (folder / "model.safetensors").unlink(missing_ok=True)
    stored.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if family.called:
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace(f'"{family.model_type}"', f'"{family.called}"'))
    if family.weights_of:
        same = Path("..") / family.weights_of / "model.safetensors"
        assert (folder / same).read_bytes() == (folder / "model.safetensors").read_bytes()
        link(folder / "model.safetensors", same)


def link(path: Path, target: Path) -> None:
    """A relative symbolic link, in place of what is there."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def random_prompt(name: str, length: int) -> list[int]:
    """BOS and different ordinary tokens."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return [BOS, *rng.permutation(VOCAB - len(SPECIAL))[: length - 1].tolist()]


def logits(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] of the whole prompt at once, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def chosen_experts(model: transformers.PreTrainedModel, ids: list[int]) -> dict[str, np.ndarray]:
    """`experts`, uint8 [layers with a router, tokens, chosen]: which experts each token takes, in ascending order."""
    chosen: list[np.ndarray] = []
    kinds = ("topkrouter", "llama4router")
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith(kinds)]

    def note(module: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
        taken = outputs[2] if len(outputs) > 2 else outputs[0].topk(module.top_k)[1]  # Llama 4's has scores of all
        chosen.append(taken.sort(dim=-1)[0].numpy())

    hooks = [router.register_forward_hook(note) for router in routers]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return {"experts": np.stack(chosen).astype(np.uint8)} if chosen else {}


def chosen_positions(model: transformers.PreTrainedModel, ids: list[int]) -> dict[str, np.ndarray]:
    """`positions`, uint8 [layers with an indexer, tokens, chosen], ascending; early tokens have later ones, too."""
    chosen: list[np.ndarray] = []
    indexers = [module for module in model.modules() if type(module).__name__.endswith("Indexer")]
    hooks = [
        indexer.register_forward_hook(lambda module, inputs, output: chosen.append(output[0].sort(dim=-1)[0].numpy()))
        for indexer in indexers
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return {"positions": np.stack(chosen).astype(np.uint8)} if chosen else {}


def continuation(model: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    """The most likely token, again and again."""
    ids = list(prompt)
    for _ in range(CONTINUATION):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer as Llama 3's, special tokens last, and its tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = VOCAB - len(SPECIAL)
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens(list(SPECIAL))
    assert bpe.token_to_id(SPECIAL[0]) == BOS
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "bos_token": SPECIAL[0],
        "chat_template": CHAT_TEMPLATE,
        "eos_token": SPECIAL[-1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_config_fields(path: Path) -> None:
    """What each configuration class has beside what all have, with the defaults: {model_type: {field: value}}."""
    of_all = set(transformers.PreTrainedConfig().to_dict())
    types = dict.fromkeys(family.model_type for family in FAMILIES.values())
    fields = {
        name: {
            key: value for key, value in transformers.AutoConfig.for_model(name).to_dict().items() if key not in of_all
        }
        for name in sorted(types)
    }
    path.write_text(json.dumps(fields, indent=1) + "\n")


def write_renderings(folder: Path) -> None:
    """Render every conversation with every template: {template: {conversation: text, or null if refused}}."""
    conversations = json.loads((folder / "conversations.json").read_text())
    rendered = {
        path.stem: {name: render(path.read_text(), conversation) for name, conversation in conversations.items()}
        for path in sorted(folder.glob("*.jinja"))
    }
    (folder / "expected.json").write_text(json.dumps(rendered, indent=1, ensure_ascii=False) + "\n")


def render(template: str, conversation: Mapping[str, Any]) -> str | None:
    """What transformers makes of a conversation, None if the template refuses it."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    try:
        return str(tokenizer.apply_chat_template(chat_template=template, tokenize=False, **conversation))
    except (TemplateError, TypeError):
        return None


if __name__ == "__main__":
    main()
