"""`inspect`: what is in a model file; needs no MPI."""

import json
import math
import sys
from typing import Any

from mpillama.files.native import FORMAT, FORMAT_VERSION, NativeModel, read_table
from mpillama.options import InspectOptions
from mpillama.tools.display import in_units


def inspect(options: InspectOptions) -> int:
    """Print configuration, tensors, sizes and format; returns the exit status."""
    model = read_table(options.file)
    if options.json:
        sys.stdout.write(json.dumps(describe(model), indent=2) + "\n")
    else:
        _print_tables(model)
    return 0


def describe(model: NativeModel) -> dict[str, Any]:
    """Everything as plain values; sizes in bytes."""
    return {
        "path": model.path,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "file_bytes": model.file_size,
        "metadata_sha256": model.metadata_sha256,
        "config": dict(model.config_json),
        "parameters": parameters(model),
        "texts": {name: len(text) for name, text in model.texts.items()},
        "tensors": [_describe_tensor(model, spec) for spec in model.specs],
    }


def parameters(model: NativeModel) -> int:
    """The number of weights, padding not counted."""
    return sum(math.prod(spec.source_shape) for spec in model.specs)


def _describe_tensor(model: NativeModel, spec: Any) -> dict[str, Any]:
    entries = [model.entries[array.name] for array in spec.arrays()]
    return {
        "name": spec.name,
        "shape": list(spec.source_shape),
        "weight_type": spec.weight_type.name,
        "split": spec.split.value,
        "units": spec.units,
        "bytes": sum(e.bytes for e in entries),
        "arrays": [{"name": e.spec.name, "shape": list(e.spec.shape), "offset": e.offset} for e in entries],
    }


def _print_tables(model: NativeModel) -> None:
    from rich.console import Console
    from rich.table import Table

    console, facts = Console(), Table(show_header=False, box=None)
    about = {
        "file": f"{model.path}, {in_units(model.file_size)}",
        "format": f"{FORMAT} version {FORMAT_VERSION}, sha256 {model.metadata_sha256[:16]}…",
        "parameters": f"{parameters(model):,}",
        "inside": ", ".join(f"{name} ({in_units(len(text))})" for name, text in model.texts.items()) or "no texts",
        **{key: json.dumps(value) for key, value in model.config_json.items()},
    }
    for key, value in about.items():
        facts.add_row(key, value)
    console.print(facts)
    tensors = Table("tensor", "shape", "type", "split by", "units", "bytes", "offset")
    for row in describe(model)["tensors"]:
        tensors.add_row(
            row["name"],
            " x ".join(map(str, row["shape"])),
            row["weight_type"],
            row["split"],
            f"{row['units']:,}",
            f"{row['bytes']:,}",
            f"{row['arrays'][0]['offset']:,}",
        )
    console.print(tensors)
