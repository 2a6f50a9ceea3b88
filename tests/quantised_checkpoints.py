"""Checkpoints quantised as Hugging Face has them, with random numbers, written array by array from the formats.

Each scheme makes the arrays of one matrix and says what their values are in float64.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.models.config import ModelConfig
from mpillama.models.tensors import EMBEDDING, LM_HEAD, WeightTypes
from mpillama.quant.registry import WEIGHT_TYPES
from tests.packing import pack_words

Array = np.ndarray
Arrays = dict[str, tuple[str, Array]]
"""Safetensors' type and the bits of each array, by how its name ends."""
Make = Callable[[np.random.Generator, tuple[int, int], float], tuple[Arrays, Array]]
"""Makes a matrix of a shape whose values are about so large: its arrays and the values."""

LOW_FIRST = {4: tuple(range(8)), 8: tuple(range(4))}
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
FLOAT4 = np.array([s * m for s in (1, -1) for m in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
FLOAT8 = np.array(
    [
        s * (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
        for s in (1, -1)
        for e in range(16)
        for m in range(8)
    ]
)
NO_NUMBERS = (0x7F, 0xFF)


def bf16(x: Array) -> Array:
    """The upper halves of float32."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def float_of(bits: Array, dtype: str) -> Array:
    """In float64."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


def some_scales(rng: np.random.Generator, shape: tuple[int, ...], size: float, dtype: str) -> Array:
    x = (rng.uniform(0.5, 1.5, shape) * size).astype(np.float32)
    return bf16(x) if dtype == "BF16" else x.astype({"F16": np.float16, "F32": np.float32}[dtype])


def spread(blocks: Array, shape: tuple[int, int], height: int, width: int) -> Array:
    """What each element of a matrix has of numbers that belong to blocks of it."""
    return np.repeat(np.repeat(blocks, height, axis=0), width, axis=1)[: shape[0], : shape[1]]


def float8(block: tuple[int, int] | None, dtype: str = "F32", ending: str = ".weight_scale_inv") -> Make:
    """Scales for blocks, for rows (1, 0), or one (None)."""

    def make(rng: np.random.Generator, shape: tuple[int, int], size: float) -> tuple[Arrays, Array]:
        codes = rng.integers(0, 256, shape, np.uint8)
        codes[np.isin(codes, NO_NUMBERS)] = 1
        height, width = (b or n for b, n in zip(block or shape, shape, strict=True))
        scales = some_scales(rng, (-(-shape[0] // height), -(-shape[1] // width)), size / 130, dtype)
        values = FLOAT8[codes] * spread(float_of(scales, dtype), shape, height, width)
        return {".weight": ("F8_E4M3", codes), ending: (dtype, scales if block else scales[0, 0])}, values

    return make


def packed(bits: int, group: int, dtype: str, zero_points: bool = False, order: str = "") -> Make:
    """compressed-tensors' pack-quantized; `group` 0: a scale for a row. `order` as for gptq, "unset" writes -1."""

    def make(rng: np.random.Generator, shape: tuple[int, int], size: float) -> tuple[Arrays, Array]:
        width, most = group or shape[1], 1 << bits
        numbers, counts = rng.integers(0, most, shape), (shape[0], -(-shape[1] // width))
        zeros = rng.integers(0, most, counts) if zero_points else np.full(counts, most // 2)
        scales, index = some_scales(rng, counts, size / most * 3, dtype), np.arange(shape[1]) // width
        if order == "any":
            index = rng.permutation(index)
        arrays = {
            ".weight_packed": ("I32", pack_words(numbers, LOW_FIRST[bits], "columns", np.uint32)),
            ".weight_scale": (dtype, scales),
            ".weight_shape": ("I64", np.array(shape)),
        }
        if zero_points:
            arrays[".weight_zero_point"] = ("I32", pack_words(zeros, LOW_FIRST[bits], "rows", np.uint32))
        if order:
            arrays[".weight_g_idx"] = (
                "I32",
                np.full_like(index, -1, np.int32) if order == "unset" else index.astype("i4"),
            )
        return arrays, (numbers - zeros[:, index]) * float_of(scales, dtype)[:, index]

    return make


def bytes_with_scales(zero_points: bool = False) -> Make:
    """compressed-tensors' int-quantized: a scale for a row."""

    def make(rng: np.random.Generator, shape: tuple[int, int], size: float) -> tuple[Arrays, Array]:
        numbers, scales = rng.integers(-128, 128, shape), some_scales(rng, (shape[0], 1), size / 80, "BF16")
        zeros = rng.integers(-128, 128, (shape[0], 1)) if zero_points else np.zeros((shape[0], 1), int)
        arrays = {".weight": ("I8", numbers.astype(np.int8)), ".weight_scale": ("BF16", scales)}
        if zero_points:
            arrays[".weight_zero_point"] = ("I8", zeros.astype(np.int8))
        return arrays, (numbers - zeros) * float_of(scales, "BF16")

    return make


def awq(group: int) -> Make:
    def make(rng: np.random.Generator, shape: tuple[int, int], size: float) -> tuple[Arrays, Array]:
        numbers, zeros = rng.integers(0, 16, shape), rng.integers(0, 16, (shape[0], shape[1] // group))
        scales = some_scales(rng, zeros.shape, size / 5, "F16")
        arrays = {
            ".qweight": ("I32", pack_words(numbers.T, AWQ_ORDER, "columns", np.uint32)),
            ".qzeros": ("I32", pack_words(zeros.T, AWQ_ORDER, "columns", np.uint32)),
            ".scales": ("F16", scales.T.copy()),
        }
        return arrays, (numbers - spread(zeros, shape, 1, group)) * spread(scales.astype(float), shape, 1, group)

    return make


def gptq(group: int, bits: int = 4, order: str = "", dtype: str = "F16", less: int = 1) -> Make:
    """`order`: "plain" writes which group each column has, "any" lets them have any; zero points are stored `less`."""

    def make(rng: np.random.Generator, shape: tuple[int, int], size: float) -> tuple[Arrays, Array]:
        width, most = group or shape[1], 1 << bits
        numbers, counts = rng.integers(0, most, shape), (shape[0], shape[1] // width)
        zeros = rng.integers(1, most, counts)
        scales, index = some_scales(rng, counts, size / most * 3, dtype), np.arange(shape[1]) // width
        if order == "any":
            index = rng.permutation(index)
        arrays = {
            ".qweight": ("I32", pack_words(numbers.T, LOW_FIRST[bits], "rows", np.uint32)),
            ".qzeros": ("I32", pack_words(zeros.T - less, LOW_FIRST[bits], "columns", np.uint32)),
            ".scales": (dtype, scales.T.copy()),
        }
        if order:
            arrays[".g_idx"] = ("I32", index.astype(np.int32))
        return arrays, (numbers - zeros[:, index]) * float_of(scales, dtype)[:, index]

    return make


def mxfp4(codes: str, scale: str, scale_dtype: str = "U8") -> Make:
    def make(rng: np.random.Generator, shape: tuple[int, int], size: float) -> tuple[Arrays, Array]:
        numbers = rng.integers(0, 16, shape)
        exponents = (rng.integers(-2, 2, (shape[0], shape[1] // 32)) + int(np.log2(size / 3)) + 127).astype(np.uint8)
        values = FLOAT4[numbers] * spread(2.0 ** (exponents.astype(float) - 127), shape, 1, 32)
        bytes_ = pack_words(numbers, (0, 1), "columns", np.uint8)
        return {codes: ("U8", bytes_), scale: (scale_dtype, exponents)}, values

    return make


def nvfp4(codes: str, whole_ending: str) -> Make:
    def make(rng: np.random.Generator, shape: tuple[int, int], size: float) -> tuple[Arrays, Array]:
        numbers, scales = rng.integers(0, 16, shape), rng.integers(0, 0x7F, (shape[0], shape[1] // 16), np.uint8)
        whole = np.float32(size / 300 * rng.uniform(0.5, 1.5))
        stored = np.float32(1) / whole if "global" in whole_ending else whole
        factor = np.float32(1) / stored if "global" in whole_ending else stored
        values = FLOAT4[numbers] * spread(FLOAT8[scales], shape, 1, 16) * float(factor)
        arrays = {
            codes: ("U8", pack_words(numbers, (0, 1), "columns", np.uint8)),
            ".weight_scale": ("F8_E4M3", scales),
            whole_ending: ("F32", stored.reshape(1)),
        }
        return arrays, values

    return make


@dataclass(frozen=True)
class Quantised:
    """A scheme: its configuration, its matrices, and the type in memory that most of them have."""

    config: Mapping[str, Any]
    make: Make
    held: str


def _ct(kind: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **weights}}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}


def packed_config(bits: int, group: int) -> dict[str, Any]:
    return _ct("pack-quantized", num_bits=bits, group_size=group or None, strategy="group" if group else "channel")


BLOCKS: Mapping[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
AWQ: Mapping[str, Any] = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
GPTQ: Mapping[str, Any] = {"quant_method": "gptq", "bits": 4, "desc_act": False}
SCHEMES: Mapping[str, Quantised] = {
    "fp8 blocks": Quantised(BLOCKS, float8((128, 128)), "fp8"),
    "fp8 blocks bf16": Quantised(BLOCKS, float8((128, 128), "BF16"), "fp8"),
    "fp8 small blocks": Quantised({**BLOCKS, "weight_block_size": [32, 64]}, float8((32, 64)), "fp8/64"),
    "fp8 blocks of 16": Quantised({**BLOCKS, "weight_block_size": [16, 16]}, float8((16, 16)), "f32"),
    "fp8 tensor": Quantised(
        {"quant_method": "modelopt", "quant_algo": "FP8"}, float8(None, ending=".weight_scale"), "fp8"
    ),
    "fp8 rows": Quantised(_ct("float-quantized", num_bits=8), float8((1, 0), "BF16", ".weight_scale"), "fp8"),
    "int4 32": Quantised(packed_config(4, 32), packed(4, 32, "BF16"), "int4/32"),
    "int4 128": Quantised(packed_config(4, 128), packed(4, 128, "BF16"), "int4"),
    "int4 32 f16": Quantised(packed_config(4, 32), packed(4, 32, "F16"), "q4_0"),
    "int4 rows f16": Quantised(packed_config(4, 0), packed(4, 0, "F16"), "int4_f16"),
    "int4 64 zeros": Quantised(packed_config(4, 64), packed(4, 64, "BF16", zero_points=True), "int4_bf16/64"),
    "int4 16": Quantised(packed_config(4, 16), packed(4, 16, "BF16"), "f32"),
    "int4 64 plain order": Quantised(packed_config(4, 64), packed(4, 64, "BF16", order="plain"), "int4/64"),
    "int4 64 unset order": Quantised(packed_config(4, 64), packed(4, 64, "BF16", order="unset"), "int4/64"),
    "int4 64 any order": Quantised(packed_config(4, 64), packed(4, 64, "BF16", zero_points=True, order="any"), "q8_0"),
    "int4 128 f32": Quantised(packed_config(4, 128), packed(4, 128, "F32"), "int8"),
    "int8 32": Quantised(packed_config(8, 32), packed(8, 32, "BF16"), "int8/32"),
    "int8 rows zeros": Quantised(packed_config(8, 0), packed(8, 0, "F16", zero_points=True), "int8"),
    "int8": Quantised(_ct("int-quantized", num_bits=8), bytes_with_scales(), "int8"),
    "int8 zeros": Quantised(_ct("int-quantized", num_bits=8), bytes_with_scales(zero_points=True), "int8"),
    "awq 128": Quantised({**AWQ, "group_size": 128}, awq(128), "int4_f16"),
    "awq 64": Quantised({**AWQ, "group_size": 64}, awq(64), "int4_f16/64"),
    "awq 32": Quantised({**AWQ, "group_size": 32}, awq(32), "int4_f16/32"),
    "awq 16": Quantised({**AWQ, "group_size": 16}, awq(16), "f32"),
    "gptq 128": Quantised({**GPTQ, "group_size": 128}, gptq(128, order="plain"), "int4_f16"),
    "gptq 64": Quantised({**GPTQ, "group_size": 64}, gptq(64), "int4_f16/64"),
    "gptq 32 bf16": Quantised({**GPTQ, "group_size": 32}, gptq(32, dtype="BF16"), "int4_bf16/32"),
    "gptq rows": Quantised({**GPTQ, "group_size": -1}, gptq(0, order="plain"), "int4_f16"),
    "gptq v2": Quantised({**GPTQ, "group_size": 128, "checkpoint_format": "gptq_v2"}, gptq(128, less=0), "int4_f16"),
    "gptq 8": Quantised({**GPTQ, "bits": 8, "group_size": 128}, gptq(128, 8), "int8"),
    "gptq plain order": Quantised({**GPTQ, "group_size": 128, "desc_act": True}, gptq(128, order="plain"), "int4_f16"),
    "gptq any order": Quantised({**GPTQ, "group_size": 128, "desc_act": True}, gptq(128, order="any"), "q8_0"),
    "mxfp4": Quantised(_ct("mxfp4-pack-quantized", num_bits=4), mxfp4(".weight_packed", ".weight_scale"), "mxfp4"),
    "mxfp4 e8m0": Quantised({"quant_method": "fp8"}, mxfp4(".weight", ".scale", "F8_E8M0"), "mxfp4"),
    "nvfp4": Quantised(
        _ct("nvfp4-pack-quantized", num_bits=4), nvfp4(".weight_packed", ".weight_global_scale"), "nvfp4"
    ),
    "nvfp4 modelopt": Quantised(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4(".weight", ".weight_scale_2"), "nvfp4"
    ),
}

SIZES: Mapping[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 96,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
}  # fmt: skip
"""Heads are narrower than groups of 128; there are three panels, and two KV heads: ranks cut groups."""


@dataclass
class Written:
    """A folder, and the values of its tensors in float64."""

    folder: Path
    values: dict[str, Array] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)

    def write(self, config: Mapping[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(dict(config)))
        (self.folder / "model.safetensors").write_bytes(as_safetensors(self.arrays))


def as_safetensors(arrays: Arrays) -> bytes:
    """A file of arrays by name."""
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, array) in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def written(folder: Path, scheme: str, sizes: Mapping[str, Any] = SIZES, changes: Arrays | None = None) -> Written:
    """A model whose layers' matrices are quantised; `changes` replace arrays, or take them out where they are empty."""
    quantised, rng = SCHEMES[scheme], np.random.default_rng(11)
    made = Written(folder)
    for spec in ModelConfig.from_hf(sizes).tensors(WeightTypes(WEIGHT_TYPES["f32"])):
        for name in spec.source_names:
            if spec.vector or name in (EMBEDDING, LM_HEAD) or name.endswith("mlp.gate.weight"):
                values = (
                    rng.uniform(0.6, 1.4, spec.source_shape) if spec.vector else rng.standard_normal(spec.source_shape)
                )
                bits = bf16(values * (1 if spec.vector else 0.1))
                made.arrays[name], made.values[name] = ("BF16", bits), float_of(bits, "BF16")
                continue
            arrays, made.values[name] = quantised.make(rng, spec.source_shape, spec.source_shape[1] ** -0.5)
            made.arrays.update({name.removesuffix(".weight") + ending: array for ending, array in arrays.items()})
    for name, change in (changes or {}).items():
        made.arrays[name] = change
    made.arrays = {name: array for name, array in made.arrays.items() if array[0]}
    made.write({**sizes, "quantization_config": quantised.config})
    return made


def write_values(folder: Path, made: Written, sizes: Mapping[str, Any] = SIZES) -> Path:
    """The same model in float32, which has the values but for their last bits."""
    plain = Written(folder, arrays={name: ("F32", values.astype(np.float32)) for name, values in made.values.items()})
    plain.write(sizes)
    return folder


# -- models with delta nets as their makers publish them --------------------------------------------------------------

LEFT_ALONE = re.compile(
    r"norm\.|\.A_log$|\.dt_bias$|\.conv1d\.|\.in_proj_(a|b|ba)\.|\.mlp\.gate\.|\.shared_expert_gate\.|embed_tokens|lm_head|"
    r"mtp\.fc|visual"
)
"""What Qwen3-Next and Qwen3.5 in FP8 have in bfloat16."""
BESIDE = {"mtp.fc.weight": (32, 32), "mtp.layers.0.mlp.experts.0.up_proj.weight": (40, 32), "model.visual.x": (3,)}
"""Stands for what Qwen3.5 has beside its language model."""


def delta_net_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of Qwen3-Next, or of Qwen3.5 as a language model, and their shapes."""
    c, hidden = config, config["hidden_size"]
    following, experts = c["model_type"] == "qwen3_next", c.get("num_experts", 0)
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    heads, values = c["linear_num_value_heads"], c["linear_num_value_heads"] * c["linear_value_head_dim"]
    queries, kv = (c["head_dim"] * c[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    net: dict[str, tuple[int, ...]] = {
        "conv1d.weight": (2 * keys + values, 1, 4), "A_log": (heads,), "dt_bias": (heads,),
        "norm.weight": (c["linear_value_head_dim"],), "out_proj.weight": (hidden, values),
    }  # fmt: skip
    rows = {"qkvz": 2 * keys + 2 * values, "ba": 2 * heads}
    if not following:
        rows = {"qkv": 2 * keys + values, "z": values, "a": heads, "b": heads}
    net |= {f"in_proj_{part}.weight": (count, hidden) for part, count in rows.items()}
    attention: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (2 * queries, hidden), "k_proj.weight": (kv, hidden), "v_proj.weight": (kv, hidden),
        "o_proj.weight": (hidden, queries), "q_norm.weight": (c["head_dim"],), "k_norm.weight": (c["head_dim"],),
    }  # fmt: skip
    mlp: dict[str, tuple[int, ...]] = {}
    of_experts = {f"experts.{e}.": c["moe_intermediate_size"] for e in range(experts)}
    if experts:
        of_experts["shared_expert."] = c["shared_expert_intermediate_size"]
        mlp = {"gate.weight": (experts, hidden), "shared_expert_gate.weight": (1, hidden)}
    for prefix, inner in (of_experts or {"": c["intermediate_size"]}).items():
        mlp |= {f"{prefix}{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        mlp[f"{prefix}down_proj.weight"] = hidden, inner
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,),
    }  # fmt: skip
    for i, kind in enumerate(c["layer_types"]):
        layer = f"model.layers.{i}."
        mixer = ("linear_attn.", net) if kind == "linear_attention" else ("self_attn.", attention)
        for prefix, tensors in (mixer, ("mlp.", mlp)):
            found |= {layer + prefix + name: shape for name, shape in tensors.items()}
        found |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return found if c["tie_word_embeddings"] else {**found, "lm_head.weight": (c["vocab_size"], hidden)}


def delta_net_in_fp8(folder: Path, config: Mapping[str, Any]) -> tuple[Written, Mapping[str, Any]]:
    """Random numbers, matrices in blocks of 128 x 128; and the configuration without quantisation.

    Qwen3.5 is the language model of one that sees.
    """
    made, rng, within = Written(folder), np.random.default_rng(13), config["model_type"] != "qwen3_next"
    shapes = delta_net_tensors(config)
    if within:
        shapes = {re.sub(r"^model\.", "model.language_model.", name): shape for name, shape in shapes.items()} | BESIDE
        kind = str(config["model_type"]).removesuffix("_text")
        config = {"model_type": kind, "text_config": config, "vision_config": {}}
    for name, shape in shapes.items():
        if not LEFT_ALONE.search(name):
            arrays, made.values[name] = float8((128, 128))(rng, (shape[0], shape[1]), shape[1] ** -0.5)
            made.arrays.update({name.removesuffix(".weight") + ending: array for ending, array in arrays.items()})
            continue
        size = 1.0 if "A_log" in name else 0.1 if len(shape) == 1 or "embed" in name else shape[-1] ** -0.5
        bits = bf16(rng.standard_normal(shape) * size + ("linear_attn.norm" in name))
        made.arrays[name], made.values[name] = ("BF16", bits), float_of(bits, "BF16")
    kept = [name.removesuffix(".weight") for name in shapes if LEFT_ALONE.search(name)]
    made.write({**config, "quantization_config": {**BLOCKS, "modules_to_not_convert": kept}})
    return made, config
