"""The output file of a batch: finished rows are appended in groups and forced to disk; a torn end is repaired.

Beside it, the file of runs has a line for each start and end of a run.
"""

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpillama.batch.results import Provenance
from mpillama.errors import UserError

FLUSH_SECONDS = 1.0
FLUSH_BYTES = 1 << 20
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Journal:
    """Appends to an output file that may hold results of earlier runs.

    `finished` maps the input's line numbers that have a result to their ids. UserError if the file is no output of this
    model and these options, if another process writes it, or if it cannot be written.
    """

    def __init__(
        self, path: str, provenance: Provenance, options: Mapping[str, Any], options_before: Mapping[str, Any]
    ):
        self.path = path
        self.provenance = provenance
        self._changed = difference(options_before, options)
        self.finished: dict[int, str | None] = {}
        self.errors = 0
        self.repaired = 0
        self._pending: list[bytes] = []
        self._flushed = time.monotonic()
        self._fd = self._open()
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}): name another output file.") from error

    def _lock(self) -> None:
        """Keep a second job off this file, where the file system knows locks."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return
            raise UserError(f"{self.path}: another job is writing it: wait for its end, or name another.") from error

    def _read(self) -> None:
        """Note what is finished; cut off a last line that was not written whole."""
        whole = 0
        with os.fdopen(self._fd, "rb", closefd=False) as file:
            for number, text in enumerate(file, 1):
                found = self._result(text)
                if found is None:
                    self._refuse_in_the_middle(number, whole + len(text))
                    break
                self._note(number, found)
                whole += len(text)
        self.repaired = os.fstat(self._fd).st_size - whole
        if self.repaired:
            os.ftruncate(self._fd, whole)

    @staticmethod
    def _result(text: bytes) -> dict[str, Any] | None:
        """A line's result; None if it is torn."""
        if not text.endswith(b"\n"):
            return None
        try:
            found = json.loads(text)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def _refuse_in_the_middle(self, number: int, end: int) -> None:
        if end < os.fstat(self._fd).st_size:
            raise UserError(
                f"{self.path}: line {number} is no result, but others follow it: this is not an output file of "
                "`mpillama batch`, or it was damaged; name another."
            )

    def _note(self, number: int, found: dict[str, Any]) -> None:
        """Take a result of an earlier run."""
        came_from = found.get("provenance")
        if not isinstance(came_from, dict) or not isinstance(found.get("line"), int):
            raise UserError(f"{self.path}: line {number} is no result of `mpillama batch`: name another output file.")
        options = f"other options{f' ({self._changed})' if self._changed else ''}"
        for name, what in (("model_sha256", "another model"), ("options_sha256", options)):
            if came_from.get(name) != self.provenance.as_json()[name]:
                raise UserError(
                    f"{self.path}: line {number} was made with {what}: continue with what it was begun with, or name "
                    "another output file."
                )
        self._finish(found["line"], found.get("custom_id"), found.get("error") is not None)

    def _finish(self, line: int, name: str | None, is_error: bool) -> None:
        self.finished[line] = name
        self.errors += is_error

    def append(self, line: int, name: str | None, result: bytes, is_error: bool) -> None:
        """Add a result; it is safe after the next flush."""
        self._finish(line, name, is_error)
        self._pending.append(result)

    def flush(self, now: bool = False) -> None:
        """Force what is pending to disk if there is much of it, or some for long, or at once."""
        size = sum(map(len, self._pending))
        if not size or not (now or size >= FLUSH_BYTES or time.monotonic() - self._flushed >= FLUSH_SECONDS):
            return
        self._write(b"".join(self._pending))
        self._pending.clear()
        self._flushed = time.monotonic()

    def _write(self, data: bytes) -> None:
        """Append whole results or nothing."""
        before = os.fstat(self._fd).st_size
        try:
            done = 0
            while done < len(data):
                done += os.write(self._fd, data[done:])
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, before)
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}): make room and start again; what was finished "
                "before stays."
            ) from error

    def close(self) -> None:
        """Write what is pending and let the file go."""
        try:
            self.flush(now=True)
        finally:
            os.close(self._fd)


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
