"""Files with the shape of Llama 3.1 405B: hundreds of GB by their offsets, a few MB on disk, with marks at the borders.

distributed-llama counted bytes in 32 bits and read everything behind the 8.4 GB embedding 4 GiB too early; each format
here has a mark right behind it.
"""

import struct
from pathlib import Path

import numpy as np
import pytest

from mpillama.formats.checkpoint import Checkpoint
from mpillama.formats.checkpoint_model import checkpoint_model
from mpillama.formats.dllama.model import read_dllama
from mpillama.formats.gguf.file import read_gguf
from mpillama.formats.native.table import read_table
from mpillama.formats.native.writer import create_file, seal_file
from mpillama.models.config import ModelConfig
from mpillama.models.shapes import shape_config
from mpillama.models.tensors import TensorSpec, WeightTypes
from mpillama.quant.registry import STORED_TYPES, WEIGHT_TYPES
from mpillama.quant.types.q4_0 import Q4_0
from mpillama.quant.weight_type import StoredType

CONFIG = {**shape_config("llama-3.1-405b"), "rope_scaling": None}
RANKS = 4
BORDERS = [2**31, 2**32, 2**36]
MARK = 64
"""Bytes of a mark."""


def small_on_disk(path: Path) -> bool:
    return path.stat().st_blocks * 512 < 64 << 20


def owners(spec: TensorSpec, unit: int) -> list[int]:
    """The ranks that hold a unit."""
    parts = ModelConfig.from_hf(CONFIG).partition(RANKS)
    return [rank for rank, part in enumerate(parts) if unit in spec.units_of(part)]


def near_borders(offset: int, size: int, step: int) -> set[int]:
    """Which of an array's pieces of `step` bytes lie before, at and after a border, or begin or end the array."""
    count = size // step
    wanted = {0, count // 2, count - 1} if any(offset <= b < offset + size for b in BORDERS) else {0}
    at = {(b - offset) // step + i for b in BORDERS for i in (-1, 0, 1)}
    return wanted | {i for i in at if 0 <= i < count}


# -- native ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["q8_0", "q4_k"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, types = tmp_path_factory.mktemp("giants") / "405b.h5", WeightTypes(WEIGHT_TYPES[request.param])
    specs = ModelConfig.from_hf(CONFIG).tensors(types)
    entries = create_file(str(path), CONFIG, types, specs, {})
    seal_file(str(path), CONFIG, types, entries, {}, {name: e.checksums for name, e in entries.items()})
    return path


def native_marks(model) -> dict[tuple[str, int], int]:
    """(array, unit) -> file offset of every mark; slices of the ranks begin at some of these units."""
    parts, found = model.config.partition(RANKS), {}
    for spec in model.specs:
        for array in spec.arrays():
            entry = model.entries[array.name]
            step = entry.extent(range(1))[1]
            units = near_borders(entry.offset, entry.bytes, step) if not spec.vector else {0}
            crosses = len(units) > 1
            units |= {spec.units_of(p).start for p in parts} if crosses else set()
            found.update({(array.name, u): entry.extent(range(u, u + 1))[0] for u in units})
    return found


def test_every_mark_of_a_native_file_is_found_by_its_owner(native: Path) -> None:
    model = read_table(str(native))
    assert native.stat().st_size > 220 * 10**9
    marks, rng = native_marks(model), np.random.default_rng(0)
    values = {key: rng.integers(1, 255, MARK, np.uint8) for key in marks}
    with native.open("r+b") as file:
        for key, offset in marks.items():
            file.seek(offset)
            file.write(values[key].tobytes())
    assert small_on_disk(native)
    seen, reader = set(), model.reader(lambda count: None)
    for spec in model.specs:
        wanted = {unit for array in spec.arrays() for name, unit in marks if name == array.name}
        for unit in wanted:
            assert owners(spec, unit)
            arrays = [np.empty(a.slice_shape(1), a.dtype) for a in spec.arrays()]
            reader.read(spec, range(unit, unit + 1), arrays)
            for array, read in zip(spec.arrays(), arrays, strict=True):
                if (array.name, unit) in values:
                    expected = values[array.name, unit]
                    size = min(MARK, read.nbytes)
                    assert np.array_equal(read.reshape(-1).view(np.uint8)[:size], expected[:size])
                    seen.add((array.name, unit))
    reader.close()
    assert seen == set(marks)
    assert all(any(offset <= b < offset + 2**30 for offset in marks.values()) for b in BORDERS)


# -- distributed-llama and GGUF --------------------------------------------------------------------------------------


def stored_size(spec: TensorSpec, stored: str) -> int:
    rows = 1 if spec.vector else spec.source_shape[0]
    return rows * STORED_TYPES[stored].row_bytes(spec.source_shape[-1])


def write_sparse_dllama(path: Path) -> None:
    c = CONFIG
    pairs = [0, 0, 1, 0xABCD00, 2, c["hidden_size"], 3, c["intermediate_size"], 4, c["num_hidden_layers"]]
    pairs += [5, c["num_attention_heads"], 6, c["num_key_value_heads"], 7, 0, 8, 0, 9, c["vocab_size"], 10, 131072]
    pairs += [11, 1, 12, 500000, 13, 2, 19, c["head_dim"]]
    head = struct.pack(f"<Ii{len(pairs)}i", 0x0A00ABCD, 8 + 4 * len(pairs), *pairs)
    specs = ModelConfig.from_hf(c).tensors(WeightTypes(Q4_0))
    size = sum(stored_size(s, "f32" if s.vector or "embed" in s.name else "q4_0") for s in specs)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    tokens = b"".join(struct.pack("<fI", -i, 6) + b"%06d" % i for i in range(c["vocab_size"]))
    path.with_suffix(".t").write_bytes(
        struct.pack("<IIIiii", 0x567123, c["vocab_size"], 6, 128000, 128001, -1) + tokens
    )


def write_sparse_gguf(path: Path, kept: StoredType) -> None:
    """A GGUF header by hand: the gguf package would write the data too."""
    c = CONFIG

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {
        "block_count": c["num_hidden_layers"], "context_length": 131072, "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"], "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
    }  # fmt: skip
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    pairs += [text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
    pairs.append(text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5))
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate"}
    names |= {"post_attention_layernorm": "ffn_norm", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    infos, offset = [], 0
    for spec in ModelConfig.from_hf(c).tensors(WeightTypes(Q4_0)):
        module = spec.name.removesuffix(".weight")
        layer, _, rest = module.removeprefix("model.layers.").partition(".")
        inside = module.startswith("model.layers.")
        name = f"blk.{layer}.{names[rest]}" if inside else names[module]
        kind, stored = (0, "f32") if spec.vector or name == "token_embd" else (kept.ggml, kept.name)
        dims = spec.source_shape[::-1]
        infos.append(text(name + ".weight") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        offset += -(-stored_size(spec, stored) // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + offset)


@pytest.fixture(scope="module", params=["m", "gguf", "gguf q4_k"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    kind, _, kept = request.param.partition(" ")
    path = tmp_path_factory.mktemp("giants") / f"405b.{kind}"
    if kind == "m":
        write_sparse_dllama(path)
        return read_dllama(str(path), None)
    write_sparse_gguf(path, STORED_TYPES[kept or "q4_0"])
    return read_gguf(str(path))


def test_every_mark_of_a_foreign_file_is_found_by_its_owner(foreign: Checkpoint) -> None:
    """The first block of each marked row: its first value is 3."""
    path = Path(foreign.files[0])
    assert path.stat().st_size > 230 * 10**9
    embedding = foreign.tensors["model.embed_tokens.weight"]
    behind = min((t for t in foreign.tensors.values() if t.offset > embedding.offset), key=lambda t: t.offset)
    assert behind.offset - embedding.offset == 8_405_385_216
    kept = foreign.tensors["model.layers.0.self_attn.q_proj.weight"].type
    model = checkpoint_model(foreign, kept.name)
    marked = [s for s in model.specs if is_marked(foreign, s, kept)]
    assert "model.layers.0.self_attn.q_proj.weight" in [s.name for s in marked]
    with path.open("r+b") as file:
        for spec in marked:
            tensor = foreign.tensors[spec.name]
            for unit in (0, spec.units - 1):
                file.seek(tensor.offset + row_of(spec, unit) * kept.row_bytes(tensor.shape[1]))
                file.write(FIRST_IS_3[kept.name])
    assert small_on_disk(path)
    reader = model.reader(lambda count: None, 2)
    for spec in marked:
        for unit in (0, spec.units - 1):
            assert owners(spec, unit)
            arrays = [np.empty(a.slice_shape(1), a.dtype) for a in spec.arrays()]
            reader.read(spec, range(unit, unit + 1), arrays)
            values = spec.weight_type.unpack(arrays)
            assert values[0, 0] == 3.0, spec.name
    reader.close()


FIRST_IS_3 = {
    "q4_0": struct.pack("<e", 1.0) + bytes([8 + 3]) + bytes([8]) * 15,  # scale, nibbles
    "q4_k": struct.pack("<ee", 0.5, 0.0) + bytes([2]) + bytes(11) + bytes([3]),  # steps, scales, the first nibble
}
"""A block whose first value is 3."""


def is_marked(checkpoint: Checkpoint, spec: TensorSpec, kept: StoredType) -> bool:
    """Column-parallel matrices before and behind each border, and the first and the last of the file."""
    if spec.vector or spec.panel or checkpoint.tensors[spec.name].type != kept:
        return False
    offset, size = checkpoint.tensors[spec.name].offset, 2**31
    return spec.name == "lm_head.weight" or ".layers.0." in spec.name or any(abs(offset - b) < size for b in BORDERS)


def row_of(spec: TensorSpec, unit: int) -> int:
    """The checkpoint's first row of a unit; the first row of a head is its first in rotary pairs too."""
    return unit * spec.unit
