"""A thread of each rank that watches while the rank works: memory, page faults, speed; it needs no MPI."""

import logging
import resource
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import psutil

from mpillama.errors import UserError
from mpillama.job.host_memory import available_bytes

FLOOR_PERIOD = 0.5
"""Seconds between looks at the host's memory."""
PATIENCE = 3
"""Looks by which a rank leaves it to the first one of its host to speak."""


class CountsTokens(Protocol):
    """What a rank runs: the tokens that went through it so far."""

    tokens_run: int


@dataclass(frozen=True)
class Sample:
    """A rank's state: bytes, and counts since the process began."""

    seconds: float
    resident: int
    available: int
    swapped: int
    minor_faults: int
    major_faults: int
    tokens: int

    def line(self, before: "Sample") -> str:
        """What a person reads; page faults and tokens are those since `before`."""
        speed = (self.tokens - before.tokens) / max(self.seconds - before.seconds, 1e-9)
        return (
            f"RSS {self.resident / 1e9:.3f} GB, host: {self.available / 1e9:.3f} GB available, swap "
            f"{self.swapped / 1e9:.3f} GB used; page faults: {self.minor_faults - before.minor_faults} minor, "
            f"{self.major_faults - before.major_faults} major; {speed:.1f} tokens/s."
        )


class Monitor:
    """Logs a line each `interval` seconds and at the end; ends the job when the host has less than `floor` bytes left.

    Either may be None. `leads` says whether this is the first rank of its host.
    """

    def __init__(self, interval: float | None, floor: int | None, leads: bool = True):
        self.interval = interval
        self.floor = floor
        self.patience = 0 if leads else PATIENCE
        self.model: CountsTokens | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def __enter__(self) -> Self:
        if self.interval is not None or self.floor is not None:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    def watch(self, model: CountsTokens) -> None:
        """Count the tokens of this model from now on."""
        self.model = model

    def _run(self) -> None:
        before = self._sample()
        while not self.ended.wait(self._pause(before.seconds)):
            self._check_floor()
            if self.interval is not None and time.monotonic() >= before.seconds + self.interval:
                before = self._tell(before)
        if self.interval is not None:
            self._tell(before)

    def _tell(self, before: Sample) -> Sample:
        """Log what has changed since the last line."""
        now = self._sample()
        logging.getLogger(__name__).info("%s", now.line(before))
        return now

    def _pause(self, last: float) -> float:
        """Seconds until there is something to do."""
        until_line = max(0.0, last + self.interval - time.monotonic()) if self.interval is not None else FLOOR_PERIOD
        return until_line if self.floor is None else min(until_line, FLOOR_PERIOD)

    def _sample(self) -> Sample:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        resident, swapped = int(psutil.Process().memory_info().rss), int(psutil.swap_memory().used)
        tokens = self.model.tokens_run if self.model else 0
        return Sample(time.monotonic(), resident, available_bytes(), swapped, usage.ru_minflt, usage.ru_majflt, tokens)

    def _check_floor(self) -> None:
        """Raise UserError in this thread, which ends all ranks (comm/failure.py)."""
        if self.floor is None or (left := available_bytes()) >= self.floor:
            return
        self.patience -= 1
        if self.patience >= 0:
            return
        sentence = (
            f"the host has {left / 1e9:.2f} GB of memory left, less than --memory-floor {self.floor / 1e9:.2f} GB: "
            "the job ends before the system kills it; take more nodes, smaller weights, --kv-type q8 or a shorter "
            "--max-seq-len."
        )
        logging.getLogger(__name__).critical("%s", sentence)
        raise UserError(sentence)
