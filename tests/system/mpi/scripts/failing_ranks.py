"""The program, with an exception on some ranks after some steps: failing_ranks.py RANK[,RANK…] STEPS KIND ARGUMENTS…

The kinds "slow" and "paced" are no exceptions: each further step takes a moment longer. KIND/KIND says what other ranks
do, too.
"""

import sys
import time

from mpillama.__main__ import main
from mpillama.comm.launcher import launched_rank
from mpillama.kernels import target

PAUSES = {"slow": 0.03, "paced": 0.005}
"""Seconds."""
ERRORS = {"bug": RuntimeError("sabotage"), "memory": MemoryError("sabotage"), "disk": OSError(5, "sabotage")}


def sabotage(ranks: list[int], steps: int, kind: str) -> None:
    """Let the model of these ranks fail."""
    prepare = target.prepare
    of_these, _, of_others = kind.partition("/")
    deed = of_these if launched_rank() in ranks else of_others

    def prepare_and_spoil(*arguments: object) -> object:
        found = prepare(*arguments)
        from mpillama.models.decoder import Decoder

        forward, calls = Decoder.advance, [0]

        def failing(*arguments: object) -> object:
            calls[0] += 1
            if deed and calls[0] > steps:
                if deed in ERRORS:
                    raise ERRORS[deed]
                time.sleep(PAUSES[deed])
            return forward(*arguments)

        Decoder.advance = failing
        return found

    target.prepare = prepare_and_spoil


if __name__ == "__main__":
    culprits, count, what = sys.argv[1:4]
    sabotage([int(rank) for rank in culprits.split(",")], int(count), what)
    sys.exit(main(sys.argv[4:]))
