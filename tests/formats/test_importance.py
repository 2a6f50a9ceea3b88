"""Importance matrices of llama.cpp: both forms, experts, and what does not belong to the model."""

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.formats.importance import read_importance
from mpillama.loading.convert import with_importance
from mpillama.loading.model_file import open_model
from tests.golden_models import FOLDER

Sums = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By GGUF's name the sums of squares [experts, columns] and the counts [experts]."""

QUERY, DOWN, UP = (f"model.layers.{rest}.weight" for rest in ("0.self_attn.q_proj", "1.mlp.down_proj", "1.mlp.up_proj"))
DENSE = {QUERY: 64, DOWN: 96, UP: 64}
OF_EXPERT = "model.layers.0.mlp.experts.{}.down_proj.weight"


def write_gguf(path: Path, sums: Sums, kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for name, (values, counts) in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat(path: Path, sums: Sums) -> Path:
    data = struct.pack("<i", len(sums))
    for name, (values, counts) in sums.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", int(counts.max()), values.size)
        data += (values * (counts.max() / counts)[:, None]).astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", 5, 4) + b"text")
    return path


def some_sums(*experts: int) -> Sums:
    rng = np.random.default_rng(4)
    names = {"blk.0.attn_q.weight": 64, "blk.1.ffn_down.weight": 96, "output.weight": 64}
    found = {name: (rng.random((1, width)) * 50, np.array([50])) for name, width in names.items()}
    for count in experts:
        found["blk.0.ffn_down_exps.weight"] = rng.random((count, 48)) * 7, np.array([7, 3, 5])
    return found


@pytest.mark.parametrize("write", [write_gguf, write_dat])
def test_both_forms_say_the_mean_of_squares(tmp_path, write):
    sums = some_sums()
    found = read_importance(str(write(tmp_path / "importance", sums)), "llama", 0, DENSE)
    assert set(found) == {QUERY, DOWN}
    for name, of_gguf in ((QUERY, "blk.0.attn_q.weight"), (DOWN, "blk.1.ffn_down.weight")):
        assert found[name].dtype == np.float32
        assert np.allclose(found[name], sums[of_gguf][0][0] / 50, rtol=1e-6)


@pytest.mark.parametrize("write", [write_gguf, write_dat])
def test_each_expert_has_its_own(tmp_path, write):
    sums, columns = some_sums(3), {OF_EXPERT.format(e): 48 for e in range(3)}
    found = read_importance(str(write(tmp_path / "importance", sums)), "mixtral", 3, columns)
    values, counts = sums["blk.0.ffn_down_exps.weight"]
    for expert in range(3):
        assert np.allclose(found[OF_EXPERT.format(expert)], values[expert] / counts[expert], rtol=1e-6)


def test_an_expert_that_was_never_chosen_has_columns_alike(tmp_path):
    sums = {"blk.0.ffn_down_exps.weight": (np.array([[0.0] * 48, [2.0] * 24 + [0.0] * 24]), np.array([0, 4]))}
    columns = {OF_EXPERT.format(e): 48 for e in range(2)}
    found = read_importance(str(write_gguf(tmp_path / "i.gguf", sums)), "mixtral", 2, columns)
    assert (found[OF_EXPERT.format(0)] == 1).all()
    used, unused = np.split(found[OF_EXPERT.format(1)], 2)
    assert (used == 0.5).all()
    assert ((unused > 0) & (unused < 1e-5)).all()  # no column counts for nothing


def refusal(path: Path, columns: Mapping[str, int] = DENSE, family: str = "llama") -> str:
    with pytest.raises(UserError) as error:
        read_importance(str(path), family, 0, columns)
    sentence = str(error.value)
    assert sentence.startswith(str(path))
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_numbers_that_are_no_means_of_squares(tmp_path, bad):
    sums = some_sums()
    sums["blk.1.ffn_down.weight"][0][0, 3] = bad
    assert "ffn_down" in refusal(write_gguf(tmp_path / "i.gguf", sums))


def test_another_model(tmp_path):
    path = write_gguf(tmp_path / "i.gguf", some_sums())
    assert "another model" in refusal(path, {**DENSE, DOWN: 128})
    assert "names no matrix" in refusal(path, {UP: 64})


def test_other_files(tmp_path):
    (tmp_path / "text").write_text("Once upon a time\n" * 100)
    assert "not an importance matrix" in refusal(tmp_path / "text")
    assert "not an importance matrix" in refusal(write_gguf(tmp_path / "m.gguf", some_sums(), "model"))
    (tmp_path / "empty").touch()
    refusal(tmp_path / "empty")
    refusal(tmp_path / "none")


def test_missing_and_truncated_numbers(tmp_path):
    sums = some_sums()
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "llama")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "no counts" in refusal(tmp_path / "i.gguf")
    for write in (write_gguf, write_dat):
        whole = write(tmp_path / "whole", sums).read_bytes()
        for size in range(5, len(whole) - 100, 37):
            (tmp_path / "cut").write_bytes(whole[:size])
            refusal(tmp_path / "cut")


# -- in `convert` -----------------------------------------------------------------------------------------------------


def importance_for(family: str, path: Path) -> Path:
    """Random importance of all matrices of the golden model's layers but those of the second's attention output."""
    rng, sums = np.random.default_rng(1), {}
    for name, module in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj"), ("ffn_up", "mlp.up_proj")):
        for layer in (0, 1):
            width = (
                open_model(str(FOLDER / family)).checkpoint.tensors[f"model.layers.{layer}.{module}.weight"].shape[1]
            )
            sums[f"blk.{layer}.{name}.weight"] = np.exp(2 * rng.standard_normal((1, width))), np.array([1])
    return write_gguf(path, sums)


@pytest.mark.parametrize("weights", ["q4_k", "q6_k", "iq4_nl", "q4_0"])
def test_errors_go_to_where_they_count_less(tmp_path, weights):
    path = importance_for("llama", tmp_path / "i.gguf")
    plain = open_model(str(FOLDER / "llama"), weights)
    weighed = with_importance(plain, str(path))
    assert weighed.importance is not None
    exact = open_model(str(FOLDER / "llama"), "f32")
    for name, importance in weighed.importance.items():
        spec = next(spec for spec in plain.specs if spec.name == name)
        true = values_of(exact, replace(spec, weight_type=exact.weight_types.default))[:, : len(importance)]
        errors = [values_of(model, spec)[:, : len(importance)] - true for model in (plain, weighed)]
        before, after = ((importance * error**2).sum() for error in errors)
        assert after < before, name


def values_of(model, spec) -> np.ndarray:
    arrays = [np.empty(a.slice_shape(spec.units), a.dtype) for a in spec.arrays()]
    reader = model.reader(lambda count: None)
    reader.read(spec, range(spec.units), arrays)
    reader.close()
    return spec.weight_type.unpack(arrays).astype(np.float64)


def test_importance_that_would_change_nothing_is_refused(tmp_path):
    path = str(importance_for("llama", tmp_path / "i.gguf"))
    with pytest.raises(UserError, match=r"do not use it: give --weights, one of .*q4_k"):
        with_importance(open_model(str(FOLDER / "llama"), "q8_0"), path)
    with pytest.raises(UserError, match="original checkpoint"):
        with_importance(open_model(str(Path(__file__).parents[2] / "data" / "demo.h5")), path)


def test_matrices_without_importance_are_told(tmp_path, caplog):
    path = str(importance_for("llama", tmp_path / "i.gguf"))
    with_importance(open_model(str(FOLDER / "llama"), "q4_k"), path)
    assert "has no importance for" in caplog.text
    assert "are quantised without" in caplog.text
