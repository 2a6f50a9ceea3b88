"""The program: `python -m mpillama [generate|chat|bench|inspect|doctor] …`."""

import sys
from collections.abc import Sequence

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
    if command == "inspect":
        from mpillama.tools.inspect import inspect

        return inspect(options)
    if command == "bench":
        from mpillama.tools.bench import bench

        return bench(options)
    if command == "doctor":
        from mpillama.tools.doctor import doctor

        return doctor(options)
    if command == "chat":
        from mpillama.tools.chat import chat

        return chat(options)
    from mpillama.tools.generate import generate

    return generate(options)


if __name__ == "__main__":
    sys.exit(main())
