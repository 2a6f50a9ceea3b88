"""Opening whatever the user has: a native file, a Hugging Face folder, a GGUF or a distributed-llama file."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint, named_templates
from mpillama.formats.checkpoint_model import AS_STORED, checkpoint_model
from mpillama.formats.checkpoints import read_checkpoint
from mpillama.formats.foreign import regular_size, unreadable
from mpillama.formats.locate import locate_model
from mpillama.formats.mtp import mtp_checkpoint
from mpillama.formats.native.table import HDF5_SIGNATURE, read_table
from mpillama.models.config import ModelConfig
from mpillama.models.families import FAMILIES
from mpillama.models.shapes import AS_PUBLISHED
from mpillama.models.tensors import TensorSpec, WeightTypes
from mpillama.quant.weight_type import WeightType
from mpillama.text.dllama_vocabulary import tokenizer_json_of_dllama
from mpillama.text.gguf_vocabulary import tokenizer_json_of_gguf
from mpillama.text.sentencepiece_model import added_by_id, tokenizer_json_of_sentencepiece
from mpillama.text.tiktoken_model import tokenizer_json_of_tiktoken
from mpillama.text.vocabulary import TokenizerFiles

DEMO_MODEL = Path("data") / "demo.h5"
CONVERTERS: Mapping[str, Callable[[Mapping[str, Any]], TokenizerFiles]] = {
    "gguf_vocabulary.json": tokenizer_json_of_gguf,
    "dllama_vocabulary.json": tokenizer_json_of_dllama,
}


SENTENCEPIECE, TIKTOKEN = "tokenizer.model", "tiktoken.model"
ADDED, TOKENIZER_CONFIG = "added_tokens.json", "tokenizer_config.json"


class SliceReader(Protocol):
    """Reads slices of a model's tensors straight into place."""

    bytes_read: int
    at_once: int

    def read(self, spec: TensorSpec, units: range, arrays: Sequence[np.ndarray]) -> None:
        """Fill the arrays of a tensor with a range of its units."""

    def check_unchanged(self) -> None:
        """UserError if a file was written to since it was opened."""

    def stop(self) -> None:
        """Make reads that are under way end soon."""

    def close(self) -> None: ...


class ModelFile(Protocol):
    """What rank 0 reads of a model and gives to the others: everything but the weights."""

    @property
    def path(self) -> str: ...

    @property
    def files(self) -> Mapping[str, int]:
        """Its files and their sizes, as rank 0 sees them."""

    @property
    def config_json(self) -> Mapping[str, Any]:
        """The configuration in Hugging Face's spelling."""

    @property
    def texts(self) -> Mapping[str, bytes]:
        """Tokenizer, chat template and so on, by file name."""

    @property
    def weight_types(self) -> WeightTypes:
        """How the tensors are held in memory."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def specs(self) -> list[TensorSpec]: ...

    @property
    def metadata_sha256(self) -> str:
        """What tells this model from others."""

    def requantised(self) -> Mapping[str, tuple[WeightType, int]]:
        """Stored types that no kernel knows: which other they become unless one is asked for, and how many weights."""

    def stored_bytes(self, spec: TensorSpec, units: range) -> int:
        """About how many bytes of the files these units of a tensor take."""

    def reader(self, on_bytes: Callable[[int], None], workers: int = 1, verify: bool = False) -> SliceReader:
        """Open the files for reading slices."""


def model_path(given: str | Path | None) -> str:
    """The model file: as given, or the demo model of the checkout."""
    if given:
        return str(given)
    checkout = Path(__file__).resolve().parents[2] / DEMO_MODEL
    return str(DEMO_MODEL if DEMO_MODEL.exists() or not checkout.exists() else checkout)


def open_model(path: str, weights: str = AS_STORED, tokenizer: str | None = None) -> ModelFile:
    """Read everything but the weights; UserError says what was found, what was expected and what to do.

    `weights` is a weight type or "as-stored", for a file the same as "as-published"; `tokenizer` the `.t` file of a
    distributed-llama model.
    """
    weights = AS_STORED if weights == AS_PUBLISHED else weights
    path = locate_model(path)
    if not is_native(path):
        return checkpoint_model(with_tokenizer(read_checkpoint(path, tokenizer)), weights)
    model = read_table(path)
    if weights not in (AS_STORED, model.weight_types.default.name):
        raise UserError(
            f"{path}: holds {model.weight_types.default.name} weights, --weights {weights} is for other formats: "
            "convert the original checkpoint again."
        )
    return model


def open_mtp(path: str, weights: str = AS_STORED) -> ModelFile:
    """As open_model, the model's layer that drafts tokens; UserError if it has none."""
    path = locate_model(path)
    if is_native(path):
        raise UserError(
            f"{path}: a native file holds no layer that drafts tokens: convert it to a file of its own "
            "(`convert --mtp`), and give that with --draft-model."
        )
    return checkpoint_model(mtp_checkpoint(with_tokenizer(read_checkpoint(path, None))), weights)


def is_native(path: str) -> bool:
    """Whether a path is that of a native file; UserError if it cannot be read."""
    if Path(path).is_dir():
        return False
    regular_size(path)  # a pipe would be waited for
    try:
        with Path(path).open("rb") as file:
            return file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE
    except OSError as error:
        raise unreadable(path, error) from error


def with_tokenizer(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its vocabulary turned into Hugging Face's files, if it came in another form."""
    if SENTENCEPIECE in checkpoint.texts:
        return _with_sentencepiece(checkpoint)
    if TIKTOKEN in checkpoint.texts:
        return _with_tiktoken(checkpoint)
    name = next((name for name in CONVERTERS if name in checkpoint.texts), None)
    if name is None:
        return checkpoint
    vocabulary = json.loads(checkpoint.texts[name])
    if not vocabulary.get("tokens"):  # weights alone: they can be measured and converted
        return replace(checkpoint, texts={key: text for key, text in checkpoint.texts.items() if key != name})
    family = FAMILIES.get(checkpoint.config_json["model_type"])
    if family:
        vocabulary |= {"pre_of_family": family.pre_tokenizer, "strips_of_family": family.tokens_strip}
    files = CONVERTERS[name](vocabulary)
    settings = settings_in(checkpoint.texts, TOKENIZER_CONFIG, checkpoint.path)
    ends = {"bos_token_id": files.bos_token_id, "eos_token_id": list(files.eos_token_ids)}
    texts = {
        **{key: text for key, text in checkpoint.texts.items() if key != name},
        "tokenizer.json": files.tokenizer_json,
        "generation_config.json": json.dumps(ends).encode(),
        TOKENIZER_CONFIG: json.dumps({**settings, "add_bos_token": files.add_bos}).encode(),
    }
    return replace(checkpoint, texts=texts, config_json={**checkpoint.config_json, **ends})


def _with_sentencepiece(checkpoint: Checkpoint) -> Checkpoint:
    """With a tokenizer.json made of tokenizer.model; what it says of roles counts where the folder says nothing."""
    texts = dict(checkpoint.texts)
    content = texts.pop(SENTENCEPIECE)
    added, settings = _added_tokens(texts, checkpoint.path)
    files = tokenizer_json_of_sentencepiece(content, str(Path(checkpoint.path) / SENTENCEPIECE), added)
    texts["tokenizer.json"] = files.tokenizer_json
    texts[TOKENIZER_CONFIG] = json.dumps({"add_bos_token": files.add_bos, **settings}).encode()
    roles = {"bos_token_id": files.bos_token_id, "eos_token_id": list(files.eos_token_ids)}
    known = {key: value for key, value in checkpoint.config_json.items() if value is not None}
    return replace(checkpoint, texts=texts, config_json={**checkpoint.config_json, **roles, **known})


def _with_tiktoken(checkpoint: Checkpoint) -> Checkpoint:
    """With a tokenizer.json made of tiktoken.model."""
    texts = dict(checkpoint.texts)
    content = texts.pop(TIKTOKEN)
    added, settings = _added_tokens(texts, checkpoint.path)
    texts["tokenizer.json"] = tokenizer_json_of_tiktoken(content, str(Path(checkpoint.path) / TIKTOKEN), added)
    texts[TOKENIZER_CONFIG] = json.dumps({"add_bos_token": False, **settings}).encode()
    return replace(checkpoint, texts=texts)


def _added_tokens(texts: dict[str, bytes], path: str) -> tuple[dict[int, Any], dict[str, Any]]:
    """What the files beside a vocabulary say of tokens by id, and tokenizer_config.json; added_tokens.json is done."""
    settings = settings_in(texts, TOKENIZER_CONFIG, path)
    by_name = settings_in({ADDED: texts.pop(ADDED, b"{}")}, ADDED, path)
    return added_by_id(by_name, settings.get("added_tokens_decoder")), settings


def chat_template_source(file: ModelFile) -> str:
    """The text of the model's own chat template; UserError as above."""
    source = file.texts.get("chat_template.jinja")
    if source is not None:
        return source.decode()
    names = named_templates(settings_in(file.texts, TOKENIZER_CONFIG, file.path).get("chat_template"))
    if names:
        raise UserError(
            f"{file.path}: the model has chat templates named {', '.join(names)}, and none named default: put the one "
            "you want into a file chat_template.jinja beside config.json."
        )
    raise UserError(f"{file.path}: the model has no chat template; use `generate` with --raw.")


def settings_in(texts: Mapping[str, bytes], name: str, path: str) -> dict[str, Any]:
    """What one of a model's JSON files says, without nulls; nothing if it is not there."""
    try:
        found = json.loads(texts.get(name, b"{}"))
    except ValueError as error:
        raise UserError(f"{path}: its {name} is no JSON ({error}): copy or convert the model again.") from error
    return {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
