"""GGUF files of the gguf package's writer: tables and configurations, refusals, and damage."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, RopeScalingType
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint
from mpillama.formats.checkpoints import read_checkpoint
from mpillama.formats.gguf.file import read_gguf
from mpillama.formats.gguf.header import GGML_TYPES
from mpillama.models.config import ModelConfig
from mpillama.quant.ggml import UNREAD
from mpillama.quant.registry import STORED_TYPES
from tests.formats.checking import as_pairs, mangled, refusal, values, within_bounds

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCAB, EXPERTS = 64, 96, 4, 2, 16, 40, 3
TOKENS = [f"t{i}" for i in range(VOCAB - 1)] + ["ä▁"]
LAYER = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HEADS * HEAD, HIDDEN),
    "attn_k.weight": (KV_HEADS * HEAD, HIDDEN),
    "attn_v.weight": (KV_HEADS * HEAD, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * HEAD),
    "ffn_norm.weight": (HIDDEN,),
}
DENSE = {"ffn_gate.weight": (INNER, HIDDEN), "ffn_up.weight": (INNER, HIDDEN), "ffn_down.weight": (HIDDEN, INNER)}
SPARSE = {
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_gate_exps.weight": (EXPERTS, INNER, HIDDEN),
    "ffn_up_exps.weight": (EXPERTS, INNER, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, INNER),
}
HEAD_NORMS = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
BIASES = {"attn_q.bias": (HEADS * HEAD,), "attn_k.bias": (KV_HEADS * HEAD,), "attn_v.bias": (KV_HEADS * HEAD,)}
KINDS = {
    "llama": {**LAYER, **DENSE},
    "qwen2": {**LAYER, **BIASES, **DENSE},
    "qwen3": {**LAYER, **HEAD_NORMS, **DENSE},
    "qwen3moe": {**LAYER, **HEAD_NORMS, **SPARSE},
}
HUGGING_FACE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}


def tensors_of(layer: Mapping[str, tuple[int, ...]], layers: int = 2, tied: bool = False) -> dict[str, np.ndarray]:
    """Random tensors under GGUF's names, in shapes as NumPy has them."""
    rng = np.random.default_rng(2)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    shapes |= {f"blk.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    shapes |= {} if tied else {"output.weight": (VOCAB, HIDDEN)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


class Written:
    """A GGUF file in the making."""

    def __init__(self, path: Path, arch: str = "llama", **options: Any):
        self.path = path
        self.writer = GGUFWriter(path, arch, **options)

    def metadata(self, layers: int = 2) -> "Written":
        writer = self.writer
        writer.add_block_count(layers)
        writer.add_context_length(4096)
        writer.add_vocab_size(VOCAB)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(500000.0)
        return self

    def vocabulary(self) -> "Written":
        writer = self.writer
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(TOKENS)
        writer.add_token_types([1] * VOCAB)
        writer.add_token_scores([0.5] * VOCAB)
        writer.add_token_merges(["a b", "ä c"])
        writer.add_bos_token_id(3)
        writer.add_eos_token_id(5)
        writer.add_eot_token_id(7)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ ä }}")
        return self

    def tensors(self, tensors: Mapping[str, np.ndarray], kind: str = "f32") -> Path:
        """Vectors as float32, matrices as `kind`; then the file is finished."""
        for name, tensor in tensors.items():
            stored = GGMLQuantizationType[kind.upper() if tensor.ndim > 1 else "F32"]
            self.writer.add_tensor(name, quantize(tensor, stored), raw_dtype=stored)
        return self.finish()

    def finish(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


def read(path: Path) -> Checkpoint:
    return read_gguf(str(path))


def refused(path: Path) -> str:
    return refusal(lambda: read(path))


def expected_values(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under Hugging Face's names, experts one by one."""
    expected = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix("blk.").split(".")
        prefix = f"model.layers.{parts.pop(0)}." if name.startswith("blk.") else ""
        if parts[0].endswith("_exps"):
            kind = parts[0].removeprefix("ffn_").removesuffix("_exps")
            expected |= {f"{prefix}mlp.experts.{e}.{kind}_proj.weight": one for e, one in enumerate(tensor)}
        else:
            expected[f"{prefix}{HUGGING_FACE[parts[0]]}.{parts[1]}"] = tensor
    return expected


def in_pairs(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with queries and keys as converters write them for Llama."""
    return {name: as_pairs(t, HEAD) if ".attn_q." in name or ".attn_k." in name else t for name, t in tensors.items()}


# -- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", list(KINDS))
def test_every_tensor_of_every_architecture(tmp_path, arch):
    tensors = tensors_of(KINDS[arch], tied=arch == "qwen2")
    written = Written(tmp_path / "m.gguf", arch).metadata()
    if arch == "qwen3moe":
        written.writer.add_expert_count(EXPERTS)
        written.writer.add_expert_used_count(2)
        written.writer.add_expert_feed_forward_length(INNER)
    path = written.tensors(in_pairs(tensors) if arch == "llama" else tensors)
    checkpoint = read_checkpoint(str(path))
    assert (checkpoint.kind, checkpoint.files) == ("gguf", (str(path),))
    assert checkpoint.file_sizes == (path.stat().st_size,)
    expected = expected_values(tensors)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].name == name
        assert checkpoint.tensors[name].shape == tensor.shape
        rotated = arch == "llama" and ("q_proj" in name or "k_proj" in name)
        assert checkpoint.tensors[name].interleaved == (HEAD if rotated else 0)
        assert np.array_equal(values(checkpoint, name), tensor)
    assert ModelConfig.from_hf(checkpoint.config_json).num_hidden_layers == 2


@pytest.mark.parametrize("stored", list(STORED_TYPES))
def test_every_stored_type(tmp_path, stored):
    written, kind = Written(tmp_path / "m.gguf").metadata(), GGMLQuantizationType[stored.upper()]
    raw = np.random.default_rng(4).integers(0, 60, (3, 5, STORED_TYPES[stored].row_bytes(512)), np.uint8)
    written.writer.add_tensor("blk.1.ffn_up_exps.weight", raw, raw_dtype=kind)
    written.writer.add_tensor("blk.1.ffn_up.weight", raw[0], raw_dtype=kind)
    checkpoint = read(written.finish())
    names = ["model.layers.1.mlp.up_proj.weight", *(f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(3))]
    for name, expert in zip(names, [raw[0], *raw], strict=True):
        assert checkpoint.tensors[name].shape == (5, 512)
        assert checkpoint.tensors[name].stored == stored
        assert np.array_equal(values(checkpoint, name), dequantize(expert, kind).reshape(5, 512), equal_nan=True)


@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_offsets_are_those_of_the_gguf_package(tmp_path, alignment):
    written = Written(tmp_path / "m.gguf", "qwen3").metadata().vocabulary()
    if alignment:
        written.writer.add_custom_alignment(alignment)
    path = written.tensors(tensors_of(KINDS["qwen3"]), "q8_0")
    expected = sorted((t.data_offset, t.tensor_type.name.lower(), tuple(t.shape)) for t in GGUFReader(path).tensors)
    found = sorted((t.offset, t.stored, t.shape[::-1]) for t in read(path).tensors.values())
    assert found == expected


def test_version_2_is_read_alike(tmp_path):
    path = Written(tmp_path / "m.gguf").metadata().vocabulary().tensors(tensors_of(KINDS["llama"]))
    third, data = read(path), bytearray(path.read_bytes())
    data[4] = 2
    path.write_bytes(data)
    assert read(path) == third


def test_types_are_numbered_as_in_the_gguf_package():
    assert {number: name.upper() for number, name in {**UNREAD, **GGML_TYPES}.items()} == {
        k.value: k.name for k in GGMLQuantizationType
    }


def test_experts_of_an_older_mixtral(tmp_path):
    names = {f"blk.0.ffn_{kind}.{e}.weight": (e, kind) for e in range(3) for kind in ("gate", "up", "down")}
    tensors = {name: np.full((2, 32), i, np.float32) for i, name in enumerate(names)}
    checkpoint = read(Written(tmp_path / "m.gguf").metadata().tensors(tensors))
    for name, (expert, kind) in names.items():
        found = values(checkpoint, f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight")
        assert np.array_equal(found, tensors[name])


def test_experts_with_gate_and_up_in_one(tmp_path):
    both = np.random.default_rng(1).standard_normal((3, 8, 32)).astype(np.float32)
    checkpoint = read(Written(tmp_path / "m.gguf").metadata().tensors({"blk.0.ffn_gate_up_exps.weight": both}))
    for expert in range(3):
        prefix = f"model.layers.0.mlp.experts.{expert}."
        assert np.array_equal(values(checkpoint, prefix + "gate_proj.weight"), both[expert, :4])
        assert np.array_equal(values(checkpoint, prefix + "up_proj.weight"), both[expert, 4:])


def test_biases_of_a_llama_stand_in_pairs_too(tmp_path):
    tensors = tensors_of({**KINDS["llama"], **BIASES})
    checkpoint = read(Written(tmp_path / "m.gguf").metadata().tensors(in_pairs(tensors)))
    assert checkpoint.config_json["attention_bias"] is True
    for name, tensor in expected_values(tensors).items():
        assert np.array_equal(values(checkpoint, name), tensor)


def test_unknown_tensors_keep_their_names(tmp_path):
    names = ("blk.0.attn_sinks.weight", "blk.x.attn_q.weight", "cls.weight", "blk.0.attn_q.3.weight")
    tensors = {name: np.ones(4, np.float32) for name in names}
    assert read(Written(tmp_path / "m.gguf").metadata().tensors(tensors)).tensors.keys() == tensors.keys()


# -- configuration --------------------------------------------------------------------------------------------------


def config_of(
    path: Path, arch: str = "llama", extra: Any = None, tensors: Mapping[str, np.ndarray] | None = None
) -> Any:
    written = Written(path / "m.gguf", arch).metadata()
    if extra:
        extra(written.writer)
    return read(written.tensors(tensors or {"token_embd.weight": np.ones((VOCAB, HIDDEN), np.float32)})).config_json


def test_the_configuration_of_a_llama(tmp_path):
    path = Written(tmp_path / "m.gguf").metadata().vocabulary().tensors(tensors_of(KINDS["llama"]))
    assert read(path).config_json == {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 3,
        "eos_token_id": [5, 7],
    }


def test_the_configuration_of_a_mixtral(tmp_path):
    def extra(writer: GGUFWriter) -> None:
        writer.add_expert_count(8)
        writer.add_expert_used_count(2)

    config = config_of(tmp_path, extra=extra)
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 8, 2)
    assert config["intermediate_size"] == INNER


@pytest.mark.parametrize(("norm", "expected"), [(None, True), (True, True), (False, False)])
def test_the_configuration_of_a_qwen3_moe(tmp_path, norm, expected):
    def extra(writer: GGUFWriter) -> None:
        writer.add_expert_count(8)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(32)
        writer.add_key_length(24)
        writer.add_value_length(24)
        if norm is not None:
            writer.add_expert_weights_norm(norm)

    config = config_of(tmp_path, "qwen3moe", extra)
    assert (config["model_type"], config["num_experts"], config["num_experts_per_tok"]) == ("qwen3_moe", 8, 2)
    assert (config["moe_intermediate_size"], config["head_dim"]) == (32, 24)
    assert config["norm_topk_prob"] is expected
    assert ModelConfig.from_hf(config).blocks[0].mlp.router.count == 8


@pytest.mark.parametrize(("names", "tied"), [((), True), (("output.weight",), False)])
def test_tied_embeddings(tmp_path, names, tied):
    tensors = {name: np.ones((VOCAB, HIDDEN), np.float32) for name in ("token_embd.weight", *names)}
    assert config_of(tmp_path, tensors=tensors)["tie_word_embeddings"] is tied


@pytest.mark.parametrize(("rows", "tokens", "expected"), [(50, 44, 50), (0, 44, 44)])
def test_the_vocabulary_is_as_long_as_the_embedding_or_the_list_of_tokens(tmp_path, rows, tokens, expected):
    listed = pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", TEXT, tokens) + text("x") * tokens)
    pairs = [pair for pair in metadata_pairs() if b"vocab_size" not in pair]
    table = [("token_embd.weight", (32, rows), 0, 0)] if rows else []
    (tmp_path / "m.gguf").write_bytes(raw_gguf([*pairs, listed], table) + bytes(rows * 128))
    assert read(tmp_path / "m.gguf").config_json["vocab_size"] == expected


def test_a_sliding_window(tmp_path):
    assert config_of(tmp_path, extra=lambda writer: writer.add_sliding_window(128))["sliding_window"] == 128


def test_linear_scaling(tmp_path):
    def extra(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    assert config_of(tmp_path, extra=extra)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_yarn(tmp_path):
    def extra(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(1024)

    config = config_of(tmp_path, "qwen3", extra)
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert ModelConfig.from_hf(config).rope.factor == pytest.approx(1 + 0.1 * np.log(4))


def test_yarn_with_constants_of_its_own(tmp_path):
    def extra(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_attn_factors(0.5)
        writer.add_rope_scaling_yarn_beta_fast(16.0)
        writer.add_rope_scaling_yarn_beta_slow(0.1)

    scaling = config_of(tmp_path, extra=extra)["rope_scaling"]
    assert (scaling["beta_fast"], scaling["beta_slow"]) == (16.0, 0.1)
    assert scaling["attention_factor"] == pytest.approx(0.5 * (1 + 0.1 * np.log(4)))


def yarn_of(tmp_path, **values: float) -> ModelConfig:
    def extra(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        for name, value in values.items():
            writer.add_float32(f"llama.rope.scaling.{name}", value)

    return ModelConfig.from_hf(config_of(tmp_path, extra=extra))


def test_the_attention_factor_of_yarn_is_all_of_it(tmp_path):
    """Converters write Hugging Face's attention_factor as it is; what a second factor is multiplied with is YaRN's."""
    own = 1 + 0.1 * np.log(4)
    assert yarn_of(tmp_path, yarn_attn_factor=1.0).rope.factor == 1.0
    assert yarn_of(tmp_path, yarn_attn_factor=own).rope.factor == pytest.approx(own)
    assert yarn_of(tmp_path, yarn_attn_factor=1.5, attn_factor=0.5).rope.factor == 0.75
    assert yarn_of(tmp_path, attn_factor=0.5).rope.factor == pytest.approx(0.5 * own)
    assert yarn_of(tmp_path, yarn_log_multiplier=1.0).rope.factor == pytest.approx(1.0)
    assert yarn_of(tmp_path, yarn_log_multiplier=0.5).rope.factor == pytest.approx(own / (1 + 0.05 * np.log(4)))
    assert yarn_of(tmp_path, yarn_ext_factor=1.0).rope.factor == pytest.approx(own)
    with pytest.raises(UserError, match=r"rope\.scaling\.yarn_ext_factor=0\.5"):
        yarn_of(tmp_path, yarn_ext_factor=0.5)


def test_a_factor_without_a_rule_is_linear(tmp_path):
    config = config_of(tmp_path, extra=lambda writer: writer.add_rope_scaling_factor(4.0))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("key", "value"), [("freq_base_swa", 1e4), ("scaling.alpha", 2.0), ("scaling.yarn_attn_factor", 1.5)]
)
def test_a_rope_field_that_nobody_reads_is_named(tmp_path, key, value):
    assert config_of(tmp_path, extra=lambda writer: writer.add_float32(f"llama.rope.{key}", 0.0))
    with pytest.raises(UserError, match=rf"llama\.rope\.{key}={value}"):
        config_of(tmp_path, extra=lambda writer: writer.add_float32(f"llama.rope.{key}", value))
    with pytest.raises(UserError, match=r"rope\.dimension_sections=\[4, 4\]"):
        config_of(tmp_path, extra=lambda writer: writer.add_array("llama.rope.dimension_sections", [4, 4]))


def test_frequency_factors_together_with_a_rule(tmp_path):
    written = Written(tmp_path / "m.gguf").metadata()
    written.writer.add_rope_scaling_factor(4.0)
    sentence = refused(written.tensors({"rope_freqs.weight": np.ones(HEAD // 2, np.float32)}))
    assert "'linear'" in sentence
    assert "rope_freqs.weight" in sentence


def test_the_frequency_factors_of_llama_3(tmp_path):
    factors = np.linspace(1, 8, HEAD // 2).astype(np.float32)
    path = Written(tmp_path / "m.gguf").metadata().tensors({**tensors_of(KINDS["llama"]), "rope_freqs.weight": factors})
    checkpoint = read(path)
    assert checkpoint.config_json["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}
    assert not any("rope" in name for name in checkpoint.tensors)
    assert len(ModelConfig.from_hf(checkpoint.config_json).inverse_frequencies()) == HEAD // 2


@pytest.mark.parametrize(
    "factors", [np.ones(HEAD), np.ones((2, HEAD // 4)), np.zeros(HEAD // 2), np.full(HEAD // 2, np.nan)]
)
def test_frequency_factors_that_make_no_sense(tmp_path, factors):
    path = Written(tmp_path / "m.gguf").metadata().tensors({"rope_freqs.weight": factors.astype(np.float32)})
    assert "rope_freqs" in refused(path)


def test_texts(tmp_path):
    texts = read(Written(tmp_path / "m.gguf").metadata().vocabulary().tensors({})).texts
    assert texts["chat_template.jinja"] == "{{ ä }}".encode()
    assert json.loads(texts["gguf_vocabulary.json"]) == {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": TOKENS,
        "token_type": [1] * VOCAB,
        "scores": [0.5] * VOCAB,
        "merges": ["a b", "ä c"],
        "bos_token_id": 3,
        "eos_token_id": 5,
        "eot_token_id": 7,
        "add_bos_token": True,
    }


def test_tokens_that_are_no_utf_8_keep_their_bytes(tmp_path):
    written = Written(tmp_path / "m.gguf").metadata()
    written.writer.add_token_list([b"\xff\xc3" * 4] * VOCAB)
    found = json.loads(read(written.finish()).texts["gguf_vocabulary.json"])["tokens"][0]
    assert found.encode(errors="surrogateescape") == b"\xff\xc3" * 4


def test_without_a_vocabulary(tmp_path):
    assert read(Written(tmp_path / "m.gguf").metadata().tensors(tensors_of(KINDS["llama"]))).texts == {}


# -- parts ----------------------------------------------------------------------------------------------------------


def write_parts(folder: Path) -> tuple[list[Path], dict[str, np.ndarray]]:
    tensors = tensors_of(KINDS["llama"])
    writing = Written(folder / "m.gguf", split_max_tensors=8).metadata().vocabulary()
    writing.tensors(in_pairs(tensors))
    return sorted(folder.glob("*.gguf")), tensors


@pytest.mark.parametrize("given_part", [0, 1, 2])
def test_any_part_of_a_split_file_gives_the_whole(tmp_path, given_part):
    parts, tensors = write_parts(tmp_path)
    checkpoint = read(parts[given_part])
    assert checkpoint.files == tuple(map(str, parts))
    assert checkpoint.path == str(parts[given_part])
    assert checkpoint.config_json["bos_token_id"] == 3
    assert {t.file for t in checkpoint.tensors.values()} == {0, 1, 2}
    for name, tensor in expected_values(tensors).items():
        assert np.array_equal(values(checkpoint, name), tensor)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(tmp_path, missing):
    parts, _ = write_parts(tmp_path)
    parts[missing].unlink()
    sentence = refusal(lambda: read(parts[(missing + 1) % 3]), parts[missing])
    assert f"missing part {missing + 1} of 3" in sentence


def test_a_renamed_part(tmp_path):
    parts, _ = write_parts(tmp_path)
    other = parts[0].rename(tmp_path / "other.gguf")
    assert "split.count=3" in refused(other)
    assert "split.count=3" in refused(parts[1].rename(tmp_path / "m-00002-of-00004.gguf"))


def test_parts_in_another_order(tmp_path):
    parts, _ = write_parts(tmp_path)
    first, second = parts[0].read_bytes(), parts[1].read_bytes()
    parts[0].write_bytes(second)
    parts[1].write_bytes(first)
    assert "split.no" in refused(parts[2])


def test_a_part_of_another_model(tmp_path):
    parts, _ = write_parts(tmp_path)
    (tmp_path / "other").mkdir()
    tensors = dict(list(tensors_of(KINDS["llama"]).items())[:-1])
    Written(tmp_path / "other" / "m.gguf", split_max_tensors=8).metadata().tensors(tensors)
    parts[2].write_bytes((tmp_path / "other" / parts[2].name).read_bytes())
    assert "split.tensors.count" in refused(parts[0])


def test_a_single_part_may_be_named_as_one(tmp_path):
    path = Written(tmp_path / "m-00001-of-00001.gguf").metadata().tensors(tensors_of(KINDS["llama"]))
    assert len(read(path).files) == 1


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in GGMLQuantizationType if kind.name.lower() not in STORED_TYPES])
def test_other_stored_types_are_refused_by_name(tmp_path, kind):
    data = raw_gguf(metadata_pairs(), [("x", (256,), kind.value, 0)]) + bytes(4096)
    (tmp_path / "m.gguf").write_bytes(data)
    sentence = refused(tmp_path / "m.gguf")
    assert kind.name in sentence
    assert "Q4_0" in sentence


@pytest.mark.parametrize("arch", ["gemma", "gpt2", "clip", "deepseek4"])
def test_another_architecture_is_refused_by_name(tmp_path, arch):
    assert repr(arch) in refused(Written(tmp_path / "m.gguf", arch).metadata().tensors({}))


def test_heads_rotated_in_part(tmp_path):
    written = Written(tmp_path / "m.gguf").metadata()
    written.writer.add_rope_dimension_count(8)
    assert "rope.dimension_count=8" in refused(written.finish())


def test_another_scaling(tmp_path):
    written = Written(tmp_path / "m.gguf").metadata()
    written.writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    assert "'longrope'" in refused(written.finish())


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_one_count_for_each_layer(tmp_path, key):
    count = metadata_of_one_layer()[key]
    alike, different = ([count] * 3, [count, count + 2, count])
    for name, counts in {"alike": alike, "different": different}.items():
        array = pair(f"llama.{key}", ARRAY, struct.pack(f"<IQ{len(counts)}I", U32, len(counts), *counts))
        others = [p for p in metadata_pairs() if not p.startswith(text(f"llama.{key}"))]
        (tmp_path / f"{name}.gguf").write_bytes(raw_gguf([*others, array], []))
    (tmp_path / "usual.gguf").write_bytes(raw_gguf(metadata_pairs(), []))
    assert read(tmp_path / "alike.gguf").config_json == read(tmp_path / "usual.gguf").config_json
    assert f"llama.{key} differs from layer to layer ({count}, {count + 2})" in refused(tmp_path / "different.gguf")


@pytest.mark.parametrize(("kind", "said"), [("adapter", "LoRA"), ("mmproj", "pictures"), ("imatrix", "quantising")])
def test_what_is_no_model_says_so(tmp_path, kind, said):
    (tmp_path / "m.gguf").write_bytes(raw_gguf([*metadata_pairs(), pair("general.type", TEXT, text(kind))], []))
    assert said in refused(tmp_path / "m.gguf")


def test_a_type_from_the_future_is_no_damage(tmp_path):
    (tmp_path / "m.gguf").write_bytes(raw_gguf(metadata_pairs(), [("x", (256,), 77, 0)]) + bytes(4096))
    sentence = refused(tmp_path / "m.gguf")
    assert "type 77" in sentence
    assert "damaged" not in sentence


def test_a_missing_file(tmp_path):
    assert "no such file" in refused(tmp_path / "none.gguf")


def test_another_kind_of_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"something else")
    assert "73 6f 6d 65" in refused(tmp_path / "m.gguf")
    assert "73 6f 6d 65" in refusal(lambda: read_checkpoint(str(tmp_path / "m.gguf")), tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"")
    assert "an empty file" in refused(tmp_path / "m.gguf")
    assert "an empty file" in refusal(lambda: read_checkpoint(str(tmp_path / "m.gguf")), tmp_path)


@pytest.mark.parametrize(
    ("version", "said"), [(1, "version 1"), (4, "version 4"), (0x03000000, "big-endian"), (0x02000000, "big-endian")]
)
def test_another_version(tmp_path, version, said):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    assert said in refused(tmp_path / "m.gguf")


# -- hostile headers, written from the format's description ---------------------------------------------------------

U32, F32, TEXT, ARRAY, U64 = 4, 6, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def metadata_of_one_layer() -> dict[str, int]:
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
    return {**sizes, "attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": 4}


def metadata_pairs() -> list[bytes]:
    return [
        pair("general.architecture", TEXT, text("llama")),
        *(pair(f"llama.{key}", U32, struct.pack("<I", value)) for key, value in metadata_of_one_layer().items()),
        pair("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
    ]


Rows = list[tuple[str, tuple[int, ...], int, int]]
"""Name, shape with the fastest axis first, type and offset of tensors."""


def raw_gguf(pairs: list[bytes], rows: Rows, counts: tuple[int, int] | None = None) -> bytes:
    """A header up to the weights."""
    table = b"".join(
        text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        for name, shape, kind, offset in rows
    )
    data = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(rows), len(pairs)))) + b"".join(pairs) + table
    return data + bytes(-len(data) % 32)


def hostile(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert within_bounds(lambda: read(path)) is None


def test_a_small_file_of_our_own_is_read(tmp_path):
    data = raw_gguf(metadata_pairs(), [("output_norm.weight", (32,), 0, 0), ("token_embd.weight", (32, 4), 0, 128)])
    (tmp_path / "m.gguf").write_bytes(data + bytes(640))
    assert read(tmp_path / "m.gguf").tensors["model.embed_tokens.weight"].offset == len(data) + 128


@pytest.mark.timeout(120)
@pytest.mark.parametrize("count", [2**64 - 1, 2**63, 2**40, 2**31, 10**6])
@pytest.mark.parametrize("element", [0, F32, TEXT, U64, ARRAY, 77])
def test_arrays_that_promise_too_much(tmp_path, count, element):
    added = pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", element, count))
    hostile(tmp_path / "m.gguf", raw_gguf([added, *metadata_pairs()], []))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("count", [2**64 - 1, 2**63, 2**40, 2**31, 10**6])
def test_other_counts_that_promise_too_much(tmp_path, count):
    pairs, row = metadata_pairs(), ("output_norm.weight", (32,), 0, 0)
    hostile(tmp_path / "m.gguf", raw_gguf(pairs, [], (count, len(pairs))))
    hostile(tmp_path / "m.gguf", raw_gguf(pairs, [], (0, count)))
    hostile(tmp_path / "m.gguf", raw_gguf([struct.pack("<Q", count), *pairs], []))
    hostile(tmp_path / "m.gguf", raw_gguf([pair("x", TEXT, struct.pack("<Q", count)), *pairs], []))
    hostile(tmp_path / "m.gguf", raw_gguf(pairs, [(row[0], (count,), 0, 0)]) + bytes(64))
    hostile(tmp_path / "m.gguf", raw_gguf(pairs, [(row[0], (32,), 0, count)]) + bytes(64))
    hostile(tmp_path / "m.gguf", raw_gguf(pairs, [(row[0], (count, count, count, count), 0, 0)]) + bytes(64))


@pytest.mark.parametrize(
    "rows",
    [
        [("a", (16,), 0, 0), ("b", (16,), 0, 32)],
        [("a", (16,), 0, 0), ("b", (16,), 0, 0)],
        [("a", (16,), 0, 0), ("a", (16,), 0, 64)],
        [("a", (33,), 0, 0)],
        [("a", (16,), 0, 128)],
        [("a", (0,), 0, 0)],
        [("a", (16, 0), 0, 0)],
        [("a", (), 0, 0)],
        [("a", (1, 1, 1, 1, 1), 0, 0)],
        [("a", (16,), 2, 0)],
        [("a", (16,), 5, 0)],
        [("a", (16,), 2**32 - 1, 0)],
        [("blk.0.ffn_up_exps.weight", (1, 1), 0, 0)],
        [("blk.0.ffn_up_exps.weight", (1, 1, 1, 1), 0, 0)],
        [("blk.0.ffn_gate_up_exps.weight", (1, 3, 1), 0, 0)],
        [("blk.0.attn_q.weight", (1,), 0, 0), ("blk.00.attn_q.weight", (1,), 0, 32)],
    ],
)
def test_tables_that_make_no_sense(tmp_path, rows):
    hostile(tmp_path / "m.gguf", raw_gguf(metadata_pairs(), rows) + bytes(128))


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("general.alignment", U32, struct.pack("<I", 0)),
        ("general.alignment", U32, struct.pack("<I", 24)),
        ("general.alignment", F32, struct.pack("<f", 32)),
        ("general.alignment", TEXT, text("32")),
        ("general.alignment", ARRAY, struct.pack("<IQI", U32, 1, 32)),
        ("general.architecture", TEXT, text("qwen2")),  # a second one
        ("split.count", ARRAY, struct.pack("<IQI", U32, 1, 32)),
        ("split.count", U32, struct.pack("<I", 2)),
        ("llama.expert_count", F32, struct.pack("<f", np.nan)),
        ("llama.rope.freq_base", F32, struct.pack("<f", np.inf)),
        ("llama.rope.freq_base", F32, struct.pack("<f", -1)),
        ("llama.rope.freq_base", TEXT, text("10000")),
        ("llama.rope.scaling.type", ARRAY, struct.pack("<IQ", TEXT, 0)),
        ("llama.rope.scaling.type", U32, struct.pack("<I", 1)),
        ("llama.attention.key_length", U64, struct.pack("<Q", 2**64 - 1)),
        ("x", 13, b""),
    ],
)
def test_metadata_that_makes_no_sense(tmp_path, key, kind, value):
    hostile(tmp_path / "m.gguf", raw_gguf([*metadata_pairs(), pair(key, kind, value)], []))


SMALL = raw_gguf(
    [
        *metadata_pairs(),
        pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", TEXT, 2) + text("a") + text("b")),
        pair("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ2f", F32, 2, 0.5, 1.5)),
        pair("split.count", 2, struct.pack("<H", 1)),
        pair("llama.rope.scaling.type", TEXT, text("yarn")),
        pair("llama.rope.scaling.factor", F32, struct.pack("<f", 2)),
    ],
    [
        ("token_embd.weight", (32, 4), 8, 0),
        ("blk.0.ffn_up_exps.weight", (32, 2, 2), 2, 160),
        ("blk.0.attn_q.weight", (32, 2), 1, 256),
    ],
)
SMALL_FILE = SMALL + bytes(384)
FACTORS = raw_gguf(metadata_pairs(), [("rope_freqs.weight", (8,), 0, 0), ("output.weight", (32, 1), 2, 32)])
FACTORS_FILE = FACTORS + struct.pack("<8f", *range(1, 9)) + bytes(32)


@pytest.mark.timeout(600)
@given(data=mangled(SMALL_FILE, len(SMALL)) | mangled(FACTORS_FILE, len(FACTORS) + 32))
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage(tmp_path, data):
    (tmp_path / "m.gguf").write_bytes(data)
    within_bounds(lambda: read(tmp_path / "m.gguf"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("data", [SMALL_FILE, FACTORS_FILE])
def test_every_byte_of_the_header_turned_and_every_truncation(tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    assert read(path).tensors
    for place in range(len(data) - 32):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        within_bounds(lambda: read(path))
        path.write_bytes(data[:place])
        refused(path)
