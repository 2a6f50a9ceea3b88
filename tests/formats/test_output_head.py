"""The output head: a tied one that differs is used, an equal one is not held twice, and a model may have none."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.formats.checkpoint_model import refuse_headless
from mpillama.loading.model_file import ModelFile, open_model
from tests import tiny_models as models
from tests.formats.checking import values
from tests.formats.test_hugging_face import safetensors_bytes, write_folder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNTIED = {**models.PLAIN, "tie_word_embeddings": False}
TIED = {**models.PLAIN, "tie_word_embeddings": True}
TENSORS = models.random_tensors(UNTIED)
WITHOUT_HEAD = {name: tensor for name, tensor in TENSORS.items() if name != HEAD}


def without_prefix(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def names(model: ModelFile) -> set[str]:
    return {spec.name for spec in model.specs}


@pytest.mark.parametrize("change", ["all", "last value"])
def test_a_tied_head_that_differs_is_used_and_told(tmp_path, caplog, change):
    head = TENSORS[EMBEDDING].copy()
    head[-1, -1] += 1
    head = TENSORS[HEAD] if change == "all" else head
    folder = write_folder(tmp_path / "m", {**TENSORS, HEAD: head}, TIED)
    with caplog.at_level(logging.WARNING, "mpillama"):
        model = open_model(str(folder))
    (record,) = caplog.records
    assert HEAD in record.getMessage()
    assert "tie_word_embeddings" in record.getMessage()
    assert HEAD in names(model)
    assert model.config.tie_word_embeddings is False
    assert np.array_equal(values(model.checkpoint, HEAD), head)


def test_a_tied_head_that_is_the_same_is_held_once(tmp_path, caplog):
    folder = write_folder(tmp_path / "m", {**TENSORS, HEAD: TENSORS[EMBEDDING]}, TIED)
    assert HEAD not in names(open_model(str(folder)))
    assert not caplog.records


def test_a_tied_head_in_another_type_is_the_same_if_its_values_are(tmp_path, caplog):
    whole = {name: np.round(tensor) for name, tensor in TENSORS.items()}
    folder = write_folder(tmp_path / "m", whole, TIED)
    parts = {"a": {n: t for n, t in whole.items() if n != HEAD}, "b": {HEAD: whole[EMBEDDING]}}
    (folder / "model.safetensors").unlink()
    for name, part in parts.items():
        (folder / f"{name}.safetensors").write_bytes(safetensors_bytes(part, "F32" if name == "a" else "BF16"))
    placed = {tensor: f"{name}.safetensors" for name, part in parts.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert HEAD not in names(open_model(str(folder)))
    assert not caplog.records


def test_of_two_tied_tensors_the_embedding_may_be_left_out(tmp_path):
    stored = {name: tensor for name, tensor in TENSORS.items() if name != EMBEDDING}
    model = open_model(str(write_folder(tmp_path / "m", stored, TIED)))
    assert HEAD not in names(model)
    assert np.array_equal(values(model.checkpoint, EMBEDDING), TENSORS[HEAD])


def test_a_head_that_is_tied_to_nothing_of_its_shape_is_refused(tmp_path):
    folder = write_folder(tmp_path / "m", {**TENSORS, HEAD: np.ones((3, 64), np.float32)}, TIED)
    with pytest.raises(UserError, match=r"lm_head\.weight has shape \[3, 64\]"):
        open_model(str(folder))


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_model_stored_without_its_prefix_is_the_same_model(tmp_path, config):
    tensors = WITHOUT_HEAD if config is TIED else TENSORS
    usual = open_model(str(write_folder(tmp_path / "usual", tensors, config)))
    found = open_model(str(write_folder(tmp_path / "m", without_prefix(tensors), config)))
    assert found.config == usual.config
    assert found.config.lm_head
    assert all(np.array_equal(values(found.checkpoint, n), values(usual.checkpoint, n)) for n in tensors)


def test_a_model_stored_without_prefix_and_head_makes_embeddings_only(tmp_path):
    model = open_model(str(write_folder(tmp_path / "m", without_prefix(WITHOUT_HEAD), UNTIED)))
    assert HEAD not in names(model)
    with pytest.raises(UserError, match=r"lm_head\.weight.*/v1/embeddings"):
        refuse_headless(model.path, model.config.lm_head)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_model_of_sentence_transformers_makes_embeddings_unless_it_has_a_head(tmp_path, config):
    folder = write_folder(tmp_path / "m", WITHOUT_HEAD, config)
    (folder / "modules.json").write_text("[]")
    assert not open_model(str(folder)).config.lm_head
    write_folder(folder, TENSORS, UNTIED)
    assert open_model(str(folder)).config.lm_head


def test_a_missing_head_is_missed_in_a_model_that_has_its_prefix(tmp_path: Path):
    with pytest.raises(UserError, match=r"'lm_head\.weight' is missing"):
        open_model(str(write_folder(tmp_path / "m", WITHOUT_HEAD, UNTIED)))
