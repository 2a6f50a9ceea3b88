"""A checkpoint in Hugging Face's layout: a folder with config.json, safetensors files and the texts beside them."""

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint, StoredTensor, named_templates, only_template
from mpillama.formats.checkpoint_model import TIED, settle_head, with_prefix
from mpillama.formats.foreign import (
    Cursor,
    by_name,
    check_extents,
    cut_fused,
    damaged,
    flattened,
    one_line,
    read_json,
    read_text,
    regular_size,
    split_experts,
)
from mpillama.formats.quantization import assemble, quantization_of
from mpillama.formats.scaled_tensor import ScaledTensor
from mpillama.formats.stand_ins import what_folder
from mpillama.formats.stored_arrays import DTYPES, StoredArray
from mpillama.formats.turned_experts import turned_experts
from mpillama.models.config_values import ConfigValues
from mpillama.models.families import FAMILIES
from mpillama.models.family import Family
from mpillama.quant.registry import STORED_TYPES

STORED = {t.safetensors: t.name for t in STORED_TYPES.values() if t.safetensors}
MOST_HEADER = 100_000_000
"""Bytes that the safetensors package itself takes for a header at the most."""
IGNORED = "rotary_emb.inv_freq"
"""Old checkpoints carry the rotary frequencies, which follow from the configuration."""


def read_safetensors_table(path: str, number: int, dtypes: Collection[str] = tuple(STORED)) -> list[StoredArray]:
    """The tensors of a file, which is number `number` of its checkpoint, by the names they have there.

    UserError for those of other types than `dtypes`.
    """
    with Cursor(path, MOST_HEADER + 8) as cursor:
        length = cursor.number("Q", "the length of its header")
        cursor.expect(length, "header")
        header = _parse(path, cursor.take(length, "header"))
        _refuse_dtypes(path, header, dtypes)
        _validate(path)
    named = ((name, info) for name, info in header.items() if name != "__metadata__" and not name.endswith(IGNORED))
    return [_stored_array(path, name, info, number, 8 + length) for name, info in named]


def _validate(path: str) -> None:
    """Let the safetensors package check that the tensors fill the file without gaps."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(
            f"{path}: read with the package safetensors, which is not installed: pip install 'mpillama[convert]'."
        ) from error
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise damaged(path, one_line(error)) from error


def _parse(path: str, header: bytes) -> dict[str, Any]:
    """The header's JSON; a name that appears twice is refused, which JSON readers pass over."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"a name appears twice among {sorted(name for name, _ in pairs)}")
        return found

    try:
        value = json.loads(header.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise damaged(path, one_line(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, f"its header holds a {type(value).__name__}")
    return value


def _refuse_dtypes(path: str, header: dict[str, Any], dtypes: Collection[str]) -> None:
    """Refuse other types by name, also those that the installed safetensors package does not know."""
    for name, info in header.items():
        dtype = info.get("dtype") if isinstance(info, dict) else None
        if not isinstance(dtype, str) or not dtype.isidentifier() or dtype in dtypes:
            continue
        if name != "__metadata__" and not name.endswith(IGNORED):
            raise _other_dtype(path, name, dtype)


def _other_dtype(path: str, name: str, dtype: str) -> UserError:
    return UserError(
        f"{path}: tensor {name!r} is stored as {dtype[:32]}: mpillama reads {', '.join(STORED)}, and others only as "
        f"quantization_config in config.json describes them: take the model in one of these, or a GGUF file of it."
    )


def _stored_array(path: str, name: str, info: Any, number: int, start: int) -> StoredArray:
    try:
        dtype, shape, (begin, _) = info["dtype"], tuple(int(n) for n in info["shape"]), info["data_offsets"]
        offset = start + int(begin)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"tensor {name!r}: {one_line(error)}") from error
    return StoredArray(name, dtype, shape, number, offset)


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEXTS = ("tokenizer.json", TEMPLATE, "generation_config.json", TOKENIZER_CONFIG)
OLDER_TOKENIZERS = ("tokenizer.model", "tiktoken.model")
"""What stands for tokenizer.json in some folders: a model of SentencePiece, or ranks of byte-level BPE."""
ADDED_TOKENS = "added_tokens.json"
"""Ids of more tokens by their names."""
SENTENCES = "modules.json"
"""Beside models that make embeddings of sentences (sentence-transformers)."""
FUSED_EXPERTS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def read_hugging_face(path: str) -> Checkpoint:
    """Read everything but the weights of a folder; UserError says what is missing, damaged or not taken."""
    folder = Path(path)
    outer = read_json(folder / "config.json")
    config = _language_model(path, outer)
    quantisation = quantization_of(path, outer)
    placed = _placed_by_index(folder)
    names = sorted(set(placed.values())) or [WEIGHTS]
    files = tuple(str(folder / name) for name in names)
    sizes = tuple(regular_size(file) for file in files)
    dtypes = tuple(DTYPES if quantisation else STORED)
    tables = [read_safetensors_table(file, number, dtypes) for number, file in enumerate(files)]
    _check_index(folder, placed, names, tables)
    arrays = [array for table in tables for array in table]
    check_extents(files, sizes, arrays)
    tensors = list(_tensors(files, assemble(files, quantisation, arrays) if quantisation else arrays))
    if outer is not config:
        tensors = _of_language_model(path, tensors)
    family = FAMILIES.get(str(config.get("model_type")))
    stored = by_name(files, _canonical_tensors(files, tensors, family, config))
    table = with_prefix(stored)
    without_head = table is not stored and not config.get(TIED)
    config, table = settle_head(str(path), config, table, files, without_head or (folder / SENTENCES).exists())
    return Checkpoint(str(path), "hugging_face", config, _texts(folder), files, sizes, table)


# -- the language model of a checkpoint that also sees ---------------------------------------------------------------

TEXT_CONFIG = "text_config"
OF_BOTH = ("bos_token_id", "eos_token_id", TIED)
"""What the outer configuration may say of the language model, too."""
SEES = re.compile(
    r"(?:model\.)?(?:vision_tower|vision_model|visual|multi_modal_projector|mm_projector|patch_merge_mlp)\."
)
INNER_PREFIX = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")


def _language_model(path: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model; UserError if it lies within another that nobody knows."""
    if TEXT_CONFIG not in config:
        return config
    inner, outer_type = config[TEXT_CONFIG], config.get("model_type")
    family = FAMILIES.get(str(inner.get("model_type"))) if isinstance(inner, dict) else None
    if family is None or outer_type not in family.within:
        raise UserError(
            f"{path}: model_type={outer_type!r} keeps its language model under {TEXT_CONFIG}: "
            "mpillama does not know it there, take a model of text alone."
        )
    return {**{key: config[key] for key in OF_BOTH if config.get(key) is not None}, **inner}


def _of_language_model(path: str, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """The tensors of the language model, under the names that it has alone."""
    own = [tensor for tensor in tensors if not SEES.match(tensor.name)]
    if len(own) < len(tensors):
        logging.getLogger(__name__).warning(
            "%s: the model also sees pictures: the %d tensors that do this are left out, it runs for text.",
            path, len(tensors) - len(own), extra={"of_run": True},
        )  # fmt: skip
    return [replace(tensor, name=_inner_name(tensor.name)) for tensor in own]


def _inner_name(name: str) -> str:
    inner = INNER_PREFIX.sub("", name, count=1) if INNER_PREFIX.match(name) else name
    return inner if inner == name or inner.startswith("lm_head.") else "model." + inner


# -- what is not taken ----------------------------------------------------------------------------------------------


# -- which files ----------------------------------------------------------------------------------------------------


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights under the names that are read."""
    return (folder / WEIGHTS).exists() or (folder / INDEX).exists()


def _placed_by_index(folder: Path) -> Mapping[str, str]:
    """Which file holds which tensor, as the index says; nothing for a model in one file."""
    if (folder / WEIGHTS).exists():
        return {}
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: has neither {WEIGHTS} nor {INDEX}: {what_folder(folder)}.")
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(_is_file_name(name) for name in placed.values()):
        raise damaged(folder / INDEX, "its weight_map does not give a file of this folder for each tensor")
    for name in sorted(set(placed.values())):
        if not (folder / name).exists():
            raise UserError(f"{folder}: {name!r} is missing, which {INDEX} names: download it again.")
    return placed


def _is_file_name(name: Any) -> bool:
    """Whether it names a file in the folder itself."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _check_index(folder: Path, placed: Mapping[str, str], names: list[str], tables: list[list[StoredArray]]) -> None:
    """Refuse an index that names a tensor which its file does not hold."""
    held = {name: {tensor.name for tensor in table} for name, table in zip(names, tables, strict=True)}
    for tensor, file in placed.items():
        if tensor not in held[file] and not tensor.endswith(IGNORED):
            raise damaged(folder / file, f"it has no tensor {tensor!r}, which {INDEX} places there")


# -- names ----------------------------------------------------------------------------------------------------------


def _tensors(files: Sequence[str], found: Iterable[StoredArray | ScaledTensor]) -> Iterator[StoredTensor]:
    """Arrays that are rows of weights as tensors; UserError for those that nothing else made one of."""
    for part in found:
        if isinstance(part, ScaledTensor):
            yield part
        elif part.dtype in STORED:
            yield StoredTensor(part.name, part.shape, STORED[part.dtype], part.file, part.offset)
        else:
            raise _other_dtype(files[part.file], part.name, part.dtype)


def _canonical_tensors(
    files: Sequence[str], tensors: Iterable[StoredTensor], family: Family | None, config: Mapping[str, Any]
) -> Iterator[StoredTensor]:
    """The tensors under their canonical names, each part of a fused one by itself."""
    fused = family.fused(ConfigValues(config, family.defaults)) if family else {}
    from_one, logarithms = (
        re.compile(pattern or NOTHING)
        for pattern in ((family.from_one, family.logarithms) if family else (NOTHING, NOTHING))
    )
    pairs = _head_dim(ConfigValues(config, family.defaults)) if family and family.rotary_pairs else 0
    for tensor in tensors:
        path = files[tensor.file]
        for whole in _canonical(path, tensor, family):
            for part in cut_fused(path, flattened(whole, family), fused):
                interleaved = pairs if ROTATED.search(part.name) else 0
                added = 1.0 if from_one.search(part.name) else 0.0
                is_logarithm = logarithms.search(part.name) is not None
                yield replace(part, added=added, interleaved=interleaved, is_logarithm=is_logarithm)


NOTHING = r"(?!)"
ROTATED = re.compile(r"\.self_attn\.[qk]_proj\.")


def _head_dim(values: ConfigValues) -> int:
    return values.size("head_dim", values.size("hidden_size") // values.size("num_attention_heads"))


def _canonical(path: str, tensor: StoredTensor, family: Family | None) -> Iterator[StoredTensor]:
    """The tensor under its canonical name; stacked experts one by one."""
    name = tensor.name
    for pattern, replacement in (family.renames if family else {}).items():
        name = re.sub(pattern, replacement, name)
    fused = re.fullmatch(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)(_bias)?", name)
    if isinstance(tensor, ScaledTensor):
        yield replace(tensor, name=name)
    elif fused and family and family.turned_experts:
        yield from turned_experts(path, fused[1], tensor, FUSED_EXPERTS[fused[2]], family.experts_by_turns)
    elif fused and not fused[3]:
        yield from split_experts(path, fused[1], tensor, FUSED_EXPERTS[fused[2]])
    else:
        yield replace(tensor, name=name)


# -- texts ----------------------------------------------------------------------------------------------------------


def _texts(folder: Path) -> dict[str, bytes]:
    """The texts that are there; an older checkpoint's chat template is taken out of its tokenizer_config.json."""
    texts = {name: read_text(folder / name) for name in TEXTS if (folder / name).exists()}
    older = next((name for name in OLDER_TOKENIZERS if (folder / name).exists()), None)
    if "tokenizer.json" not in texts and older:
        texts |= {name: read_text(folder / name) for name in (older, ADDED_TOKENS) if (folder / name).exists()}
    if TEMPLATE not in texts and TOKENIZER_CONFIG in texts:
        template = only_template(named_templates(read_json(folder / TOKENIZER_CONFIG).get("chat_template")))
        if template:
            texts[TEMPLATE] = template.encode(errors="replace")
    return texts
