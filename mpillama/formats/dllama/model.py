"""A checkpoint of distributed-llama: a model file `.m` and a tokenizer file `.t`.

Format (version 0.16): https://github.com/b4rtaz/distributed-llama, converter/ and src/llm.cpp. The model file is a
header of pairs of int32, then the tensors in a fixed order without names, gaps or alignment.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint, StoredTensor
from mpillama.formats.dllama.tokenizer import TEMPLATE, VOCABULARY, find_tokenizer, read_tokenizer
from mpillama.formats.foreign import Cursor, damaged, regular_size
from mpillama.models.families import FAMILIES
from mpillama.models.family import MOST_LAYERS, Dllama, Family
from mpillama.models.router import MOST_EXPERTS
from mpillama.quant.registry import STORED_TYPES

Plan = list[tuple[str, tuple[int, ...], str]]
"""Name, shape and stored type of tensors that follow each other."""


def place_tensors(
    path: str, config: Mapping[str, Any], dllama: Dllama, stored: str, start: int, size: int
) -> dict[str, StoredTensor]:
    """Every tensor at its place, matrices as `stored`; UserError if the file does not end with the last one."""
    before, layer, after = _plans(config, dllama, stored)
    layers = config["num_hidden_layers"]
    try:
        sums = [
            sum(STORED_TYPES[stored].tensor_bytes(shape) for _, shape, stored in plan)
            for plan in (before, layer, after)
        ]
    except ValueError as error:
        raise damaged(path, str(error)) from error
    total = start + sums[0] + layers * sums[1] + sums[2]
    pairs = config["head_dim"] if dllama.rotary_pairs else 0
    placed = _placed(before, layer, after, layers, start, pairs)
    if total != size:
        _refuse_size(path, placed, size, total)
    return {tensor.name: tensor for tensor in placed}


def _refuse_size(path: str, placed: Iterator[StoredTensor], size: int, total: int) -> None:
    ends = (t.name for t in placed if t.offset + t.bytes > size)
    name = next(ends, None)
    where = "goes on after the last tensor" if name is None else f"ends in tensor {name}"
    raise damaged(path, f"it has {size} bytes, expected {total} by its header: it {where}")


def _placed(before: Plan, layer: Plan, after: Plan, layers: int, place: int, pairs: int) -> Iterator[StoredTensor]:
    """The tensors in the order of the file, one after the other without gaps."""
    plans = ((before, ""), *((layer, f"model.layers.{n}.") for n in range(layers)), (after, ""))
    for plan, prefix in plans:
        for name, shape, stored in plan:
            rotated = pairs if name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight") else 0
            tensor = StoredTensor(prefix + name, shape, stored, 0, place, rotated)
            yield tensor
            place += tensor.bytes


def _plans(config: Mapping[str, Any], dllama: Dllama, stored: str) -> tuple[Plan, Plan, Plan]:
    """What stands before the layers, in each layer, and after them."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    before: Plan = [("model.embed_tokens.weight", (vocab, hidden), "f32")]
    layer = [*_attention(config, stored), *_mlp(config, stored), *_norms(config, dllama)]
    after: Plan = [("model.norm.weight", (hidden,), "f32"), ("lm_head.weight", (vocab, hidden), stored)]
    return before, layer, after


def _attention(config: Mapping[str, Any], stored: str) -> Plan:
    hidden, head = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    return [(f"self_attn.{name}_proj.weight", shape, stored) for name, shape in shapes.items()]


def _mlp(config: Mapping[str, Any], stored: str) -> Plan:
    """Gate, down, up (in this order), or the router and these three of each expert."""
    hidden = config["hidden_size"]

    def matrices(prefix: str, inner: int) -> Plan:
        shapes = {"gate": (inner, hidden), "down": (hidden, inner), "up": (inner, hidden)}
        return [(f"{prefix}{name}_proj.weight", shape, stored) for name, shape in shapes.items()]

    if "num_experts" not in config:
        return matrices("mlp.", config["intermediate_size"])
    plan: Plan = [("mlp.gate.weight", (config["num_experts"], hidden), "f32")]
    for expert in range(config["num_experts"]):
        plan += matrices(f"mlp.experts.{expert}.", config["moe_intermediate_size"])
    return plan


def _norms(config: Mapping[str, Any], dllama: Dllama) -> Plan:
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    norms: Plan = [(name, (config["hidden_size"],), "f32") for name in names]
    if not dllama.head_norms:
        return norms
    heads: Plan = [(f"self_attn.{name}_norm.weight", (config["head_dim"],), "f32") for name in ("q", "k")]
    return heads + norms


MAGIC = (0x0A00ABCD).to_bytes(4, "little")
OLD_MAGICS = tuple(magic.to_bytes(4, "little") for magic in (0xABCD00, 0xABCD01))
MOST_PAIRS = 1000
ARCHITECTURES = {family.dllama.architecture: family for family in FAMILIES.values() if family.dllama}
STORED = {0: "f32", 1: "f16", 2: "q4_0", 3: "q8_0"}
EPSILONS = {5: 1e-5, 6: 1e-6}
KEYS = (
    *("version", "arch_type", "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "n_experts"),
    *("n_active_experts", "vocab_size", "max_seq_len", "hidden_act", "rope_theta", "weights_float_type"),
    *("rope_scaling_factor", "rope_scaling_low_freq_factor", "rope_scaling_high_freq_factor"),
    *("rope_scaling_orig_max_seq_len", "rope_type", "head_dim", "norm_epsilon", "moe_hidden_dim"),
)
"""The header's keys by their numbers."""


@dataclass(frozen=True)
class _Header:
    """The pairs of a model file by name, taken out with checks."""

    path: str
    values: Mapping[str, int]

    def size(self, key: str, default: int | None = None, most: int = 2**31) -> int:
        """A positive number."""
        value = self.values.get(key, default)
        if value is None or not 1 <= value <= most:
            raise damaged(self.path, f"its header has {key}={value}, expected a number from 1 to {most}")
        return value

    def choice(self, key: str, known: Mapping[int, Any], default: int | None = None) -> Any:
        """What a number stands for."""
        value = self.values.get(key, default)
        if value is None or value not in known:
            raise damaged(self.path, f"its header has {key}={value}, expected one of {', '.join(map(str, known))}")
        return known[value]


def read_dllama(model_path: str, tokenizer_path: str | None = None) -> Checkpoint:
    """Read everything but the weights; without `tokenizer_path` the tokenizer is the one beside the model."""
    size, (header, start) = regular_size(model_path), _read_header(str(model_path))
    family: Family = header.choice("arch_type", ARCHITECTURES)
    config, stored = _config(header, family), header.choice("weights_float_type", STORED)
    assert family.dllama
    tensors = place_tensors(header.path, config, family.dllama, stored, start, size)
    tokenizer = read_tokenizer(tokenizer_path or find_tokenizer(str(model_path)))
    if tokenizer.bos is not None:
        config["bos_token_id"] = tokenizer.bos
    if tokenizer.eos:
        config["eos_token_id"] = tokenizer.eos
    texts = {VOCABULARY: tokenizer.vocabulary(), **({TEMPLATE: tokenizer.template} if tokenizer.template else {})}
    return Checkpoint(str(model_path), "dllama", config, texts, (str(model_path),), (size,), tensors)


# -- header ---------------------------------------------------------------------------------------------------------


def _read_header(path: str) -> tuple[_Header, int]:
    """The pairs, and where the tensors begin."""
    with Cursor(path) as cursor:
        _check_magic(path, cursor.take(min(4, cursor.size), "magic"))
        length = cursor.number("i", "header size")
        count = (length - 8) // 8
        if length % 8 or not 0 <= count <= MOST_PAIRS:
            raise damaged(path, f"its header has {length} bytes")
        cursor.expect(count * 8, "header")
        pairs = [(cursor.number("i", "key"), cursor.number("i", "value")) for _ in range(count)]
    keys = [key for key, _ in pairs]
    for key in keys:
        if not 0 <= key < len(KEYS) or keys.count(key) > 1:
            raise damaged(
                path, f"its header has {'the unknown key' if keys.count(key) == 1 else 'twice the key'} {key}"
            )
    return _Header(path, {KEYS[key]: value for key, value in pairs}), length


def _check_magic(path: str, found: bytes) -> None:
    if found in OLD_MAGICS:
        raise UserError(
            f"{path}: a model file from before distributed-llama 0.3, which does not tell the type of its weights: "
            "download or convert the model again."
        )
    if found != MAGIC:
        raise UserError(
            f"{path}: not a distributed-llama model: it begins with {found.hex(' ') or '(nothing)'}, "
            f"expected {MAGIC.hex(' ')}."
        )


def _config(header: _Header, family: Family) -> dict[str, Any]:
    """The header as config.json."""
    assert family.dllama
    heads, hidden = header.size("n_heads"), header.size("dim")
    config = {
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": header.size("hidden_dim"),
        "num_hidden_layers": header.size("n_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": header.size("n_kv_heads", heads),
        "head_dim": header.size("head_dim", hidden // heads),
        "vocab_size": header.size("vocab_size"),
        "max_position_embeddings": header.size("max_seq_len"),
        "rms_norm_eps": header.choice("norm_epsilon", EPSILONS, 5),
        "rope_theta": float(header.size("rope_theta", 10000)),
        "rope_scaling": _rope_scaling(header, family.dllama),
        "tie_word_embeddings": False,
    }
    return {**config, **_experts(header, family)}


def _experts(header: _Header, family: Family) -> dict[str, Any]:
    has_experts = family.dllama is not None and family.dllama.experts
    if bool(header.values.get("n_experts", 0)) != has_experts:
        raise damaged(
            header.path, f"its header has arch_type {family.model_type} and n_experts={header.values.get('n_experts')}"
        )
    if not has_experts:
        return {}
    return {
        "num_experts": header.size("n_experts", most=MOST_EXPERTS),
        "num_experts_per_tok": header.size("n_active_experts", most=MOST_EXPERTS),
        "moe_intermediate_size": header.size("moe_hidden_dim"),
        "norm_topk_prob": True,
    }


def _rope_scaling(header: _Header, dllama: Dllama) -> dict[str, Any] | None:
    """Llama 3.1's scaling for rope_type 2, nothing for 0; 1 is Falcon's order of channels."""
    if not dllama.scaled_rope or header.choice("rope_type", {0: "default", 2: "llama3"}, 0) == "default":
        _refuse_scaling(header)
        return None
    return {
        "rope_type": "llama3",
        "factor": float(header.size("rope_scaling_factor")),
        "low_freq_factor": float(header.size("rope_scaling_low_freq_factor")),
        "high_freq_factor": float(header.size("rope_scaling_high_freq_factor")),
        "original_max_position_embeddings": header.size("rope_scaling_orig_max_seq_len"),
    }


def _refuse_scaling(header: _Header) -> None:
    """Refuse a factor that nobody would read."""
    factor = header.values.get("rope_scaling_factor", 1)
    if factor not in (0, 1):
        raise UserError(
            f"{header.path}: its header has rope_scaling_factor={factor} with "
            f"rope_type={header.values.get('rope_type', 0)}: mpillama scales Llama models with rope_type=2 only, take "
            "the model in another format."
        )
