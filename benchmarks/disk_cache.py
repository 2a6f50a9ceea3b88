"""How long a text takes whose KV cache is on disk, against its prefill: two runs of the program, one after the other.

python benchmarks/disk_cache.py MODEL --tokens 4000          (under mpirun: on several ranks)

Prints one JSON object: seconds to the first token without files, the end with their writing, seconds to the first token
in a new process state (the model loaded again), and whether all logits have the same bits.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpillama import LLM
from mpillama.engine.sequence import Request
from mpillama.text.sampling_params import SamplingParams


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--kv-type", default="f16")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(given, folder) for _ in range(2)]
        found = [path.stat().st_size for path in Path(folder).rglob("*.kv")]
    first, second = runs
    if first:
        result = {
            "tokens": given.tokens, "first": first, "again": second, "files": len(found), "bytes": sum(found),
            "share_of_prefill": second["seconds"] / first["seconds"],
            "same_bits": first["logits_sha256"] == second["logits_sha256"],
        }  # fmt: skip
        sys.stdout.write(json.dumps(result, indent=2) + "\n")


def run(given: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Load the model, ask for one token, end; on rank 0 what it took."""
    digest = hashlib.sha256()
    with LLM(given.model, kv_type=given.kv_type, cache_dir=folder, sequences=1) as llm:
        if not llm.is_root:
            return {}
        size = llm.engine.executor.model.config.vocab_size
        ids = np.random.default_rng(0).integers(10, size - 10, given.tokens).tolist()
        tell = lambda logits, token: digest.update(logits.tobytes())  # noqa: E731
        began = time.perf_counter()
        sequence = llm.engine.submit(Request(ids, SamplingParams(temperature=0.0, max_tokens=1), on_logits=tell))
        while not sequence.finished:
            llm.engine.step()
        seconds = time.perf_counter() - began
        ends = time.perf_counter()
    return {
        "seconds": seconds,
        "cached_tokens": sequence.cached_tokens,
        "end_seconds": time.perf_counter() - ends,
        "logits_sha256": digest.hexdigest(),
    }


if __name__ == "__main__":
    main()
