"""The check that ids are those of the model's tokens."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mpillama.errors import UserError


def check_token_ids(ids: Sequence[int] | npt.NDArray[np.int64], vocab_size: int) -> None:
    """UserError if the model has no row for one of `ids`."""
    if not len(ids) or 0 <= min(ids) <= max(ids) < vocab_size:
        return
    wrong = next(i for i in ids if not 0 <= i < vocab_size)
    raise UserError(
        f"token id {wrong} is outside the model's 0 to {vocab_size - 1}: leave that token out of the text, "
        "or take the tokenizer with which the model was trained."
    )
