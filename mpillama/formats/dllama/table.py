"""Where the tensors of a distributed-llama model file lie: they follow each other in a fixed order, without names."""

from collections.abc import Iterator, Mapping
from typing import Any

from mpillama.formats.checkpoint import StoredTensor
from mpillama.formats.foreign import damaged
from mpillama.models.family import Dllama
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
