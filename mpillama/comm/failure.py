"""How a run ends when something fails: all ranks within seconds, one message, a status that is not 0."""

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mpillama.comm.launcher import launched_rank, launched_size

USER_ERROR_STATUS = 2
FAILURE_STATUS = 1


def report_user_error(message: str) -> None:
    """Print a user's mistake, once: on rank 0 as the launcher counts."""
    if launched_rank() == 0:
        print_error(f"mpillama: {message}")


def print_error(text: str) -> None:
    """Write to standard error, which may be closed."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # nobody is listening; the status still tells


def stop_printing() -> int:
    """Nobody reads standard output any more: throw away what is still to be printed; returns the usual status."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return 128 + signal.SIGPIPE


class Aborter:
    """Ends all ranks when an exception escapes on one of them, which else would leave the rest waiting."""

    def __init__(self, abort: Callable[[int], Any], where: str):
        self.abort = abort
        self.where = where

    def install(self) -> None:
        """Catch what escapes from the main thread and from other threads."""
        faulthandler.enable(all_threads=False)
        sys.excepthook = self.on_exception
        threading.excepthook = lambda args: self.on_exception(
            args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
        )

    def on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Say what failed where, in one write, and abort."""
        if issubclass(kind, KeyboardInterrupt | BrokenPipeError):
            self.end(128 + (signal.SIGINT if kind is KeyboardInterrupt else signal.SIGPIPE))
        frames = "".join(traceback.format_exception(kind, error, trace))
        print_error(f"{frames}mpillama: {self.where}: {kind.__name__}: {error}; all ranks end.")
        self.end(FAILURE_STATUS)

    def end(self, status: int) -> None:
        """End every rank now."""
        self.abort(status)
        os._exit(status)


def describe_rank(rank: int, size: int) -> str:
    """A rank as a user finds it: number, count and host."""
    return f"rank {rank} of {size} on {os.uname().nodename}"


def launched_description() -> str:
    """As describe_rank, from the launcher's environment alone."""
    return describe_rank(launched_rank(), launched_size()[1])
