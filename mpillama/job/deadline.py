"""When a long command must stop: a signal from the scheduler, or the end of the job's time."""

import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from mpillama.errors import UserError

MARGIN_SECONDS = 30.0
"""Left before the end of a Slurm job, for the last step, the disk, and the launcher."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal; the loop looks at it between two steps."""

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self.name = ""
        self.signals = signals

    def install(self) -> None:
        """Take the signals as the wish to stop."""
        for number in self.signals:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name


def ignore_stop_signals(signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
    """On ranks that follow: a launcher sends signals to every rank, but rank 0 decides."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)


class Deadline:
    """The end of the run's time, if it has one: `end` in seconds of the epoch.

    Work is begun as long as a piece like the slowest so far can end in time.
    """

    def __init__(self, end: float | None, clock: Callable[[], float] = time.time):
        self.end = end
        self.clock = clock
        self.longest_row = 0.0

    @classmethod
    def of_run(cls, time_limit: str | None, environment: Mapping[str, str] | None = None) -> "Deadline":
        """The sooner of `--time-limit` from now and the end of the Slurm job."""
        environment = os.environ if environment is None else environment
        ends = [] if time_limit is None else [time.time() + parse_duration(time_limit)]
        job_end = environment.get("SLURM_JOB_END_TIME", "")
        if job_end.isdigit():
            ends.append(float(job_end) - MARGIN_SECONDS)
        return cls(min(ends) if ends else None)

    @property
    def left(self) -> float:
        """Seconds; infinite without an end."""
        return float("inf") if self.end is None else self.end - self.clock()

    @property
    def passed(self) -> bool:
        """Whether it is time to stop."""
        return self.left <= 0

    @property
    def admits(self) -> bool:
        """Whether another row may begin."""
        return self.left > self.longest_row

    def note(self, seconds: float) -> None:
        """A row took this long."""
        self.longest_row = max(self.longest_row, seconds)


def parse_duration(text: str) -> float:
    """Seconds of "90", "MM:SS", "HH:MM:SS" or "D-HH:MM:SS"; UserError for anything else."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text.strip())
    if not match:
        raise UserError(f"--time-limit {text!r} is no time: write seconds, MM:SS, HH:MM:SS or D-HH:MM:SS.")
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
