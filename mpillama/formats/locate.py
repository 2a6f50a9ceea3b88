"""Finding the model in what the user names: a file, a folder in Hugging Face's layout, or one with a model file."""

from collections.abc import Iterator
from pathlib import Path

from mpillama.errors import UserError
from mpillama.formats.dllama.model import MAGIC
from mpillama.formats.foreign import unreadable
from mpillama.formats.gguf.file import PART
from mpillama.formats.hugging_face import has_weights
from mpillama.formats.stand_ins import what_folder

MOST_NAMED = 8
"""Models of a folder that a refusal names at the most."""


def locate_model(path: str) -> str:
    """The path of a file, or of a folder with a config.json and its weights; UserError for a folder without a model."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    has_config = (folder / "config.json").exists()
    if has_config and has_weights(folder):
        return path
    try:
        found = sorted(_models(folder))
    except OSError as error:
        raise unreadable(path, error) from error
    if len(found) == 1:
        return str(folder / found[0])
    if found:
        named = ", ".join(found[:MOST_NAMED]) + (", …" if len(found) > MOST_NAMED else "")
        raise UserError(f"{path}: a folder of several models: give one of {named}.")
    if has_config:
        return path  # its reader says what is missing
    raise UserError(f"{path}: {what_folder(folder)}.")


def _models(folder: Path) -> Iterator[str]:
    """The names of model files; of one in parts the first that is there."""
    seen = set()
    for name in sorted(entry.name for entry in folder.iterdir() if entry.is_file()):
        part = PART.fullmatch(name)
        model = (part[1], part[3]) if part else name
        if model not in seen and _is_model(folder / name):
            seen.add(model)
            yield name


def _is_model(path: Path) -> bool:
    """Whether it is a GGUF file of a model by its name, or one of distributed-llama's or ours by its beginning."""
    if path.suffix == ".gguf":
        return not path.name.startswith("mmproj")  # the part of a model that sees
    if path.suffix not in (".m", ".h5"):
        return False
    with path.open("rb") as file:
        found = file.read(4)
    return found == (MAGIC if path.suffix == ".m" else b"\x89HDF") and path.name != "tf_model.h5"
