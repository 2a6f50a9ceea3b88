"""How a run ends when something fails: all ranks within seconds, one message, a nonzero status."""

import errno
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from mpillama.comm.launcher import (
    OPEN_MPI,
    ask_for_threads,
    launched_first,
    launched_rank,
    launched_size,
    quiet_mpi,
)
from mpillama.errors import UserError
from mpillama.redaction import hide

USER_ERROR_STATUS = 2
FAILURE_STATUS = 1
LAST_WORD_SECONDS = 2
"""How long MPI may take to end the job before this process ends by itself, whatever MPI does."""
LONGEST_TURN = 2.0
"""How long a rank leaves it to lower ranks to say what may have struck all of them."""
POLL_SECONDS = 0.02
DELIVERY_SECONDS = 0.2
"""Left to the launcher to pass the last words on: some drop what they have not read when a job is aborted."""
MPI_SECONDS = 60.0
"""MPI may take so long to start, or to end, however short --timeout is: hosts and their file servers are busy then."""
KILL_SECONDS = 2.0
"""Open MPI ends the ranks of an aborted job by SIGTERM, and kills them a second later: none need say so."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
NOT_MAPPED = "failed to map segment"
"""What the system says of an extension module for which there are no addresses left."""
NO_THREAD = "can't start new thread"
"""What Python says if the system gives it no memory for a thread's stack (or no more threads)."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def report_user_error(message: str) -> None:
    """Print a user's mistake, once: on rank 0 as the launcher counts."""
    if launched_rank() == 0:
        print_error(f"mpillama: {message}")


def print_error(text: str) -> None:
    """Write to standard error, which may be closed."""
    try:
        sys.stderr.write(hide(text) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # nobody is listening; the status still tells


def stop_printing() -> int:
    """Nobody reads standard output any more: throw away what is still to be printed; returns the usual status."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return 128 + signal.SIGPIPE


def out_of_memory(error: BaseException) -> str | None:
    """The sentence for an exception that means too little memory, None for any other."""
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    said = (isinstance(error, RuntimeError) and NO_THREAD) or (isinstance(error, ImportError) and NOT_MAPPED)
    if not (refused or isinstance(error, MemoryError) or (said and said in str(error))):
        return None
    reason = f" ({' '.join(str(error).split())})" if str(error) else ""
    return (
        f"out of memory{reason}: take more nodes, smaller weights (--weights q4_0, --kv-type q8) or a shorter "
        "--max-seq-len; `mpillama plan` shows what fits, `ulimit -v` what a process may take."
    )


class Aborter:
    """Ends all ranks when an exception escapes on one of them; otherwise the rest would wait forever.

    `abort` is MPI's, once MPI has started; with `tell_end` and `knows_of_end` one rank alone says why the job ends.
    """

    def __init__(self, rank: int, size: int):
        self.abort: Callable[[int], Any] = os._exit
        self.tell_end: Callable[[], None] = lambda: None
        self.knows_of_end: Callable[[], bool] = lambda: False
        self.ending = False
        self.rank = rank
        self.where = describe_rank(rank, size)

    def install(self) -> None:
        """Catch what escapes from the main thread and from other threads, and the signals that ask to end."""
        faulthandler.enable(all_threads=False)
        sys.excepthook = self.on_exception
        threading.excepthook = lambda args: self.on_exception(
            args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
        )
        for number, default in zip(SIGNALS, (signal.SIG_DFL, signal.default_int_handler), strict=True):
            if signal.getsignal(number) is default:  # a command may have a use of its own for it
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Leave by way of an exception, so that unfinished files are removed and the terminal is put back."""
        if not self.ending:
            raise Interrupted(number)

    def answers(self, number: int) -> bool:
        """Whether a signal still is this object's to answer: a command may have put a handler of its own."""
        return signal.getsignal(number) == self.on_signal

    def on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
        """Say what failed where, in one write, and abort."""
        if issubclass(kind, BrokenPipeError):
            self.end(128 + signal.SIGPIPE)
        if issubclass(kind, KeyboardInterrupt):
            self.end_by_signal(error.number if isinstance(error, Interrupted) else signal.SIGINT)
        if issubclass(kind, UserError):  # of a thread: main() takes those of the main thread
            self.fail(f"mpillama: {self.where}: {error}", USER_ERROR_STATUS)
        if memory := out_of_memory(error):
            self.fail(f"mpillama: {self.where}: {memory} All ranks end.")
        frames = "".join(traceback.format_exception(kind, error, trace))
        self.fail(f"{frames}mpillama: {self.where}: {kind.__name__}: {error}; all ranks end.")

    def end_by_signal(self, number: int) -> NoReturn:
        """Say so, and end all ranks."""
        self.ending, name = True, signal.Signals(number).name
        if number == signal.SIGTERM and OPEN_MPI in os.environ and self._is_told_within(KILL_SECONDS):
            self.end(128 + number)
        self.fail(f"mpillama: {self.where}: ended by {name}; all ranks end.", 128 + number)

    def fail(self, text: str, status: int = FAILURE_STATUS) -> NoReturn:
        """Print a text, unless another rank has said why the job ends, and end all ranks."""
        self.ending = True
        if self.rank and self._is_told_within(min(0.3 + 0.05 * self.rank, LONGEST_TURN)):
            self.end(status)
        with suppress(Exception):  # whatever is wrong with MPI by now
            self.tell_end()
        print_error(text)
        time.sleep(DELIVERY_SECONDS)
        self.end(status)

    def _is_told_within(self, seconds: float) -> bool:
        """Whether another rank says meanwhile that it ends the job, and why."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(Exception):  # whatever is wrong with MPI by now
                if self.knows_of_end():
                    return True
            time.sleep(POLL_SECONDS)
        return False

    def end(self, status: int) -> NoReturn:
        end_within(LAST_WORD_SECONDS)
        with suppress(Exception):
            self.tell_end()
        self.abort(status)
        os._exit(status)


def end_unmet() -> NoReturn:
    """End before MPI has started, so that the launcher ends the ranks of other hosts, which wait for this one in vain.

    Some launchers take an exit for the end of one rank alone, whatever its status, but a signal for a failure.
    """
    os.kill(os.getpid(), signal.SIGKILL)
    os._exit(FAILURE_STATUS)


def wait_for_words() -> None:
    """Before MPI has started: let the first rank of the host say why all end, and the launcher pass it on.

    Launchers may end a job, and drop what its ranks write, as soon as one of them has ended.
    """
    time.sleep(DELIVERY_SECONDS if launched_first() else LONGEST_TURN)


@contextmanager
def starting_mpi(timeout: float) -> Iterator[Aborter]:
    """Guard the import of `mpi4py.MPI`, which starts MPI; what escapes from here on ends all ranks.

    MPI starts without letting any other Python run: a start that takes longer than `timeout` seconds and than a minute
    ends the process. With 0 it may take for ever.
    """
    aborter = Aborter(launched_rank(), launched_size()[1])
    aborter.install()
    ask_for_threads()
    quiet_mpi()
    with no_longer_than(timeout), warnings.catch_warnings():
        # mpi4py's word on a launcher of another MPI, once per rank: refuse_singletons and doctor say it once.
        warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
        yield aborter


@contextmanager
def no_longer_than(timeout: float) -> Iterator[None]:
    """End the process if MPI's start or end takes longer than so many seconds and than MPI_SECONDS; 0: for ever.

    That needs no other Python to run.
    """
    if timeout:
        faulthandler.dump_traceback_later(max(timeout, MPI_SECONDS), exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def end_within(seconds: float) -> None:
    """Let this process end after so long, even if no Python runs any more (the last of such calls counts)."""
    nowhere = open(os.devnull, "w")  # noqa: PTH123, SIM115 - open until the end
    faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)


def describe_rank(rank: int, size: int) -> str:
    """A rank as a user finds it: number, count and host."""
    return f"rank {rank} of {size} on {os.uname().nodename}"
