"""distributed-llama's files, written from the format's description: tables, tokenizers, refusals, and damage."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint
from mpillama.formats.checkpoints import read_checkpoint
from mpillama.formats.dllama.model import place_tensors, read_dllama
from mpillama.models.config import ModelConfig
from mpillama.models.families import FAMILIES
from mpillama.quant.types.q4_0 import Q4_0
from mpillama.quant.types.q8_0 import Q8_0
from tests.formats.checking import as_pairs, mangled, refusal, values, within_bounds

LLAMA, QWEN3, QWEN3_MOE = 0xABCD00, 0xABCD01, 0xABCD02
DIM, INNER, EXPERT, HEADS, KV_HEADS, HEAD, VOCAB = 64, 96, 32, 4, 2, 32, 9
KEYS = {
    **{"version": 0, "arch_type": 1, "dim": 2, "hidden_dim": 3, "n_layers": 4, "n_heads": 5, "n_kv_heads": 6},
    **{"n_experts": 7, "n_active_experts": 8, "vocab_size": 9, "max_seq_len": 10, "hidden_act": 11, "rope_theta": 12},
    **{"weights_float_type": 13, "rope_scaling_factor": 14, "rope_scaling_low_freq_factor": 15},
    **{"rope_scaling_high_freq_factor": 16, "rope_scaling_orig_max_seq_len": 17, "rope_type": 18, "head_dim": 19},
    **{"norm_epsilon": 20, "moe_hidden_dim": 21},
}
BASE = {
    **{"version": 0, "arch_type": LLAMA, "dim": DIM, "hidden_dim": INNER, "n_layers": 2, "n_heads": HEADS},
    **{"n_kv_heads": KV_HEADS, "n_experts": 0, "n_active_experts": 0, "vocab_size": VOCAB, "max_seq_len": 512},
    **{"hidden_act": 1, "rope_theta": 500000, "weights_float_type": 2, "head_dim": HEAD},
}
ARCHITECTURES = {
    "llama": BASE,
    "qwen3": {**BASE, "arch_type": QWEN3, "norm_epsilon": 6},
    "qwen3_moe": {
        **BASE,
        **{"arch_type": QWEN3_MOE, "norm_epsilon": 6, "n_experts": 3, "n_active_experts": 2, "moe_hidden_dim": EXPERT},
    },
}
FLOATS = ("f32", "f16", "q4_0", "q8_0")
"""Stored types by their numbers."""


def header_of(pairs: Mapping[str, int]) -> bytes:
    numbers = [number for key, value in pairs.items() for number in (KEYS[key], value)]
    return struct.pack(f"<Ii{len(numbers)}i", 0x0A00ABCD, 8 + 4 * len(numbers), *numbers)


def tensor_order(pairs: Mapping[str, int]) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of each tensor and whether it is a matrix of weights_float_type, in the order of the file."""
    order: dict[str, tuple[tuple[int, ...], bool]] = {"model.embed_tokens.weight": ((VOCAB, DIM), False)}
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    for n in range(pairs["n_layers"]):
        prefix = f"model.layers.{n}."
        for name, shape in (("q", (q, DIM)), ("k", (kv, DIM)), ("v", (kv, DIM)), ("o", (DIM, q))):
            order[f"{prefix}self_attn.{name}_proj.weight"] = (shape, True)
        inner, boxes = INNER, [f"{prefix}mlp."]
        if pairs["n_experts"]:
            order[f"{prefix}mlp.gate.weight"] = ((pairs["n_experts"], DIM), False)
            inner, boxes = EXPERT, [f"{prefix}mlp.experts.{e}." for e in range(pairs["n_experts"])]
        for box in boxes:
            for name, shape in (("gate", (inner, DIM)), ("down", (DIM, inner)), ("up", (inner, DIM))):
                order[f"{box}{name}_proj.weight"] = (shape, True)
        if pairs["arch_type"] != LLAMA:
            order |= {f"{prefix}self_attn.{name}_norm.weight": ((HEAD,), False) for name in "qk"}
        order |= {f"{prefix}{name}_layernorm.weight": ((DIM,), False) for name in ("input", "post_attention")}
    return {**order, "model.norm.weight": ((DIM,), False), "lm_head.weight": ((VOCAB, DIM), True)}


def stored_bytes(tensor: np.ndarray, stored: str) -> bytes:
    if stored in ("f32", "f16"):
        return tensor.astype(stored.replace("f32", "<f4").replace("f16", "<f2")).tobytes()
    quantised, scales = (Q4_0 if stored == "q4_0" else Q8_0).quantise(tensor)
    if stored == "q4_0":
        quantised = quantised[:, :, :16] | quantised[:, :, 16:] << 4
    return np.concatenate([scales[:, :, None].view(np.uint8), quantised.view(np.uint8)], axis=2).tobytes()


def rounded(tensor: np.ndarray, stored: str) -> np.ndarray:
    """The tensor as it comes back."""
    if stored == "q4_0":
        return Q4_0.dequantise(Q4_0.quantise(tensor))
    if stored == "q8_0":
        return Q8_0.dequantise(Q8_0.quantise(tensor))
    return tensor.astype(stored.replace("f32", "f4").replace("f16", "f2")).astype(np.float32)


def write_model(path: Path, pairs: Mapping[str, int] = BASE, extra: bytes = b"") -> dict[str, np.ndarray]:
    """Write a model of random weights; returns them as they come back."""
    rng, stored = np.random.default_rng(8), FLOATS[pairs["weights_float_type"]]
    data, written = header_of(pairs), {}
    for name, (shape, matrix) in tensor_order(pairs).items():
        tensor, kind = rng.standard_normal(shape).astype(np.float32), stored if matrix else "f32"
        rotated = pairs["arch_type"] == LLAMA and ("q_proj" in name or "k_proj" in name)
        data += stored_bytes(as_pairs(tensor, HEAD) if rotated else tensor, kind)
        written[name] = rounded(tensor, kind)
    path.write_bytes(data + extra)
    return written


TOKENS = [b"a", b"\xff\xc3", b" b", b"\0", "ä".encode(), b"cd", b"<s>", b"</s>", b"<|eot|>"]
TEMPLATE = "{{ ä }}".encode()
PAIRS = {"version": (0, 1), "vocab_size": (1, VOCAB), "max_token_length": (2, 7), "bos_id": (3, 6), "add_bos": (10, 1)}


def tokenizer_bytes(pairs: Mapping[str, tuple[int, int]], eos: tuple[int, ...], parts: tuple[bytes, ...] = ()) -> bytes:
    numbers = [number for pair in pairs.values() for number in pair]
    data = struct.pack(f"<Ii{len(numbers)}i", 0x567124, 8 + 4 * len(numbers), *numbers) + b"".join(parts)
    data += struct.pack(f"<{len(eos)}i", *eos)
    return data + b"".join(struct.pack("<fI", -i, len(token)) + token for i, token in enumerate(TOKENS))


WHOLE = tokenizer_bytes({**PAIRS, "chat_template": (7, len(TEMPLATE)), "n_eos": (9, 2)}, (7, 8), (TEMPLATE,))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "m.m")
    (tmp_path / "m.t").write_bytes(WHOLE)
    return tmp_path / "m.m"


def read(path: Path, tokenizer: Path | None = None) -> Checkpoint:
    return read_dllama(str(path), None if tokenizer is None else str(tokenizer))


def refused(path: Path) -> str:
    return refusal(lambda: read(path), path)


# -- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", range(4))
@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_every_tensor_of_every_architecture_and_type(tmp_path, arch, stored):
    written = write_model(tmp_path / "m.m", {**ARCHITECTURES[arch], "weights_float_type": stored})
    (tmp_path / "m.t").write_bytes(WHOLE)
    checkpoint = read_checkpoint(str(tmp_path / "m.m"))
    assert (checkpoint.kind, checkpoint.files) == ("dllama", (str(tmp_path / "m.m"),))
    assert list(checkpoint.tensors) == list(written)
    for name, tensor in written.items():
        assert checkpoint.tensors[name].shape == tensor.shape
        assert np.array_equal(values(checkpoint, name), tensor)
    assert ModelConfig.from_hf(checkpoint.config_json).num_hidden_layers == 2


def test_the_configuration_of_a_llama(model):
    assert read(model).config_json == {
        "model_type": "llama",
        "hidden_size": DIM,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 6,
        "eos_token_id": [7, 8],
    }


def test_the_configuration_of_a_qwen3_moe(model):
    write_model(model, {**ARCHITECTURES["qwen3_moe"], "rope_type": 1})
    config = read(model).config_json
    assert config["model_type"] == "qwen3_moe"
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (3, 2, EXPERT)
    assert config["norm_topk_prob"] is True
    assert config["rms_norm_eps"] == 1e-6


def test_the_scaling_of_llama_3(model):
    scaling = {"rope_scaling_factor": 8, "rope_scaling_low_freq_factor": 1, "rope_scaling_high_freq_factor": 4}
    write_model(model, {**BASE, **scaling, "rope_scaling_orig_max_seq_len": 8192, "rope_type": 2})
    assert read(model).config_json["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_defaults(model):
    pairs = {key: value for key, value in BASE.items() if key not in ("rope_theta", "head_dim", "hidden_act")}
    data = bytearray(header_of({**pairs, "n_heads": 2, "n_kv_heads": 2}))
    model.write_bytes(data)
    assert "model.embed_tokens.weight" in refused(model)
    write_model(model, {key: value for key, value in BASE.items() if key != "rope_theta"})
    assert read(model).config_json["rope_theta"] == 10000.0


def test_known_sizes():
    """8B, 70B and 405B of Llama 3 in q4_0: the table is laid out for exactly these sizes, and for no other."""
    sizes = {6_323_781_632: (4096, 14336, 32, 32), 43_302_682_624: (8192, 28672, 80, 64)}
    dllama = FAMILIES["llama"].dllama
    sizes[235_530_158_080] = (16384, 53248, 126, 128)
    for expected, (hidden, inner, layers, heads) in sizes.items():
        config = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "vocab_size": 128256}
        config |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
        config |= {"num_hidden_layers": layers}
        assert place_tensors("m.m", config, dllama, "q4_0", 0, expected)["lm_head.weight"].shape == (128256, hidden)
        with pytest.raises(UserError, match=rf"{expected + 1} bytes, expected {expected} "):
            place_tensors("m.m", config, dllama, "q4_0", 0, expected + 1)


# -- tokenizers -----------------------------------------------------------------------------------------------------


def vocabulary(checkpoint: Checkpoint) -> Any:
    return json.loads(checkpoint.texts["dllama_vocabulary.json"])


def test_a_tokenizer(model):
    checkpoint = read(model)
    assert checkpoint.texts["chat_template.jinja"] == TEMPLATE
    found = vocabulary(checkpoint)
    assert [token.encode("latin-1") for token in found.pop("tokens")] == TOKENS
    assert found == {
        "scores": [-float(i) for i in range(VOCAB)],
        "bos": 6,
        "eos": [7, 8],
        "add_bos": True,
        "regular_vocab_size": 6,
    }


def test_a_tokenizer_of_the_old_form(model):
    head = struct.pack("<IIIiii", 0x567123, VOCAB, 20, 6, 7, -1)
    tokens = b"".join(struct.pack("<fI", -i, len(token)) + token for i, token in enumerate(TOKENS))
    model.with_suffix(".t").write_bytes(head + tokens)
    found = vocabulary(read(model))
    assert [token.encode("latin-1") for token in found["tokens"]] == TOKENS
    assert (found["bos"], found["eos"], found["add_bos"]) == (6, [7], True)
    assert "chat_template.jinja" not in read(model).texts


def test_obsolete_keys(model):
    pairs = {
        **PAIRS,
        "eos_id": (4, 7),
        "pad_id": (5, -1),
        "chat_eos_id": (6, 8),
        "chat_stop": (8, 3),
        "add_bos": (10, 0),
    }
    model.with_suffix(".t").write_bytes(tokenizer_bytes(pairs, (), (b"\0st",)))
    checkpoint = read(model)
    assert checkpoint.texts.keys() == {"dllama_vocabulary.json"}
    assert vocabulary(checkpoint)["eos"] == [7, 8]
    assert vocabulary(checkpoint)["add_bos"] is False


def test_without_bos(model):
    model.with_suffix(".t").write_bytes(tokenizer_bytes({**PAIRS, "bos_id": (3, -1)}, ()))
    checkpoint = read(model)
    assert "bos_token_id" not in checkpoint.config_json
    assert "eos_token_id" not in checkpoint.config_json
    assert vocabulary(checkpoint)["bos"] is None
    assert vocabulary(checkpoint)["regular_vocab_size"] == VOCAB


@pytest.mark.parametrize(
    ("model_name", "beside", "expected"),
    [
        ("a.m", ["z.t"], "z.t"),
        ("a.m", ["a.t", "b.t", "dllama_tokenizer_a.t"], "a.t"),
        ("dllama_model_llama3_1b_q40.m", ["other.t", "dllama_tokenizer_llama3_1b.t"], "dllama_tokenizer_llama3_1b.t"),
        ("dllama_model_x_2b_q40.m", ["dllama_tokenizer_x.t", "dllama_tokenizer_x_2b.t"], "dllama_tokenizer_x_2b.t"),
        ("model.m", ["other.t", "dllama_tokenizer_y.t"], "dllama_tokenizer_y.t"),
    ],
)
def test_the_tokenizer_beside_a_model(tmp_path, model_name, beside, expected):
    write_model(tmp_path / model_name)
    for name in beside:
        (tmp_path / name).write_bytes(WHOLE if name == expected else b"not this")
    assert read(tmp_path / model_name).config_json["bos_token_id"] == 6


@pytest.mark.parametrize("beside", [[], ["a.t", "b.t"], ["dllama_tokenizer_a.t", "dllama_tokenizer_b.t"]])
def test_no_tokenizer_or_too_many(tmp_path, beside):
    write_model(tmp_path / "m.m")
    for name in beside:
        (tmp_path / name).write_bytes(WHOLE)
    assert "tokenizer" in refused(tmp_path / "m.m")
    (tmp_path / "given").write_bytes(WHOLE)
    assert read_checkpoint(str(tmp_path / "m.m"), str(tmp_path / "given")).config_json["bos_token_id"] == 6


@pytest.mark.parametrize(
    "pairs",
    [
        {"vocab_size": (1, 0)},
        {"vocab_size": (1, -1)},
        {"vocab_size": (1, 2**31 - 1)},
        {"vocab_size": (1, VOCAB - 1)},
        {"vocab_size": (1, VOCAB + 1)},
        {"chat_template": (7, 2**31 - 1)},
        {"chat_template": (7, -1)},
        {"chat_stop": (8, -5)},
        {"n_eos": (9, 2**31 - 1)},
        {"n_eos": (9, -1)},
        {"bos_id": (3, VOCAB)},
        {"bos_id": (3, -2)},
        {"eos_id": (4, VOCAB)},
        {"version": (0, 2)},
        {"version": (0, 0)},
        {"unknown": (11, 1)},
        {"negative": (-1, 1)},
        {"again": (1, VOCAB)},
    ],
)
def test_tokenizers_that_make_no_sense(model, pairs):
    model.with_suffix(".t").write_bytes(tokenizer_bytes({**PAIRS, **pairs}, ()))
    assert within_bounds(lambda: read(model)) is None
    refusal(lambda: read(model), model.with_suffix(".t"))


@pytest.mark.parametrize("data", [b"", b"ab", b"GGUF and more", struct.pack("<II", 0x567123, VOCAB), b"\x24\x71\x56\0"])
def test_other_tokenizer_files(model, data):
    model.with_suffix(".t").write_bytes(data)
    refusal(lambda: read(model), model.with_suffix(".t"))


def test_a_missing_tokenizer(model):
    assert "no such file" in refusal(lambda: read(model, model.with_name("none.t")), model.with_name("none.t"))


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("magic", [0xABCD00, 0xABCD01])
def test_models_from_before_version_0_3(model, magic):
    model.write_bytes(struct.pack("<10i", magic, *range(1, 10)))
    assert "0.3" in refused(model)
    assert "0.3" in refusal(lambda: read_checkpoint(str(model)), model)


@pytest.mark.parametrize("data", [b"\xcd\xab", b"GGUF and more"])
def test_other_files(model, data):
    model.write_bytes(data)
    assert "not a distributed-llama model" in refused(model)


def test_an_empty_file(model):
    model.write_bytes(b"")
    assert "an empty file" in refused(model)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"arch_type": 0xABCD03}, "arch_type"),
        ({"weights_float_type": 4}, "weights_float_type"),
        ({"weights_float_type": -1}, "weights_float_type"),
        ({"norm_epsilon": 7}, "norm_epsilon"),
        ({"rope_type": 1}, "rope_type"),
        ({"rope_type": 2}, "rope_scaling_factor"),
        ({"rope_scaling_factor": 8}, "rope_scaling_factor=8"),
        ({"n_experts": 8}, "n_experts"),
        ({"arch_type": QWEN3_MOE}, "n_experts"),
        ({"arch_type": QWEN3_MOE, "n_experts": 2**31 - 1}, "n_experts"),
        ({"dim": 0}, "dim"),
        ({"dim": -64}, "dim"),
        ({"dim": 65}, "65"),
        ({"n_layers": 2**31 - 1}, "n_layers"),
        ({"n_heads": 0}, "n_heads"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"head_dim": 2**31 - 1}, "head_dim"),
    ],
)
def test_headers_that_make_no_sense(model, changed, named):
    size = model.stat().st_size
    header = header_of({**BASE, **changed})
    model.write_bytes(header + bytes(size - len(header)))
    assert within_bounds(lambda: read(model)) is None
    assert named in refused(model) or named == "head_dim"


def test_a_header_without_the_type_of_the_weights(model):
    model.write_bytes(header_of({key: value for key, value in BASE.items() if key != "weights_float_type"}))
    assert "weights_float_type=None" in refused(model)


@pytest.mark.parametrize("pairs", [[(22, 1)], [(-1, 1)], [(2, 64), (2, 64)]])
def test_keys_that_make_no_sense(model, pairs):
    model.write_bytes(
        struct.pack("<Ii", 0x0A00ABCD, 8 + 8 * len(pairs)) + b"".join(struct.pack("<2i", *p) for p in pairs)
    )
    assert "key" in refused(model)


@pytest.mark.parametrize("length", [0, 7, -8, 12, 2**31 - 1, 2**31 - 8, 8 * 1000])
def test_header_lengths_that_make_no_sense(model, length):
    model.write_bytes(struct.pack("<Ii", 0x0A00ABCD, length) + bytes(64))
    assert "header" in refused(model)


def test_a_model_cut_short_or_too_long_names_both_sizes_and_the_place(model):
    data = model.read_bytes()
    for cut, name in ((1, "lm_head.weight"), (VOCAB * DIM // 32 * 18 + 1, "model.norm.weight")):
        model.write_bytes(data[:-cut])
        sentence = refused(model)
        assert f"{len(data) - cut} bytes" in sentence
        assert f"expected {len(data)}" in sentence
        assert name in sentence
    model.write_bytes(data + b"\0")
    assert f"{len(data) + 1} bytes" in refused(model)
    assert "after the last tensor" in refused(model)


def test_absurd_sizes_cost_nothing(model):
    """The largest sizes that a header can name, in a file that claims to have them."""
    biggest = {**ARCHITECTURES["qwen3_moe"], "n_experts": 4096, "n_layers": 10000, "vocab_size": 2**31 - 1}
    model.write_bytes(header_of(biggest))
    with model.open("ab") as file:
        file.truncate(2**36)
    assert within_bounds(lambda: read(model)) is None


# -- random damage --------------------------------------------------------------------------------------------------

ONE_LAYER = {**BASE, "n_layers": 1, "weights_float_type": 2}
HEADER = len(header_of(ONE_LAYER))


@pytest.mark.timeout(600)
@given(damage=st.data())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_to_a_model(model, damage):
    write_model(model, ONE_LAYER)
    model.write_bytes(damage.draw(mangled(model.read_bytes(), HEADER)))
    within_bounds(lambda: read(model))


@pytest.mark.timeout(600)
@given(data=mangled(WHOLE, len(WHOLE)))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_to_a_tokenizer(model, data):
    model.with_suffix(".t").write_bytes(data)
    within_bounds(lambda: read(model))


@pytest.mark.timeout(120)
def test_every_truncation_of_a_header_and_of_a_tokenizer(model):
    data = model.read_bytes()
    for length in range(HEADER + 8):
        model.write_bytes(data[:length])
        refused(model)
    model.write_bytes(data)
    for length in range(len(WHOLE)):
        model.with_suffix(".t").write_bytes(WHOLE[:length])
        refusal(lambda: read(model), model.with_suffix(".t"))
