"""The program: `python -m mpillama [COMMAND] …`, a module of mpillama.tools for each command."""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from mpillama.comm.failure import USER_ERROR_STATUS, report_user_error, stop_printing
from mpillama.comm.launcher import launched_rank
from mpillama.errors import UserError


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
    from mpillama.options import parse

    if launched_rank() != 0 and {"-h", "--help", "--version"} & set(arguments):
        return 0  # rank 0 prints it
    command, options = parse(arguments)
    if logging.lastResort:  # for warnings of commands that set up no log
        logging.lastResort.setFormatter(logging.Formatter("mpillama: warning: %(message)s"))
    status: int = getattr(import_module(f"mpillama.tools.{command}"), command)(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
