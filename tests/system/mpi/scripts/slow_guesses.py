"""Run the program with slow steps of models that rank 0 has alone: slow_guesses.py SECONDS [program's arguments]."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mpillama.__main__ import main
from mpillama.engine.executor import Executor, Segment

SECONDS, ARGUMENTS = float(sys.argv[1]), sys.argv[2:]
forward_in_pieces = Executor.forward_in_pieces


def slowly(executor: Executor, segments: Sequence[Segment]) -> Iterator[list[Any]]:
    """As forward_in_pieces."""
    if executor.comm.size == 1:
        time.sleep(SECONDS)
    return forward_in_pieces(executor, segments)


if __name__ == "__main__":
    Executor.forward_in_pieces = slowly  # type: ignore[method-assign]
    sys.exit(main(ARGUMENTS))
