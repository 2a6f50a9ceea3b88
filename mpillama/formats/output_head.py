"""Which output head a Hugging Face checkpoint has: one of its own, its embedding, or none."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.checkpoint import StoredTensor
from mpillama.formats.foreign import unreadable
from mpillama.formats.reading import read_exactly
from mpillama.models.tensors import EMBEDDING, LM_HEAD

TIED = "tie_word_embeddings"
HEADLESS: Mapping[str, Any] = {"lm_head": False}
"""What a configuration says of a model without a head; the key is our own."""
PREFIX = "model."
RUN_BYTES = 16 << 20
"""About as much of each tensor is compared at a time."""

Table = Mapping[str, StoredTensor]


def with_prefix(table: Table) -> Table:
    """The tensors of a model that was stored without its head, and so without the prefix, under their usual names."""
    if any(name.startswith(PREFIX) for name in table) or EMBEDDING.removeprefix(PREFIX) not in table:
        return table
    return {name if name == LM_HEAD else PREFIX + name: tensor for name, tensor in table.items()}


def settle_head(
    path: str, config: Mapping[str, Any], table: Table, files: Sequence[str], embeds: bool
) -> tuple[Mapping[str, Any], Table]:
    """Configuration and tensors, such that the configuration says of the head what is true of the tensors.

    As in transformers, a head that differs from the embedding is used although the configuration ties both, and of two
    tied tensors either may be left out. `embeds`: the model was stored as one that makes embeddings.
    """
    if LM_HEAD not in table:
        return ({**config, **HEADLESS} if embeds else config), table
    if not config.get(TIED):
        return config, table
    if EMBEDDING not in table:
        return config, {EMBEDDING: table[LM_HEAD], **{n: t for n, t in table.items() if n != LM_HEAD}}
    if _equal(table[EMBEDDING], table[LM_HEAD], files):
        return config, table
    logging.getLogger(__name__).warning(
        "%s: its configuration ties the output head to the embedding (%s), but %s differs from the embedding: it is "
        "used, as transformers does; with false there the configuration would be right.",
        path, TIED, LM_HEAD, extra={"of_run": True},
    )  # fmt: skip
    return {**config, TIED: False}, table


def _equal(first: StoredTensor, second: StoredTensor, files: Sequence[str]) -> bool:
    """Whether two tensors hold the same values, read up to where they differ."""
    if first.shape != second.shape or len(first.shape) != 2:
        return False
    runs = zip(_runs(first, files), _runs(second, files), strict=True)
    if first.stored == second.stored:
        return all(np.array_equal(a, b) for a, b in runs)
    return all(np.array_equal(first.type.decode(a), second.type.decode(b)) for a, b in runs)


def _runs(tensor: StoredTensor, files: Sequence[str]) -> Iterator[np.ndarray]:
    """The bytes of a matrix, some rows at a time: as many for any type of the same width."""
    rows, columns = tensor.shape
    size, step = tensor.type.row_bytes(columns), max(1, RUN_BYTES // (4 * columns))
    path = files[tensor.file]
    try:
        with Path(path).open("rb") as file:
            for start in range(0, rows, step):
                raw = np.empty((min(step, rows - start), size), np.uint8)
                read_exactly(file.fileno(), raw.reshape(-1).data, tensor.offset + start * size)
                yield raw
    except OSError as error:
        raise unreadable(path, error) from error


def refuse_headless(path: str, has_head: bool) -> None:
    """UserError for a model that cannot tell which token comes next."""
    if not has_head:
        raise UserError(
            f"{path}: a model without an output head ({LM_HEAD}), made for embeddings: it cannot continue a text; "
            "`serve` answers POST /v1/embeddings with it."
        )
