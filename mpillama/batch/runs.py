"""What ran when: one line for each run of a batch, beside its output file."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpillama.errors import UserError


def options_digest(options: Mapping[str, Any]) -> str:
    """What tells these options from others."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def runs_path(output: str) -> Path:
    """The file of runs that belongs to an output file."""
    return Path(output + ".runs")


def record(output: str, event: str, fields: Mapping[str, Any]) -> None:
    """Append what happened; UserError if the file cannot be written."""
    path = runs_path(output)
    line = json.dumps({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **fields})
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from error


def last_options(output: str) -> dict[str, Any]:
    """The options of the latest run that is told of; none if there is no such line."""
    try:
        lines = runs_path(output).read_text().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # the end of a killed run
        if isinstance(found, dict) and isinstance(found.get("options"), dict):
            return dict(found["options"])
    return {}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The options that changed, in words; empty if none is known to have."""
    names = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names)
