"""A rank's side of the cache on disk: files of blocks and states that left memory, in a folder that ranks may share.

A thread writes them; nobody waits for it before the end. Files that were used longest ago go first once all files of
the folder, those of other models and runs included, are larger than a limit.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import numpy as np

from mpillama.formats.cache_file import NEW, CacheFile, Name, TornFileError, write_cache_file
from mpillama.models.cache import KVCache
from mpillama.models.cache_layout import Coverage, Kind, Layout, Run

LOG = logging.getLogger(__name__)
MOST_PENDING = 128 << 20
"""Bytes that wait to be written; what comes when there are more is dropped, unless somebody waits for it."""
KEPT_FREE = 16
"""Once the files exceed the limit, this part of it is made free; they are counted anew after as much was written."""
STALE_SECONDS = 86400.0
"""After this time a file that was not given its name yet is left over from a run that was killed."""
TICK = 0.05
SUFFIXES: dict[Kind, str] = {"block": ".kv", "state": ".state"}

LayoutOf = Callable[[Kind, Coverage], Layout]


@dataclass(frozen=True)
class Place:
    """A block or a state slot, by the digest of the text before its end."""

    kind: Kind
    number: int
    digest: bytes


@dataclass(frozen=True)
class FolderSettings:
    """Where files are, which model they are of, and how many bytes they may take.

    `counts`: this rank counts and deletes for all that share the folder; each file of its own stands for `sharers` as
    many bytes. Of `holders` ranks that divide the positions this is number `holder`.
    """

    folder: Path
    model: str
    limit: int
    counts: bool = True
    sharers: float = 1.0
    holder: int = 0
    holders: int = 1


class CacheFolder:
    """Writes blocks and states of a rank's cache into files, and reads them back, also those of other ranks."""

    def __init__(
        self, settings: FolderSettings, cache: KVCache, coverage_of: Callable[[Kind], Coverage], layout_of: LayoutOf
    ):
        self.settings = settings
        self.cache = cache
        self.off = False
        """Whether nothing is written any more, since a file could not be."""
        self.own: dict[Kind, Layout] = {kind: layout_of(kind, coverage_of(kind)) for kind in SUFFIXES}
        self._layouts: dict[tuple[Kind, str], Layout] = {}
        self._layout_of = layout_of
        self._endings = {kind: _ending(layout.coverage) + SUFFIXES[kind] for kind, layout in self.own.items()}
        self._changed = threading.Condition()
        self._queue: deque[tuple[Place, np.ndarray, int]] = deque()
        self._pending: dict[tuple[Kind, bytes], np.ndarray] = {}
        self._pending_bytes = 0
        self._ends = False
        self._done = 0
        self._uncounted = 0.0
        self._thread = threading.Thread(target=self._write_all, name="cache writer", daemon=True)
        self._thread.start()

    # -- the main thread -----------------------------------------------------------------------------------------------

    def holds(self, kind: Kind, digest: bytes) -> bool:
        """Whether files, or what waits to be one, seem to have all that this rank needs."""
        own = self.own[kind]
        if (kind, digest) in self._pending or not own.size or os.access(self._path(kind, digest), os.R_OK):
            return True
        missing = {run.key: set(run.units) for run in own.runs.values()}
        for path in self._others(kind, digest):
            try:
                file = self._open(path, kind, digest)
            except (OSError, TornFileError):
                continue
            file.close()
            for key, units in list(missing.items()):
                if (run := file.layout.runs.get(key)) and not (units - set(run.units)):
                    del missing[key]
                elif run:
                    missing[key] = units - set(run.units)
        return not missing

    def save(self, place: Place, stamp: int, on_progress: Callable[[], None] | None = None) -> None:
        """Take a copy of what is to be written; `stamp` ns is when it was last used.

        If too much is pending, or memory is short, it is dropped. With `on_progress` this waits until less is pending,
        and calls it as files are written.
        """
        layout, number = self.own[place.kind], self._own_number(place)
        if self.off or not layout.size or number is None:
            return
        if on_progress:
            self._await_room(on_progress)
        if self._pending_bytes > MOST_PENDING or (place.kind, place.digest) in self._pending:
            return
        try:
            data = np.empty(layout.size, np.uint8)
        except MemoryError:
            return
        for run, array in layout.views(self.cache.layers, number):
            data[run.offset : run.offset + run.size].view(array.dtype).reshape(array.shape)[...] = array
        with self._changed:
            self._pending[place.kind, place.digest] = data
            self._pending_bytes += len(data)
            self._queue.append((place, data, stamp))
            self._changed.notify_all()

    def _own_number(self, place: Place) -> int | None:
        """Where a place is in this rank's cache; None if another rank holds it."""
        if place.kind == "state":
            return place.number
        number, holder = divmod(place.number, self.settings.holders)
        return number if holder == self.settings.holder else None

    def _await_room(self, on_progress: Callable[[], None]) -> None:
        seen = self._done
        while self._pending_bytes > MOST_PENDING and not self.off and self._thread.is_alive():
            with self._changed:
                self._changed.wait(TICK)
            if self._done != seen:
                seen = self._done
                on_progress()

    def load(self, place: Place) -> bool:
        """Fill a block or a state slot; False if files lack something of it, whose contents mean nothing then.

        Of what another rank holds nothing is lacked.
        """
        kind, digest, own = place.kind, place.digest, self.own[place.kind]
        number = self._own_number(place)
        if number is None:
            return True
        data = self._pending.get((kind, digest))
        wanted = list(own.views(self.cache.layers, number))
        if data is not None:
            for run, array in wanted:
                array[...] = data[run.offset : run.offset + run.size].view(array.dtype).reshape(array.shape)
            return True
        missing = {run.key: set(run.units) for run, _ in wanted}
        for path in self._candidates(kind, digest) if missing else ():
            self._fill_from(path, kind, digest, wanted, missing)
            if not missing:
                return True
        return not missing

    def _candidates(self, kind: Kind, digest: bytes) -> Iterator[Path]:
        own = self._path(kind, digest)
        yield own
        yield from (path for path in self._others(kind, digest) if path != own)

    def _fill_from(
        self, path: Path, kind: Kind, digest: bytes, wanted: list[tuple[Run, np.ndarray]],
        missing: dict[tuple[int, int, int], set[int]],
    ) -> None:  # fmt: skip
        """Fill what is missing and in a file; a torn file is deleted."""
        try:
            file = self._open(path, kind, digest)
        except TornFileError as error:
            self._delete(path, error)
            return
        except OSError:
            return
        try:
            for run, array in wanted:
                of_file = file.layout.runs.get(run.key)
                units = missing.get(run.key, set()) & set(of_file.units if of_file else ())
                for found in spans(units):  # nothing between them, which another file has filled and this may spoil
                    first = run.units.start
                    file.read(run.key, found, array[found.start - first : found.stop - first])
                    missing[run.key] -= set(found)
                if run.key in missing and not missing[run.key]:
                    del missing[run.key]
            with_errors_ignored(lambda: os.utime(path))
        except TornFileError as error:
            self._delete(path, error)
        except OSError as error:
            LOG.info("%s: cannot be read (%s).", path, error.strerror)
        finally:
            file.close()

    def close(self, on_progress: Callable[[], None]) -> None:
        """Write what is pending, and end; `on_progress` is called from time to time as long as files are written."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        seen = -1
        while self._thread.is_alive():
            self._thread.join(TICK)
            if self._done != seen:
                seen = self._done
                on_progress()

    def abandon(self) -> None:
        """Write nothing more, and let the thread end after the file that it is at; nobody waits for it."""
        with self._changed:
            self.off = self._ends = True
            self._queue.clear()
            self._pending.clear()
            self._pending_bytes = 0
            self._changed.notify_all()

    # -- files ---------------------------------------------------------------------------------------------------------

    def _folder_of(self, digest: bytes) -> Path:
        return self.settings.folder / self.settings.model / digest[:1].hex()

    def _path(self, kind: Kind, digest: bytes) -> Path:
        return self._folder_of(digest) / f"{digest.hex()}{self._endings[kind]}"

    def _others(self, kind: Kind, digest: bytes) -> list[Path]:
        """All files of a digest, whoever wrote them."""
        start, end = digest.hex() + "-", SUFFIXES[kind]
        try:
            return sorted(p for p in self._folder_of(digest).iterdir() if p.name.startswith(start) and p.suffix == end)
        except OSError:
            return []

    def _open(self, path: Path, kind: Kind, digest: bytes) -> CacheFile:
        return CacheFile(path, self._name(digest), kind, lambda coverage: self._layout(kind, coverage))

    def _layout(self, kind: Kind, coverage: Coverage) -> Layout:
        key = kind, repr(coverage.as_json())
        if key not in self._layouts:
            self._layouts[key] = self._layout_of(kind, coverage)
        return self._layouts[key]

    def _name(self, digest: bytes) -> Name:
        return Name(self.settings.model, digest.hex())

    def _delete(self, path: Path, why: Exception) -> None:
        LOG.info("%s: %s, deleted.", path, why)
        with_errors_ignored(lambda: path.unlink(missing_ok=True))

    # -- the writer's thread -------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        if self.settings.counts:
            with_errors_ignored(self._make_room)
        while True:
            with self._changed:
                while not self._queue and not self._ends:
                    self._changed.wait()
                if not self._queue:
                    return
                place, data, stamp = self._queue.popleft()
            if not self.off:
                self._write(place, data, stamp)
            with self._changed:
                if self._pending.pop((place.kind, place.digest), None) is not None:
                    self._pending_bytes -= len(data)
                self._done += 1
                self._changed.notify_all()

    def _write(self, place: Place, data: np.ndarray, stamp: int) -> None:
        path = self._path(place.kind, place.digest)
        try:
            if path.exists():  # of a rank that holds the same
                return
            try:
                written = self._write_file(path, place, data)
            except FileNotFoundError:  # somebody deleted the folder meanwhile
                written = self._write_file(path, place, data)
        except OSError as error:
            self.off = True
            LOG.warning(
                "%s: a file of the cache cannot be written (%s): nothing more is kept there, all else goes on.",
                self.settings.folder, error.strerror or error,
            )  # fmt: skip
            return
        except MemoryError:
            return
        with_errors_ignored(lambda: os.utime(path, ns=(stamp, stamp)))  # another job may have made room already
        self._uncounted += written * self.settings.sharers
        if self.settings.counts and self._uncounted >= self.settings.limit / KEPT_FREE:
            with_errors_ignored(self._make_room)

    def _write_file(self, path: Path, place: Place, data: np.ndarray) -> int:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        return write_cache_file(path, self._name(place.digest), self.own[place.kind], data)

    def _make_room(self) -> None:
        """Delete the files that were used longest ago, if all are larger than the limit.

        Those that may not be looked at or deleted, another user's, stay.
        """
        self._uncounted = 0.0
        files, now = [], time.time()
        for folder, _, names in os.walk(self.settings.folder):
            for name in names:
                path = Path(folder, name)
                if not name.endswith((*SUFFIXES.values(), NEW)):
                    continue
                try:
                    found = path.stat()
                except OSError:  # it got its name, or another job made room
                    continue
                if not name.endswith(NEW):
                    files.append((found.st_mtime_ns, found.st_size, path))
                elif now - found.st_mtime > STALE_SECONDS:
                    is_deleted(path)
        total, limit = sum(size for _, size, _ in files), self.settings.limit
        if total <= limit:
            return
        for _, size, path in sorted(files):
            if total <= limit - limit // KEPT_FREE:
                break
            if is_deleted(path):
                total -= size


def _ending(coverage: Coverage) -> str:
    """Of a file's name: files of one text that cover different layers or units lie beside each other."""
    return "-" + blake2b(repr(coverage.as_json()).encode(), digest_size=4).hexdigest()


def spans(units: Iterable[int]) -> Iterator[range]:
    """Runs of consecutive numbers."""
    for _, run in groupby(enumerate(sorted(units)), lambda pair: pair[1] - pair[0]):
        found = [unit for _, unit in run]
        yield range(found[0], found[-1] + 1)


def is_deleted(path: Path) -> bool:
    """Delete a file; whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def with_errors_ignored(action: Callable[[], None]) -> None:
    """What fails here is tried again later, or does no harm."""
    try:
        action()
    except OSError as error:
        LOG.info("the cache on disk: %s.", error)
