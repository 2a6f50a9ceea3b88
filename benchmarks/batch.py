"""Measure `mpillama batch` end to end: throughput of short prompts, the scheduler's share, prefix cache, drafts.

The model is a known shape with weights that are all zero (holes in the file: no disk, but memory and arithmetic like
any other). Each figure is a run of its own; prints one JSON object.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.formats.native.table import read_table
from mpillama.formats.native.writer import create_file, seal_file, write_model
from mpillama.models.config import ModelConfig
from mpillama.models.shapes import shape_config
from mpillama.models.tensors import WeightTypes
from mpillama.quant.registry import WEIGHT_TYPES

Row = dict[str, Any]


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--weights", default="q4_0")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--prefix", type=int, default=0, help="tokens that all prompts share")
    parser.add_argument("--no-prefix-cache", action="store_true", help="compute each prompt in full")
    parser.add_argument("--options", nargs="*", default=[], help="more options of batch")
    parser.add_argument("--tokenizer", default="data/demo.h5", help="native file whose tokenizer is used")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = hollow_model(Path(folder) / "model.h5", given.shape, given.weights, given.tokenizer)
        rows = Path(folder) / "in.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in short_rows(given)))
        sys.stdout.write(json.dumps(run(given, model, rows, Path(folder) / "out.jsonl"), indent=2) + "\n")


def hollow_model(path: Path, shape: str, weights: str, tokenizer: str) -> Path:
    """A native file of a shape without anything on disk."""
    config, types = shape_config(shape), WeightTypes(WEIGHT_TYPES[weights])
    texts = {"tokenizer.json": read_table(tokenizer).texts["tokenizer.json"]}
    entries = create_file(str(path), config, types, ModelConfig.from_hf(config).tensors(types), texts)
    seal_file(str(path), config, types, entries, texts, {name: e.checksums for name, e in entries.items()})
    return path


def filled_model(path: Path, shape: str, weights: str, tokenizer: str) -> Path:
    """A native file of a shape with random weights of a model's size: what is sent of sums depends on their numbers."""
    config, weight_type, rng = shape_config(shape), WEIGHT_TYPES[weights], np.random.default_rng(0)
    shapes = {
        name: (spec.source_shape, spec.vector)
        for spec in ModelConfig.from_hf(config).tensors(WeightTypes(weight_type))
        for name in spec.source_names
    }

    def tensor(name: str) -> np.ndarray:
        size, is_vector = shapes[name]
        if is_vector:
            return np.full(size, 0.0 if name.endswith(".bias") else 1.0, np.float32)
        return rng.standard_normal(size, np.float32) / np.float32(size[-1] ** 0.5)

    write_model(
        str(path), config, weight_type, tensor, {"tokenizer.json": read_table(tokenizer).texts["tokenizer.json"]}
    )
    return path


def short_rows(given: argparse.Namespace) -> Iterator[Row]:
    """Prompts of token ids that differ after the common prefix; answers that all have their full length."""
    prefix = [3 + i % 200 for i in range(given.prefix)]
    for number in range(given.rows):
        own = [5 + number % 1000] * given.prompt
        yield {
            "id": str(number),
            "prompt": prefix + own,
            "max_tokens": given.answer,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": not given.no_prefix_cache,
        }


def run(given: argparse.Namespace, model: Path, rows: Path, target: Path) -> dict[str, Any]:
    """One batch; its summary, and what follows from it."""
    launcher = [shutil.which("mpirun") or "mpirun", "-n", str(given.ranks)] if given.ranks > 1 else []
    longest = given.prefix + given.prompt + given.answer + 1
    options = ["--sequences", given.sequences, "--max-seq-len", longest, "--model", model, "--json", *given.options]
    command = [*launcher, sys.executable, "-m", "mpillama", "batch", rows, target, *options]
    summary = json.loads(subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE).stdout)
    overhead = 1 - summary["model_seconds"] / summary["step_seconds"]
    return {"rows_per_second": summary["rows"] / summary["seconds"], "scheduler_share": overhead, **summary}


if __name__ == "__main__":
    main()
