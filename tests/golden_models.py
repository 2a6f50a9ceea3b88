"""The tiny checkpoints of tests/golden, and the same weights written in the other formats."""

import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from mpillama.formats.checkpoint import Checkpoint, StoredTensor
from mpillama.formats.foreign import PathSource
from mpillama.formats.hugging_face import read_hugging_face
from mpillama.loading.model_file import open_model
from mpillama.models.config import ModelConfig
from mpillama.models.delta_net import GatedDeltaNet
from mpillama.quant.registry import STORED_TYPES
from tests.tiny_models import random_tensors

FOLDER = Path(__file__).parent / "golden"
FAMILIES = (
    "llama", "llama3", "llama_bias", "llama_linear", "llama_yarn", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe",
    "seed_oss", "olmo2", "granite", "smollm3", "ministral", "ministral3", "phi3", "phi3_longrope", "gemma2", "gemma3",
    "hy_v3", "glm4_moe", "minimax_m2", "minimax_m3", "gpt_oss", "deepseek_v3", "kimi_k2", "llama4", "llama4_usual",
    "deepseek_v32", "glm_moe_dsa",
    "qwen3_next", "qwen3_5", "qwen3_5_moe",
)  # fmt: skip
Tensors = Mapping[str, np.ndarray]


@cache
def golden(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [tokens] and the logits [tokens, vocab_size] that transformers computed in float32."""
    with np.load(FOLDER / family / "golden.npz") as found:
        return found["ids"], found["logits"]


def stored_tensors(family: str) -> dict[str, np.ndarray]:
    """A golden model's tensors as its file has them."""
    return load_file(FOLDER / family / "model.safetensors")


@cache
def golden_positions(family: str) -> np.ndarray | None:
    """The positions that transformers chose, ascending: int64 [layers with an indexer, tokens, chosen]; None of others.

    A token before so many has all of its own, and later ones.
    """
    with np.load(FOLDER / family / "golden.npz") as found:
        return found["positions"].astype(np.int64) if "positions" in found else None


@cache
def golden_experts(family: str) -> np.ndarray | None:
    """The experts that transformers chose, ascending: int64 [layers with a router, tokens, chosen]; None of others."""
    with np.load(FOLDER / family / "golden.npz") as found:
        return found["experts"].astype(np.int64) if "experts" in found else None


def tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor of a small checkpoint, float32 in Hugging Face's shape, vectors as they are meant."""
    source = PathSource(checkpoint.files)
    return {name: _values(tensor, source) for name, tensor in checkpoint.tensors.items()}


def _values(tensor: StoredTensor, source: PathSource) -> np.ndarray:
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return tensor.meant(tensor.read(source, range(rows), range(tensor.shape[-1])).decode().reshape(tensor.shape))


def family_tensors(family: str) -> dict[str, np.ndarray]:
    """A golden model's tensors."""
    return tensors(read_hugging_face(str(FOLDER / family)))


def headless(folder: Path) -> Path:
    """Write a model as it is stored for embeddings: without the prefix of its tensors' names and without a head."""
    shutil.copytree(FOLDER / "llama", folder)
    bare = {n.removeprefix("model."): t for n, t in family_tensors("llama").items() if n != "lm_head.weight"}
    save_file(bare, folder / "model.safetensors")
    return folder


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of heads in halves, put as rotary pairs: what the other formats store for Llama."""
    rest = rows.shape[1:]
    return rows.reshape(-1, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(-1, *rest)


# -- GGUF -----------------------------------------------------------------------------------------------------------

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ARCHITECTURES |= {"qwen3_moe": "qwen3moe", "seed_oss": "seed_oss", "olmo2": "olmo2", "granite": "granite"}
ARCHITECTURES |= {"smollm3": "smollm3", "ministral3": "mistral3", "phi3": "phi3", "gemma2": "gemma2"}
ARCHITECTURES |= {"gemma3_text": "gemma3"}
ARCHITECTURES |= {"hy_v3": "hy_v3", "glm4_moe": "glm4moe", "minimax_m2": "minimax-m2", "gpt_oss": "gpt-oss"}
ARCHITECTURES |= {"deepseek_v3": "deepseek2", "deepseek_v32": "deepseek32", "glm_moe_dsa": "glm-dsa"}
ARCHITECTURES |= {"minimax_m3_vl_text": "minimax-m3"}
ARCHITECTURES |= {"llama4_text": "llama4"}
ARCHITECTURES |= {"qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"}
IN_PAIRS = ("llama", "granite", "smollm3", "mistral3")
"""Architectures whose rows of q and k stand in rotary pairs."""
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp", "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "self_attn.sinks": "attn_sinks.weight",
    **{f"self_attn.index_{each}": f"indexer.{each}" for each in ("q_proj", "k_proj", "q_norm", "k_norm")},
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.indexer.wq_b": "indexer.attn_q_b", "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm", "self_attn.indexer.weights_proj": "indexer.proj",
    "self_attn.q_gate_proj": "attn_q", "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_ba": "ssm_ba", "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}  # fmt: skip
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
}  # fmt: skip
POST_ATTENTION = {"post_attention_layernorm": "post_attention_norm"}
OTHER_NAMES = {
    **dict.fromkeys(("seed_oss", "glm4moe", "gpt-oss", "qwen3next", "qwen35", "qwen35moe"), POST_ATTENTION),
    **dict.fromkeys(("olmo2", "gemma2", "gemma3"), POST_NORMS),
}  # fmt: skip
"""What single architectures call otherwise."""
EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


AS_FLOATS = ("ffn_gate_inp", "indexer.proj", "conv1d")
"""What no file quantises."""


def write_gguf(
    path: Path, family: str, quantise: Callable[[np.ndarray], tuple[np.ndarray, Any]], pre: str = "llama-bpe",
    part_tensors: int = 0, drafts: int = 0, old: bool = False, beside: Mapping[str, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Write a golden model (or any folder, by its path) as llama.cpp's converter does.

    `quantise` gives a matrix's data and GGML type, `pre` is the name of the pre-tokenizer; with `part_tensors` the file
    is split into parts of so many tensors, and so many layers behind the last are those that only draft tokens; an
    `old` file of latent attention has kv_b in one piece. With tensors `beside` it, the last layer is one that drafts.
    """
    config = open_model(str(FOLDER / family)).config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=part_tensors)
    _write_metadata(writer, family, config, drafts, old)
    if beside:
        writer.add_nextn_predict_layers(1)
        for name, tensor in beside.items():
            writer.add_tensor(f"blk.{config.num_hidden_layers - 1}.nextn.{name}.weight", tensor)
    _write_vocabulary(writer, family, pre)
    stored = _gguf_tensors(family, architecture, config)
    for name, tensor in (stored if old else _with_halves(stored, config)).items():
        if tensor.ndim == 1 or name.endswith(".bias") or any(part in name for part in AS_FLOATS):
            writer.add_tensor(name, tensor)
        else:
            data, kind = quantise(tensor)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def attention(config: ModelConfig) -> Any:
    """That of the first layer which has any."""
    return next(block.attention for block in config.blocks if not isinstance(block.attention, GatedDeltaNet))


def mlp(config: ModelConfig) -> Any:
    return config.blocks[0].mlp


def last_mlp(config: ModelConfig) -> Any:
    """That with experts, if there are any."""
    return config.blocks[-1].mlp


def experts(config: ModelConfig) -> int:
    return last_mlp(config).router.count if hasattr(last_mlp(config), "router") else 0


def chosen(config: ModelConfig) -> int:
    return last_mlp(config).router.chosen if experts(config) else 0


def _write_metadata(writer: gguf.GGUFWriter, family: str, config: ModelConfig, drafts: int, old: bool) -> None:
    writer.add_context_length(config.longest_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers + drafts)
    if drafts:
        writer.add_nextn_predict_layers(drafts)
        writer.add_tensor(f"blk.{config.num_hidden_layers}.nextn.eh_proj.weight", np.ones((4, 8), np.float32))
        writer.add_tensor(f"blk.{config.num_hidden_layers}.attn_norm.weight", np.ones(8, np.float32))
    writer.add_feed_forward_length(mlp(config).intermediate_size)
    writer.add_head_count(attention(config).heads)
    if hasattr(attention(config), "kv_rank"):
        _write_latents(writer, config, old)
        if hasattr(attention(config), "indexer"):
            _write_indexers(writer, config, family)
    else:
        writer.add_head_count_kv(attention(config).kv_heads)
        writer.add_key_length(attention(config).head_dim)
        writer.add_value_length(attention(config).head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    settings = json.loads((FOLDER / family / "config.json").read_text())
    MORE_METADATA.get(config.model_type, lambda writer, settings: None)(writer, settings)
    turned = attention(config).rotary_channels
    if config.model_type not in MORE_METADATA and turned != getattr(attention(config), "head_dim", turned):
        writer.add_rope_dimension_count(attention(config).rotary_channels)
    if experts(config):
        writer.add_expert_count(experts(config))
        writer.add_expert_used_count(chosen(config))
        writer.add_expert_feed_forward_length(last_mlp(config).intermediate_size)
        if last_mlp(config).router.scores == "sigmoid":
            _write_sigmoids(writer, config)
    if config.model_type == "gpt_oss":
        _write_gpt_oss(writer, config)
    if config.has_state:
        _write_delta_nets(writer, config)


def _write_delta_nets(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The sizes of gated delta nets, in the words of state-space models; every second layer has none."""
    net: Any = config.blocks[0].attention
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(net.key_dim)
    writer.add_ssm_group_count(net.key_heads)
    writer.add_ssm_time_step_rank(net.value_heads)
    writer.add_ssm_inner_size(net.value_heads * net.value_dim)
    writer.add_uint32(f"{ARCHITECTURES[config.model_type]}.full_attention_interval", 2)
    if config.model_type != "qwen3_next":
        writer.add_rope_dimension_sections([1, 1, 0, 0])
    if experts(config):
        writer.add_expert_shared_feed_forward_length(last_mlp(config).shared.intermediate_size)


def _write_gpt_oss(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Windows and YaRN, which has its constants as usual."""
    scaling: Any = config.rope.scaling
    writer.add_sliding_window(attention(config).window)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(int(scaling.original_max_position_embeddings))
    writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)


def _write_latents(writer: gguf.GGUFWriter, config: ModelConfig, old: bool) -> None:
    """What llama.cpp's converter writes of DeepSeek's attention; in files with halves of kv_b it has one KV head."""
    kind, scaling = attention(config), config.rope.scaling
    whole = kind.nope + kind.rope, kind.value
    writer.add_head_count_kv(kind.heads if old else 1)
    writer.add_key_length(whole[0] if old else kind.kv_rank + kind.rope)
    writer.add_value_length(whole[1] if old else kind.kv_rank)
    if not old:
        writer.add_key_length_mla(whole[0])
        writer.add_value_length_mla(whole[1])
    if kind.q_rank:
        writer.add_q_lora_rank(kind.q_rank)
    writer.add_kv_lora_rank(kind.kv_rank)
    writer.add_rope_dimension_count(kind.rope)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(int(scaling.original_max_position_embeddings))
        magnitude = (np.sqrt(kind.softmax_factor) - 1) / np.log(scaling.factor)
        writer.add_rope_scaling_yarn_log_mul(float(magnitude))


def _write_indexers(writer: gguf.GGUFWriter, config: ModelConfig, family: str) -> None:
    """Their sizes and, if the configuration names the layers that have one, which do."""
    kind, own = attention(config), [not block.attention.follows for block in config.blocks]
    writer.add_indexer_head_count(kind.indexer.heads)
    writer.add_indexer_key_length(kind.indexer.channels)
    writer.add_indexer_top_k(kind.chosen)
    if "indexer_types" in json.loads((FOLDER / family / "config.json").read_text()):
        writer.add_array(f"{ARCHITECTURES[config.model_type]}.attention.indexer.types", [int(one) for one in own])


def _with_delta_nets(tensors: Tensors, config: ModelConfig) -> Tensors:
    """With what llama.cpp's converter makes of gated delta nets: q, k and v together, heads of Qwen3.5 in its order."""
    found, tiles = dict(tensors), config.model_type != "qwen3_next"
    for number, block in enumerate(config.blocks):
        net, prefix = block.attention, f"model.layers.{number}.linear_attn."
        if not isinstance(net, GatedDeltaNet):
            continue
        if grouped := f"{prefix}in_proj_qkvz.weight" in found:
            whole = found.pop(f"{prefix}in_proj_qkvz.weight")
            by_head = whole.reshape(net.key_heads, -1, whole.shape[1])
            ends = np.cumsum([net.key_dim, net.key_dim, net.group * net.value_dim])
            parts = dict(zip("qkvz", (p.reshape(-1, p.shape[2]) for p in np.split(by_head, ends, axis=1)), strict=True))
        else:
            parts = {part: found.pop(f"{prefix}in_proj_{part}.weight") for part in "qkvz"}
        assert grouped != tiles
        taps = {part: found.pop(f"{prefix}conv1d_{part}.weight").reshape(-1, 4) for part in "qkv"}
        rest = {name: found.pop(prefix + name) for name in ("A", "dt_bias")}
        if tiles:
            order = np.arange(net.value_heads).reshape(net.key_heads, net.group).T.reshape(-1)
            gates = {f"in_proj_{part}.weight": found[f"{prefix}in_proj_{part}.weight"] for part in "ab"}
            found |= {prefix + name: _by_head(tensor, order) for name, tensor in gates.items()}
            rest = {name: tensor[order] for name, tensor in rest.items()}
            parts |= {part: _by_head(parts[part], order) for part in "vz"}
            taps["v"] = _by_head(taps["v"], order)
            out = found[f"{prefix}out_proj.weight"]
            found[f"{prefix}out_proj.weight"] = np.ascontiguousarray(_by_head(out.T, order).T)
        found[f"{prefix}in_proj_qkv.weight"] = np.concatenate([parts[part] for part in "qkv"])
        found[f"{prefix}in_proj_z.weight"] = parts["z"]
        found[f"{prefix}conv1d.weight"] = np.concatenate([taps[part] for part in "qkv"])
        found |= {f"blk.{number}.ssm_a": -rest["A"], f"blk.{number}.ssm_dt.bias": rest["dt_bias"]}
    for name in [name for name in found if name.endswith("shared_expert_gate.weight")]:
        found[name] = found[name][0]
    return found


def _by_head(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows of as many heads, in another order."""
    return rows.reshape(len(order), -1, *rows.shape[1:])[order].reshape(rows.shape)


def _with_halves(stored: Tensors, config: ModelConfig) -> Tensors:
    """With kv_b of each head as its two halves, that of keys turned."""
    found = dict(stored)
    for name in stored:
        if "attn_kv_b" in name:
            kind, prefix = attention(config), name.removesuffix("attn_kv_b.weight")
            by_head = found.pop(name).reshape(kind.heads, kind.nope + kind.value, kind.kv_rank)
            found[f"{prefix}attn_k_b.weight"] = np.ascontiguousarray(by_head[:, : kind.nope].swapaxes(1, 2))
            found[f"{prefix}attn_v_b.weight"] = np.ascontiguousarray(by_head[:, kind.nope :])
    return found


def _write_sigmoids(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """What llama.cpp's converter writes of routers of DeepSeek V3's kind and of shared experts."""
    router, shared = last_mlp(config).router, last_mlp(config).shared
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(router.scaling)
    writer.add_expert_weights_norm(router.renormalise)
    writer.add_leading_dense_block_count(sum(not hasattr(block.mlp, "router") for block in config.blocks))
    if shared:
        writer.add_expert_shared_count(shared.intermediate_size // last_mlp(config).intermediate_size)
    if router.groups > 1:
        writer.add_expert_group_count(router.groups)
        writer.add_expert_group_used_count(router.chosen_groups)


def _granite_metadata(writer: gguf.GGUFWriter, settings: Mapping[str, Any]) -> None:
    writer.add_attention_scale(settings["attention_multiplier"])
    writer.add_embedding_scale(settings["embedding_multiplier"])
    writer.add_residual_scale(settings["residual_multiplier"])
    writer.add_logit_scale(settings["logits_scaling"])


def _ministral3_metadata(writer: gguf.GGUFWriter, settings: Mapping[str, Any]) -> None:
    rope = settings["rope_parameters"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _phi3_metadata(writer: gguf.GGUFWriter, settings: Mapping[str, Any]) -> None:
    head_dim = settings["hidden_size"] // settings["num_attention_heads"]
    original, context = settings["original_max_position_embeddings"], settings["max_position_embeddings"]
    writer.add_rope_dimension_count(int(settings["partial_rotary_factor"] * head_dim))
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_sliding_window(settings["sliding_window"] or 0)
    for length in ("short", "long"):
        if factors := settings["rope_parameters"].get(f"{length}_factor"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(factors, np.float32))
    if "long_factor" in settings["rope_parameters"]:
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(context / original) / math.log(original)))


def _gemma2_metadata(writer: gguf.GGUFWriter, settings: Mapping[str, Any]) -> None:
    writer.add_attn_logit_softcapping(settings["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(settings["final_logit_softcapping"])
    writer.add_sliding_window(settings["sliding_window"])


def _gemma3_metadata(writer: gguf.GGUFWriter, settings: Mapping[str, Any]) -> None:
    rope = settings["rope_parameters"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
    writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
    writer.add_sliding_window(settings["sliding_window"])
    writer.add_uint32("gemma3.attention.sliding_window_pattern", settings["sliding_window_pattern"])


def _minimax_m3_metadata(writer: gguf.GGUFWriter, settings: Mapping[str, Any]) -> None:
    writer.add_rope_dimension_count(settings["rotary_dim"])
    for key, name in (
        ("head_count", "index_n_heads"), ("key_length", "index_head_dim"), ("top_k", "index_topk_blocks"),
        ("block_size", "index_block_size"), ("local_blocks", "index_local_blocks"),
    ):  # fmt: skip
        writer.add_uint32(f"minimax-m3.attention.indexer.{key}", settings[name])


def _llama4_metadata(writer: gguf.GGUFWriter, settings: Mapping[str, Any]) -> None:
    writer.add_interleave_moe_layer_step(settings["interleave_moe_layer_step"])


MORE_METADATA: Mapping[str, Callable[[gguf.GGUFWriter, Mapping[str, Any]], None]] = {
    "granite": _granite_metadata, "ministral3": _ministral3_metadata, "phi3": _phi3_metadata,
    "gemma2": _gemma2_metadata, "gemma3_text": _gemma3_metadata, "llama4_text": _llama4_metadata,
    "minimax_m3_vl_text": _minimax_m3_metadata,
}  # fmt: skip
"""What files of single architectures hold besides."""
FUSED = {
    "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "ffn_up": ("mlp.gate_proj", "mlp.up_proj"),
}
"""What files of Phi-3 hold as one."""


def _fused(tensors: Mapping[str, np.ndarray], layers: int) -> Tensors:
    """The fused matrices, and what is left."""
    rest, found = dict(tensors), {}
    for layer in range(layers):
        for name, modules in FUSED.items():
            parts = [rest.pop(f"model.layers.{layer}.{module}.weight") for module in modules]
            found[f"blk.{layer}.{name}.weight"] = np.concatenate(parts)
    return {**found, **rest}


def _write_vocabulary(writer: gguf.GGUFWriter, family: str, pre: str) -> None:
    tokenizer = json.loads((FOLDER / family / "tokenizer.json").read_text())
    settings = json.loads((FOLDER / family / "config.json").read_text())
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    ids = {**{i: t for t, i in tokenizer["model"]["vocab"].items()}, **added}
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([ids[i] for i in range(len(ids))])
    writer.add_token_types([control if i in added else normal for i in range(len(ids))])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(settings["bos_token_id"])
    eos = settings["eos_token_id"]
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)


def _gguf_tensors(family: str, architecture: str, config: ModelConfig) -> Tensors:
    found: dict[str, np.ndarray] = {}
    stacked: dict[str, list[np.ndarray]] = {}
    tensors = _with_delta_nets(family_tensors(family), config)
    for name, tensor in (_fused(tensors, config.num_hidden_layers) if architecture == "phi3" else tensors).items():
        if name.startswith("blk."):
            found[name] = tensor
            continue
        *_, layer, module, kind = ["", "", *_parts(name)]
        if ".experts." in name:
            stacked.setdefault(f"blk.{layer}.{EXPERT_NAMES[module.split('.')[-1]]}.{kind}", []).append(tensor)
        elif layer:
            straight = architecture not in IN_PAIRS or module not in ("self_attn.q_proj", "self_attn.k_proj")
            names = {**GGUF_NAMES, **OTHER_NAMES.get(architecture, {})}
            own = names.get(f"{module}.{kind}") or f"{names[module]}.{kind}"
            found[f"blk.{layer}.{own}"] = tensor if straight else interleaved(tensor, attention(config).head_dim)
        else:
            found[
                {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[module]
                + ".weight"
            ] = tensor
    own_scaling = config.model_type in (*MORE_METADATA, "gpt_oss") or hasattr(attention(config), "kv_rank")
    if config.rope.scaling is not None and not own_scaling:
        plain = config.rope.theta ** -(np.arange(0, attention(config).head_dim, 2) / attention(config).head_dim)
        found["rope_freqs.weight"] = (plain / np.array(config.inverse_frequencies())).astype(np.float32)
    return {**found, **{name: np.stack(parts) for name, parts in stacked.items()}}


def _parts(name: str) -> tuple[str, str, str]:
    """Layer, module and kind of a tensor's name; layer "" outside the layers."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return "", module, kind
    _, _, layer, rest = module.split(".", 3)
    return layer, rest, kind


def as_float32(tensor: np.ndarray) -> tuple[np.ndarray, Any]:
    """A matrix as it is."""
    return tensor, gguf.GGMLQuantizationType.F32


def as_type(kind: gguf.GGMLQuantizationType) -> Callable[[np.ndarray], tuple[np.ndarray, Any]]:
    """What turns a matrix into a GGML type."""
    return lambda tensor: (gguf.quants.quantize(tensor, kind), kind)


def as_random_blocks(kind: gguf.GGMLQuantizationType) -> Callable[[np.ndarray], tuple[np.ndarray, Any]]:
    """What puts blocks of any integers in a matrix's place, with scales that make them as large as weights."""
    name = kind.name.lower()

    def made(tensor: np.ndarray) -> tuple[np.ndarray, Any]:
        stored, random = STORED_TYPES[name], np.random.default_rng(tensor.size)
        shape = *tensor.shape[:-1], tensor.shape[-1] // stored.block, stored.block_bytes
        blocks = random.integers(0, 256, shape, np.uint8)
        scales = random.uniform(0.05, 0.1, shape[:-1]) / RANDOM_SCALES.get(name, 8)
        if name in STEPS:  # which have integer scales in a block, too
            place, of_scale, of_minimum = STEPS[name]
            for i, divisor in enumerate((of_scale, of_minimum)[: 1 + (of_minimum > 0)]):
                step = (scales / divisor).astype("<f2")[..., None].view(np.uint8)
                blocks[..., place + 2 * i : place + 2 * i + 2] = step
        elif name == "mxfp4":
            blocks[..., 0] = random.integers(120, 123, shape[:-1])
        elif name == "nvfp4":
            blocks[..., :4] = random.integers(4, 12, (*shape[:-1], 4))
        else:
            blocks[..., :2] = scales.astype("<f2")[..., None].view(np.uint8)
        if name in ("q4_1", "q5_1"):
            minimums = -scales * random.uniform(0.4, 0.6, scales.shape) * 2 * RANDOM_SCALES[name]
            blocks[..., 2:4] = minimums.astype("<f2")[..., None].view(np.uint8)
        return blocks.reshape(*tensor.shape[:-1], -1), kind

    return made


RANDOM_SCALES = {
    "q8_0": 127, "q5_0": 16, "iq4_nl": 127, "q4_1": 8, "q5_1": 16, "q6_k": 32, "iq4_xs": 127, "iq2_xxs": 50,
}  # fmt: skip
"""The largest integers of types, half of it where they begin with a minimum."""
STEPS = {
    "q2_k": (80, 2, 1), "q3_k": (108, 8, 0), "q4_k": (0, 32, 4), "q5_k": (0, 64, 4), "q6_k": (208, 64, 0),
    "iq4_xs": (0, 16, 0),
}  # fmt: skip
"""Where a super-block has the float16 by which its integer scales are multiplied, about how large those are, and the
same of minimums, whose float16 follows; 0 if there are none."""


def as_floats_of(
    quantise: Callable[[np.ndarray], tuple[np.ndarray, Any]],
) -> Callable[[np.ndarray], tuple[np.ndarray, Any]]:
    """The float32 values that the gguf package finds in a quantised matrix."""

    def decoded(tensor: np.ndarray) -> tuple[np.ndarray, Any]:
        data, kind = quantise(tensor)
        values = gguf.quants.dequantize(data.reshape(-1, data.shape[-1]), kind)
        return values.astype(np.float32).reshape(tensor.shape), gguf.GGMLQuantizationType.F32

    return decoded


def as_blocks_in_turn(
    kinds: Sequence[gguf.GGMLQuantizationType],
) -> Callable[[np.ndarray], tuple[np.ndarray, Any]]:
    """As as_random_blocks, each matrix in the next of some types."""
    makers = cycle([as_random_blocks(kind) for kind in kinds])
    return lambda tensor: next(makers)(tensor)


def write_of_whole_blocks(folder: Path, block: int = 32, family: str = "llama") -> None:
    """Write a model of random weights whose rows are whole blocks, and its heads too if they are of 32."""
    config = json.loads((FOLDER / family / "config.json").read_text())
    head_dim = min(block, 64)
    heads = 3 * block // head_dim
    config |= {
        "hidden_size": 2 * block,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    config |= {"intermediate_size": 5 * block, "num_hidden_layers": 2}
    if "layer_types" in config:  # blocks reach over several value heads
        sizes = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
        config |= {**sizes, "linear_num_key_heads": block // 32, "linear_num_value_heads": block // 16}
        config["layer_types"] = config["layer_types"][:2]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(FOLDER / family / "tokenizer.json", folder)
    save_file(_with_gates(random_tensors(config), heads), folder / "model.safetensors")


def _with_gates(tensors: Tensors, heads: int) -> dict[str, np.ndarray]:
    """With queries and gates of heads in one matrix, as checkpoints have them."""
    found = dict(tensors)
    for name in [name for name in found if name.endswith("self_attn.gate_proj.weight")]:
        queries = name.replace("gate_proj", "q_proj")
        both = [part.reshape(heads, -1, part.shape[1]) for part in (found[queries], found.pop(name))]
        found[queries] = np.concatenate(both, axis=1).reshape(-1, both[0].shape[2])
    return found


# -- distributed-llama ----------------------------------------------------------------------------------------------


def write_dllama(path: Path, family: str) -> None:
    """Write a golden model as distributed-llama's converter does, in float32, with its tokenizer beside it."""
    config = open_model(str(FOLDER / family)).config
    architecture = {"llama": 0xABCD00, "qwen3": 0xABCD01, "qwen3_moe": 0xABCD02}[config.model_type]
    pairs = {
        0: 0, 1: architecture, 2: config.hidden_size, 3: mlp(config).intermediate_size, 4: config.num_hidden_layers,
        5: attention(config).heads, 6: attention(config).kv_heads, 7: experts(config),
        8: chosen(config), 9: config.vocab_size, 10: config.max_position_embeddings, 11: 1,
        12: int(config.rope.theta), 13: 0, 19: attention(config).head_dim, 20: 5, 21: mlp(config).intermediate_size,
    }  # fmt: skip
    assert config.rms_norm_eps == 1e-5
    numbers = [n for pair in pairs.items() for n in pair]
    head = struct.pack(f"<Ii{len(numbers)}i", 0x0A00ABCD, 8 + 4 * len(numbers), *numbers)
    body = b"".join(t.astype("<f4").tobytes() for t in _dllama_tensors(family, config))
    path.write_bytes(head + body)
    _write_dllama_tokenizer(path.with_suffix(".t"), family)


def _dllama_tensors(family: str, config: ModelConfig) -> list[np.ndarray]:
    all_tensors, found = family_tensors(family), []
    found.append(all_tensors["model.embed_tokens.weight"])
    for layer in range(config.num_hidden_layers):
        part = {n.removeprefix(f"model.layers.{layer}."): t for n, t in all_tensors.items() if f"layers.{layer}." in n}
        for letter in "qk":
            rows = part[f"self_attn.{letter}_proj.weight"]
            found.append(interleaved(rows, attention(config).head_dim) if config.model_type == "llama" else rows)
        found += [part["self_attn.v_proj.weight"], part["self_attn.o_proj.weight"]]
        prefixes = [f"mlp.experts.{e}." for e in range(experts(config))] or ["mlp."]
        found += [part["mlp.gate.weight"]] if experts(config) else []
        found += [part[f"{prefix}{name}_proj.weight"] for prefix in prefixes for name in ("gate", "down", "up")]
        found += [part[f"self_attn.{letter}_norm.weight"] for letter in "qk"] if attention(config).qk_norm else []
        found += [part["input_layernorm.weight"], part["post_attention_layernorm.weight"]]
    head = all_tensors.get("lm_head.weight", all_tensors["model.embed_tokens.weight"])
    return [*found, all_tensors["model.norm.weight"], head]


def _write_dllama_tokenizer(path: Path, family: str) -> None:
    count = open_model(str(FOLDER / family)).config.vocab_size
    tokens = [bytes([i]) for i in range(256)] + [f"<|special {i}|>".encode() for i in range(256, count)]
    body = b"".join(struct.pack("<fI", -i, len(token)) + token for i, token in enumerate(tokens))
    path.write_bytes(struct.pack("<IIIiii", 0x567123, count, 20, 256, 257, -1) + body)
