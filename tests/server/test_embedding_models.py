"""Models that were stored for embeddings, without the prefix of their tensors' names and without an output head."""

import numpy as np
import openai
import pytest

from tests import golden_models
from tests.server.conftest import serving
from tests.system.mpi.launch import TIMEOUT

pytestmark = pytest.mark.timeout(2 * TIMEOUT + 60)
TOKENS = [[5, 6, 7, 8], [9, 10, 11]]


def test_embeddings_are_those_of_the_whole_model_and_all_else_is_refused(tmp_path):
    found = {}
    for name, path in {
        "bare": golden_models.headless(tmp_path / "bare"),
        "whole": golden_models.FOLDER / "llama",
    }.items():
        with serving(path, tmp_path, 2) as served:
            entries = served.client.embeddings.create(model=path.name, input=TOKENS).data
            found[name] = [entry.embedding for entry in entries]
            if name == "bare":
                with pytest.raises(openai.BadRequestError, match=r"lm_head\.weight"):
                    served.client.completions.create(model=path.name, prompt=TOKENS[0], max_tokens=2)
                assert served.client.embeddings.create(model=path.name, input=TOKENS[0]).data
    assert np.array_equal(found["bare"], found["whole"])
    assert np.abs(found["bare"]).max() > 0
