"""`inspect`: what is in a model of any format; needs no MPI."""

import json
import math
import sys
from typing import Any

from mpillama.cli.display import in_units, print_table
from mpillama.cli.options import InspectOptions
from mpillama.formats.checkpoint_model import CheckpointModel
from mpillama.formats.native.reader import NativeModel
from mpillama.formats.native.table import FORMAT, FORMAT_VERSION
from mpillama.loading.model_file import ModelFile, open_model
from mpillama.models.tensors import TensorSpec

FORMATS = {"hugging_face": "Hugging Face, safetensors", "gguf": "GGUF", "dllama": "distributed-llama"}


def inspect(options: InspectOptions) -> int:
    """Print configuration, tensors, sizes and format; returns the exit status."""
    model = open_model(options.file, tokenizer=options.tokenizer)
    if options.json:
        sys.stdout.write(json.dumps(describe(model), indent=2) + "\n")
    else:
        _print_tables(model)
    return 0


def describe(model: ModelFile) -> dict[str, Any]:
    """Everything as plain values; sizes in bytes. The version is that of our own format, null for others."""
    return {
        "path": model.path,
        "format": model.checkpoint.kind if isinstance(model, CheckpointModel) else FORMAT,
        "format_version": None if isinstance(model, CheckpointModel) else FORMAT_VERSION,
        "file_bytes": sum(model.files.values()),
        "files": dict(model.files),
        "metadata_sha256": model.metadata_sha256,
        "config": dict(model.config_json),
        "parameters": parameters(model),
        "texts": {name: len(text) for name, text in model.texts.items()},
        "tensors": [_describe_tensor(model, spec) for spec in model.specs],
    }


def parameters(model: ModelFile) -> int:
    """The number of weights, padding not counted."""
    return sum(math.prod(spec.source_shape) * max(1, spec.experts) for spec in model.specs)


def _describe_tensor(model: ModelFile, spec: TensorSpec) -> dict[str, Any]:
    """One tensor as it is run, and the arrays of the files that it is read from."""
    return {
        "name": spec.name,
        "shape": [*([spec.experts] if spec.experts else []), *spec.source_shape],
        "weight_type": spec.weight_type.name,
        "split": spec.split.kind if spec.split else "replicated",
        "units": spec.units,
        "bytes": model.stored_bytes(spec, range(spec.units)),
        "arrays": _arrays(model, spec),
    }


def _arrays(model: ModelFile, spec: TensorSpec) -> list[dict[str, Any]]:
    if isinstance(model, CheckpointModel):
        found = [model.checkpoint.tensors[name] for name in spec.source_names]
        files = model.checkpoint.files
        parts = ((tensor.stored, part) for tensor in found for part in tensor.parts)
        return [
            {"name": p.name, "shape": list(p.shape), "offset": p.offset, "stored": stored, "file": files[p.file]}
            for stored, p in parts
        ]
    assert isinstance(model, NativeModel)
    entries = [model.entries[array.name] for array in spec.arrays()]
    return [{"name": e.spec.name, "shape": list(e.spec.shape), "offset": e.offset} for e in entries]


def _print_tables(model: ModelFile) -> None:
    found = describe(model)
    version = "" if found["format_version"] is None else f" version {found['format_version']}"
    about = {
        "file": f"{model.path}, {in_units(found['file_bytes'])}" + _several(model),
        "format": f"{FORMATS.get(found['format'], FORMAT)}{version}, sha256 {model.metadata_sha256[:16]}…",
        "parameters": f"{found['parameters']:,}",
        "inside": ", ".join(f"{name} ({in_units(size)})" for name, size in found["texts"].items()) or "no texts",
        **{key: json.dumps(value) for key, value in model.config_json.items()},
    }
    print_table([], list(about.items()))
    header = ["tensor", "shape", "type", "split by", "units", "bytes", "offset"]
    print_table(header, [_row(tensor) for tensor in found["tensors"]])


def _several(model: ModelFile) -> str:
    return f" in {len(model.files)} files" if len(model.files) > 1 else ""


def _row(tensor: dict[str, Any]) -> list[str]:
    stored = tensor["arrays"][0].get("stored", tensor["weight_type"])
    kind = stored if stored == tensor["weight_type"] else f"{stored}, run as {tensor['weight_type']}"
    return [
        tensor["name"],
        " x ".join(map(str, tensor["shape"])),
        kind,
        tensor["split"],
        f"{tensor['units']:,}",
        f"{tensor['bytes']:,}",
        f"{tensor['arrays'][0]['offset']:,}",
    ]
