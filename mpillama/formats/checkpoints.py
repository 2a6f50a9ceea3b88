"""Reading a checkpoint of whatever format a path turns out to hold."""

from pathlib import Path

from mpillama.errors import UserError
from mpillama.formats.checkpoint import Checkpoint
from mpillama.formats.dllama.model import MAGIC, OLD_MAGICS, read_dllama
from mpillama.formats.dllama.tokenizer import MAGICS as TOKENIZER_MAGICS
from mpillama.formats.foreign import Cursor
from mpillama.formats.gguf.file import read_gguf
from mpillama.formats.gguf.header import MAGIC as GGUF_MAGIC
from mpillama.formats.hugging_face import read_hugging_face

ACCEPTED = (
    "its own .h5 files, Hugging Face folders (config.json and safetensors), .gguf files and distributed-llama .m files"
)


def read_checkpoint(path: str, tokenizer_path: str | None = None) -> Checkpoint:
    """Read everything but the weights of a foreign checkpoint; `tokenizer_path` goes with a .m file."""
    if Path(path).is_dir():
        return _read_folder(path)
    with Cursor(path) as cursor:
        found = cursor.take(min(8, cursor.size), "magic")
    if found[:4] == GGUF_MAGIC:
        return read_gguf(path)
    if found[:4] in (MAGIC, *OLD_MAGICS):
        return read_dllama(path, tokenizer_path)
    name = Path(path).name
    if name.endswith((".safetensors", ".safetensors.index.json", "config.json", "tokenizer.json", "tokenizer.model")):
        raise UserError(f"{path}: one file of a Hugging Face checkpoint: give the folder that holds its config.json.")
    if found[:4] in TOKENIZER_MAGICS:
        raise UserError(f"{path}: a tokenizer: name it with --tokenizer, and the .m file it belongs to as the model.")
    raise UserError(
        f"{path}: no model that mpillama knows (it begins with the bytes {found.hex(' ')}): mpillama reads {ACCEPTED}."
    )


def _read_folder(path: str) -> Checkpoint:
    if not (Path(path) / "config.json").exists():
        raise UserError(f"{path}: a folder without config.json: mpillama reads {ACCEPTED}.")
    return read_hugging_face(path)
