"""Which draft models are taken for a model: their tokens are its tokens, and a layer's hidden states its own."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.loading.draft import refuse_unfit
from mpillama.loading.model_file import open_model, open_mtp
from tests import golden_models, mtp_models

PADDED, UNUSED = ("token_embd.weight", "output.weight"), 5


def write_padded(path: Path, rows: int, changes: dict[int, str] | None = None) -> Path:
    """A GGUF with so many more rows of its tables, and tokens for them as llama.cpp's converter calls these."""

    class Padding(gguf.GGUFWriter):
        def add_token_list(self, tokens: Iterable[str]) -> None:
            named = [(changes or {}).get(i, token) for i, token in enumerate(tokens)]
            super().add_token_list([*named, *(f"[PAD{len(named) + i}]" for i in range(rows))])

        def add_token_types(self, types: Iterable[int]) -> None:
            super().add_token_types([*types, *[UNUSED] * rows])

        def add_tensor(self, name: str, tensor: np.ndarray, *rest: Any, **more: Any) -> None:
            padded = np.concatenate([tensor, np.repeat(tensor[:1], rows, axis=0)]) if name in PADDED else tensor
            super().add_tensor(name, padded, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Padding)
        golden_models.write_gguf(path, "llama", golden_models.as_float32)
    return path


@pytest.mark.parametrize(("rows", "rows_of_draft"), [(0, 64), (64, 0), (64, 128), (128, 64)])
def test_tables_padded_to_other_sizes_have_the_same_tokens(rows, rows_of_draft, tmp_path):
    model = open_model(str(write_padded(tmp_path / "model.gguf", rows)))
    draft = open_model(str(write_padded(tmp_path / "draft.gguf", rows_of_draft)))
    assert model.config.vocab_size - draft.config.vocab_size == rows - rows_of_draft
    refuse_unfit(model, draft)


def test_another_token_is_refused_though_tables_are_padded(tmp_path):
    model = open_model(str(write_padded(tmp_path / "model.gguf", 64)))
    last = model.config.vocab_size - 64 - 1
    draft = open_model(str(write_padded(tmp_path / "draft.gguf", 0, {last: "another"})))
    with pytest.raises(UserError, match=f"token {last} is 'another' instead of"):
        refuse_unfit(model, draft)


def test_a_layer_for_hidden_states_of_another_size_is_refused(tmp_path, model_file):
    folder = str(mtp_models.write_folder(tmp_path / "model", "glm4_moe"))
    layer, other = open_mtp(folder), open_model(str(model_file("toy", "q8_0")))
    refuse_unfit(open_model(folder), layer)
    sizes = other.config.hidden_size, layer.config.hidden_size
    assert sizes[0] != sizes[1]
    with pytest.raises(UserError, match="hidden size {}, .* has {}: take the layer of the same".format(*sizes)):
        refuse_unfit(other, layer)
