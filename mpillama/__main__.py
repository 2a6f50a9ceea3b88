"""The program: `python -m mpillama [COMMAND] …`, a module of mpillama.cli for each command.

What a command needs is imported once MPI runs, so that `--help` is there at once, and so that whatever fails on a rank
ends them all.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from mpillama.cli.options import OnRanks, parse
from mpillama.comm.failure import (
    USER_ERROR_STATUS,
    end_unmet,
    print_error,
    report_user_error,
    starting_mpi,
    stop_printing,
    wait_for_words,
)
from mpillama.comm.launcher import (
    DEFAULT_TIMEOUT,
    check_start,
    launched_first,
    launched_here,
    launched_rank,
    launched_size,
)
from mpillama.errors import UserError
from mpillama.job.host_memory import refuse_small_host, spare_shared_memory

OPTIONAL_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "httpx")
"""Those without which some commands cannot even be imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; a user's mistake is one sentence, printed once, and status 2."""
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return stop_printing()
    except UserError as error:
        report_user_error(str(error))
        return USER_ERROR_STATUS


def _run(arguments: Sequence[str]) -> int:
    if launched_rank() != 0 and {"-h", "--help", "--version"} & set(arguments):
        return 0  # rank 0 prints it
    name, options = parse(arguments)
    if logging.lastResort:  # for warnings of commands that set up no log
        logging.lastResort.setFormatter(logging.Formatter("mpillama: warning: %(message)s"))
    if isinstance(options, OnRanks):
        return _run_on_ranks(name, options)
    return import_command(name)(options)


def _run_on_ranks(name: str, options: OnRanks) -> int:
    """Start MPI, then run the command on every rank of the job."""
    threads, timeout = getattr(options, "threads", None), getattr(options, "timeout", DEFAULT_TIMEOUT)
    check_start(threads, timeout)
    _refuse_small_host()
    spare_shared_memory(launched_here())
    with starting_mpi(timeout) as aborter:
        import_module("mpi4py.MPI")
    start = import_module("mpillama.job.start")
    with start.start_mpi(threads, timeout, options.needs_one_job, options.busy_threads, aborter) as world:
        command = world.comm.together(lambda: world.comm.busy(lambda: import_command(name)))
        status: int = command(options, world)
    return status


def _refuse_small_host() -> None:
    """End the process with a sentence if its host is too small to start on, which MPI would not survive."""
    try:
        refuse_small_host(launched_here())
    except UserError as error:
        if launched_first():
            print_error(f"mpillama: {error}")
        wait_for_words()
        if launched_size()[1] > launched_here():
            end_unmet()
        sys.exit(USER_ERROR_STATUS)


def import_command(name: str) -> Callable[..., int]:
    """The function of a command: of its options, and of the World if it runs on all ranks; returns the exit status."""
    try:
        command: Callable[..., int] = getattr(import_module(f"mpillama.cli.{name}"), name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_PACKAGES:
            raise
        raise UserError(f"{name} needs the package {error.name}: pip install 'mpillama[serve]'.") from error
    return command


if __name__ == "__main__":
    sys.exit(main())
