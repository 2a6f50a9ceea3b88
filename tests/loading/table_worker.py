"""Reads the tables of damaged files in a process of its own, so that a crash inside HDF5 is seen as one.

Standard input: one path a line. Standard output: one JSON object a line.
"""

import hashlib
import json
import resource
import sys
import time
from typing import Any

from mpillama.errors import UserError
from mpillama.formats.native.reader import NativeModel
from mpillama.formats.native.table import read_table


def fingerprint(model: NativeModel) -> str:
    """A digest of everything but the weights and the path."""
    table = [(e.spec, e.offset, e.checksums.tolist()) for e in model.entries.values()]
    parts = (model.file_size, sorted(model.config_json.items()), model.weight_types, table, sorted(model.texts.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def outcome(path: str) -> dict[str, Any]:
    """{"table": fingerprint}, {"mistake": sentence} or {"failure": what else was raised}."""
    try:
        return {"table": fingerprint(read_table(path))}
    except UserError as error:
        return {"mistake": str(error)}
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test wants to see it
        return {"failure": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer until standard input ends."""
    for line in sys.stdin:
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = outcome(line.rstrip("\n"))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(json.dumps({**answer, "seconds": time.monotonic() - start, "grown": grown}), flush=True)


if __name__ == "__main__":
    main()
