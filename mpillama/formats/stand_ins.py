"""What stands under a model's name and is something else: each is told what it is, and what to do.

Downloads leave pages, pointers and halves behind; models come in formats that are not read here, and in parts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mpillama.errors import UserError

Look = Callable[[Path, bytes], str | None]
"""What a file is, by its path and its first bytes; None if it is not that."""

HEAD_BYTES = 512
"""As much of a file is looked at."""
LFS = b"version https://git-lfs.github.com/spec/"
CUT = re.compile(r"(?P<start>.+\.gguf[.-]?)(?P<word>part-?|split-?)(?P<part>[0-9]+|[a-z]{1,2})(?P<rest>of[0-9]+)?")
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".!qB")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ARCHIVES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z"}
OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")
DOWNLOAD = "download the file itself"
FORMATS = "a Hugging Face folder with safetensors, or a .gguf file of the model"


def refuse_stand_in(path: str | Path, head: bytes) -> None:
    """UserError if the first HEAD_BYTES of a file, or its name, tell that it is no file of a model."""
    _refuse(Path(path), head, (*BY_NAME, _empty, *TEXTS, *(() if _is_safetensors(head) else OTHER_FORMATS)))


def refuse_text_stand_in(path: Path, head: bytes) -> None:
    """As refuse_stand_in, for a text beside a model."""
    _refuse(path, head, TEXTS)


def _refuse(path: Path, head: bytes, looks: Sequence[Look]) -> None:
    sentence = next((found for look in looks if (found := look(path, head))), None)
    if sentence:
        raise UserError(f"{path}: {sentence}.")


def _is_safetensors(head: bytes) -> bool:
    """Whether it begins with the length of a header, whose first bytes may be like any format's."""
    return head[4:8] == bytes(4) and head[8:9] == b"{"


def begins_as_text(head: bytes) -> bytes:
    """The beginning in lower case, without white space and byte order mark before it."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()


# -- in place of any file ---------------------------------------------------------------------------------------------


def _empty(path: Path, head: bytes) -> str | None:
    return None if head else f"an empty file: {DOWNLOAD} again"


def _pointer(path: Path, head: bytes) -> str | None:
    if not head.startswith(LFS):
        return None
    size = re.search(rb"size ([0-9]{1,18})", head)
    of = f" to {int(size[1]):,} bytes" if size else ""
    return f"a Git LFS pointer{of}, not the file: run `git lfs pull` in its folder, or {DOWNLOAD}"


def _page(path: Path, head: bytes) -> str | None:
    text = begins_as_text(head)
    if not text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error")):
        return None
    return (
        f"a web page, not a model (the answer of a server that asks to sign in, or has no such file): {DOWNLOAD}, "
        "with a token if the model asks for one"
    )


def _message(path: Path, head: bytes) -> str | None:
    known = (b"not found", b"entry not found", b"access to model", b"invalid username", b"unauthorized", b"forbidden")
    text = begins_as_text(head)
    if not text.startswith(known) and not re.match(rb'\{\s*"(error|message|detail)"', text):
        return None
    shown = " ".join(head.decode(errors="replace").split())[:80]
    return f"a server's message ({shown}), not a model: {DOWNLOAD}, with a token if the model asks for one"


# -- by name ----------------------------------------------------------------------------------------------------------


def _cut(path: Path, head: bytes) -> str | None:
    found = CUT.fullmatch(path.name)
    if found is None:
        return None
    whole = found["start"].rstrip(".-")
    pieces = f"{found['start']}{found['word']}*{found['rest'] or ''}"
    if found["rest"] and found["part"].isdecimal():
        count = int(found["rest"].removeprefix("of"))
        pieces = f"{found['start']}{found['word']}{{1..{count}}}of{count}"
    return (
        f"part {found['part']} of a GGUF file that was cut into pieces: join them with `cat {pieces} > {whole}`, and "
        f"give {whole}"
    )


def _unfinished(path: Path, head: bytes) -> str | None:
    return "a download that has not ended: let it end, and give the file" if path.name.endswith(UNFINISHED) else None


# -- other formats ----------------------------------------------------------------------------------------------------


def _pickle(path: Path, head: bytes) -> str | None:
    is_zip = head.startswith(b"PK\x03\x04")
    if not (head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05") and not (is_zip and path.suffix in PICKLES):
        return None
    return f"weights as a PyTorch pickle, which can run programs and is not read here: take {FORMATS}"


def _archive(path: Path, head: bytes) -> str | None:
    kind = next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), None)
    kind = kind or ("zip" if head.startswith(b"PK\x03\x04") else "tar" if head[257:262] == b"ustar" else None)
    return f"an archive ({kind}): unpack it, and give what is inside" if kind else None


def _old_ggml(path: Path, head: bytes) -> str | None:
    return f"a file of GGML from before GGUF (2023): take {FORMATS}" if head[:4] in OLD_GGML else None


def _program(path: Path, head: bytes) -> str | None:
    if not head.startswith((b"MZqFpD", b"\x7fELF", b"MZ")):
        return None
    return "a program, not a model: of a llamafile unpack the .gguf with `unzip`, and give that"


def _array(path: Path, head: bytes) -> str | None:
    return f"a NumPy array, not a model: take {FORMATS}" if head.startswith(b"\x93NUMPY") else None


BY_NAME: Sequence[Look] = (_cut, _unfinished)
TEXTS: Sequence[Look] = (_pointer, _page, _message)
OTHER_FORMATS: Sequence[Look] = (_pickle, _archive, _old_ggml, _program, _array)


# -- folders ----------------------------------------------------------------------------------------------------------


def what_folder(folder: Path) -> str:
    """What a folder without a model that is read here seems to be, and what to do."""
    return next(_seems(folder), f"a folder without a model: mpillama reads {FORMATS}")


def _seems(folder: Path) -> Iterator[str]:
    names = {entry.name for entry in folder.iterdir()}
    endings = {Path(name).suffix for name in names}
    if snapshots := _snapshots(folder):
        yield f"a cache of Hugging Face's: give the model's folder in it, {snapshots[-1]}"
    if "adapter_config.json" in names:
        yield adapter(folder)
    if "params.json" in names and any(re.fullmatch(r"consolidated.*\.safetensors", name) for name in names):
        yield (
            "a model in Mistral's own format (params.json, consolidated.safetensors): take the files of Hugging Face's "
            "format from the same page (config.json, model*.safetensors, tokenizer.json), or a .gguf file of it"
        )
    if "params.json" in names and any(name.startswith("consolidated.") for name in names):
        yield f"a model in Meta's own format (params.json, consolidated.*.pth): take {FORMATS}"
    if "model_index.json" in names:
        yield "a pipeline of diffusers, which makes pictures: mpillama runs models of text"
    if any(name.endswith(UNFINISHED) for name in names):
        yield "a folder whose download has not ended: let it end"
    if pieces := sorted(name for name in names if CUT.fullmatch(name)):
        yield f"{pieces[0]} is {_cut(folder / pieces[0], b'')}"
    if ".safetensors" in endings and "config.json" not in names:
        yield "safetensors files without their config.json: download config.json and tokenizer.json to the same folder"
    if ".safetensors" in endings:
        other = min(name for name in names if name.endswith(".safetensors"))
        yield f"{other} may be its weights: name it model.safetensors, or download the index that belongs to it"
    if endings & set(PICKLES):
        yield f"weights as PyTorch pickles, which can run programs and are not read here: take {FORMATS}"
    if endings & {".onnx", ".tflite", ".mlmodel", ".msgpack", ".ot"}:
        yield f"a model in another program's format: take {FORMATS}"


def _snapshots(folder: Path) -> list[Path]:
    """The models in a folder of Hugging Face's cache, the newest last."""
    inside = folder / "snapshots"
    found = [path for path in inside.iterdir() if path.is_dir()] if inside.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime)


def adapter(folder: Path) -> str:
    """What to do with an adapter."""
    text = (folder / "adapter_config.json").read_text(errors="replace")
    base = re.search(r'"base_model_name_or_path"\s*:\s*"([^"\n]{1,200})"', text)
    of = f" of {base[1]}" if base else ""
    return (
        f"an adapter (LoRA){of}, not a model: merge it into its base model (peft: merge_and_unload, then "
        "save_pretrained), and give that folder"
    )
