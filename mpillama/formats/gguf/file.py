"""A checkpoint in GGUF, in one file or split over several."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.checkpoint import DEFAULT, Checkpoint, StoredTensor, named_templates, only_template
from mpillama.formats.foreign import (
    PathSource,
    by_name,
    check_extents,
    cut_fused,
    damaged,
    flattened,
    module_of,
    unreadable,
)
from mpillama.formats.gguf.config import EMBEDDING, ROPE_FACTORS, TOKENIZER, Metadata, canonical, hugging_face_config
from mpillama.formats.gguf.header import GgufHeader, read_gguf_header
from mpillama.formats.reading import read_exactly
from mpillama.formats.tiled_heads import with_tiled_heads
from mpillama.models.attention import MOST_CHANNELS
from mpillama.models.config_values import ConfigValues

PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
VOCABULARY = "gguf_vocabulary.json"
TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATE = "tokenizer.chat_template."


def read_gguf(path: str) -> Checkpoint:
    """Read everything but the weights; of a split file any part may be given."""
    headers = _read_parts(str(path))
    files, sizes = tuple(h.path for h in headers), tuple(h.size for h in headers)
    found = [tensor for header in headers for tensor in header.tensors]
    check_extents(files, sizes, found)
    stored = by_name(files, found)
    factors = {key: _rope_factors(files, stored.pop(name)) for name, key in ROPE_FACTORS.items() if name in stored}
    metadata = Metadata(headers[0], factors)
    config = hugging_face_config(metadata, stored.keys(), _vocab_size(metadata, stored))
    table = by_name(files, _canonical_tensors(files, stored, metadata, config))
    return Checkpoint(str(path), "gguf", config, _texts(headers[0].metadata), files, sizes, table)


def _canonical_tensors(
    files: tuple[str, ...], stored: dict[str, StoredTensor], metadata: Metadata, config: Mapping[str, Any]
) -> Iterator[StoredTensor]:
    """The tensors under Hugging Face's names, each part of a fused one by itself."""
    values = ConfigValues(config, metadata.family.defaults)
    fused, tiled = metadata.family.fused(values), metadata.gguf.tiled_heads(values)
    factors = _factors_of(files, stored)
    for tensor in stored.values():
        path = files[tensor.file]
        for whole in canonical(path, tensor, metadata.gguf, metadata.head_dim):
            scaled = flattened(_scaled(whole, factors.get(tensor.name)), metadata.family)
            for part in cut_fused(path, scaled, fused):
                module = module_of(part.name)
                signed = replace(part, factor=np.float32(-1)) if module in metadata.gguf.negative else part
                yield with_tiled_heads(signed, tiled.get(module))


# -- parts ----------------------------------------------------------------------------------------------------------


def _read_parts(path: str) -> list[GgufHeader]:
    """The headers of all parts in their order; the first has the metadata."""
    named = PART.fullmatch(Path(path).name)
    given, count = (int(named[2]) - 1, int(named[3])) if named else (0, 1)
    header = read_gguf_header(path, given)
    _check_count(header, count)
    if named is None or count == 1:
        return [header]
    paths = [str(Path(path).with_name(f"{named[1]}-{n + 1:05d}-of-{count:05d}.gguf")) for n in range(count)]
    headers = [header if number == given else _read_part(paths, number) for number in range(count)]
    for number, part in enumerate(headers):
        _check_part(part, number, count)
    _check_total(headers)
    return headers


def _check_count(header: GgufHeader, by_file_name: int) -> None:
    """Refuse a file whose name tells another number of parts than its metadata."""
    count = header.value("split.count") or 1
    if count != by_file_name:
        raise UserError(
            f"{header.path}: split.count={count!r}, but by its name it is one of {by_file_name}: "
            "give all parts the names they were published with (…-00001-of-00002.gguf)."
        )


def _read_part(paths: list[str], number: int) -> GgufHeader:
    path = paths[number]
    if not Path(path).exists():
        raise UserError(
            f"{path}: missing part {number + 1} of {len(paths)} of the model: download it to the same folder."
        )
    return read_gguf_header(path, number)


def _check_part(header: GgufHeader, number: int, count: int) -> None:
    found = header.value("split.no"), header.value("split.count")
    if found != (number, count):
        raise damaged(header.path, f"split.no and split.count are {found}, by its name {(number, count)}")


def _check_total(headers: list[GgufHeader]) -> None:
    total = sum(len(header.tensors) for header in headers)
    promised = headers[0].value("split.tensors.count", total)
    if promised != total:
        raise damaged(headers[0].path, f"its parts hold {total} tensors, split.tensors.count is {promised!r}")


# -- what stands in tensors and vocabulary --------------------------------------------------------------------------


def _vocab_size(metadata: Metadata, stored: Mapping[str, StoredTensor]) -> int:
    """Rows of the embedding; without one what the metadata says."""
    if EMBEDDING in stored:
        return stored[EMBEDDING].shape[0]
    tokens = metadata.header.metadata.get(TOKENIZER + "tokens")
    return metadata.size("vocab_size", len(tokens) if isinstance(tokens, list) else None)


def _rope_factors(files: tuple[str, ...], tensor: StoredTensor) -> list[float]:
    """The values of a tensor of divisors."""
    path = files[tensor.file]
    if tensor.stored != "f32" or len(tensor.shape) != 1 or tensor.shape[0] > MOST_CHANNELS:
        raise damaged(path, f"{tensor.name} is {tensor.stored} of shape {tensor.shape}, expected a vector of f32")
    data = bytearray(4 * tensor.shape[0])
    try:
        with Path(path).open("rb") as file:
            read_exactly(file.fileno(), memoryview(data), tensor.offset)
    except OSError as error:
        raise unreadable(path, error) from error
    factors = np.frombuffer(data, "<f4")
    if not np.all((factors > 0) & np.isfinite(factors)):
        raise damaged(path, f"{tensor.name} holds divisors that are not positive numbers")
    return [float(factor) for factor in factors]


def _factors_of(files: tuple[str, ...], stored: dict[str, StoredTensor]) -> Mapping[str, np.ndarray]:
    """What tensors in NVFP4 are multiplied by, taken out of the table: a number each, or one for each expert."""
    found = {}
    for name in [name for name, tensor in stored.items() if tensor.stored == "nvfp4"]:
        stored.pop(name.removesuffix("weight") + "input_scale", None)  # of activations
        scale = stored.pop(name.removesuffix("weight") + "scale", None)
        if scale is None:
            continue
        experts = stored[name].shape[0] if len(stored[name].shape) == 3 else 1
        if scale.stored != "f32" or scale.shape not in ((experts,), ()):
            raise damaged(
                files[scale.file],
                f"tensor {scale.name} is {scale.stored} of shape {scale.shape}, expected f32 ({experts},)",
            )
        found[name] = scale.read(PathSource(files), range(1), range(experts)).decode()[0]
        if not np.isfinite(found[name]).all():
            raise damaged(files[scale.file], f"tensor {scale.name} holds what is no number")
    return found


def _scaled(tensor: StoredTensor, factors: np.ndarray | None) -> StoredTensor:
    """With the factor of the whole tensor, or of its expert."""
    if factors is None:
        return tensor
    expert = re.search(r"\.experts\.([0-9]+)\.", tensor.name)
    return replace(tensor, factor=factors[int(expert[1]) if expert else 0])


def _texts(values: Mapping[str, Any]) -> dict[str, bytes]:
    """The vocabulary as JSON (keys without "tokenizer.ggml."), and the chat template."""
    texts = {}
    vocabulary = {key.removeprefix(TOKENIZER): value for key, value in values.items() if key.startswith(TOKENIZER)}
    if vocabulary:
        texts[VOCABULARY] = json.dumps(vocabulary, default=np.ndarray.tolist).encode()
    named = {key.removeprefix(NAMED_TEMPLATE): value for key, value in values.items() if key.startswith(NAMED_TEMPLATE)}
    templates = {DEFAULT: values.get(NAMED_TEMPLATE[:-1]), **named}
    listed = [{"name": name, "template": text} for name, text in templates.items() if text]
    template = only_template(named_templates(listed))
    if template:
        texts[TEMPLATE] = template.encode(errors="surrogateescape")
    elif listed:
        texts["tokenizer_config.json"] = json.dumps({"chat_template": listed}, default=str).encode()
    return texts
