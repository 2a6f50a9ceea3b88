"""Run the program with ranks that come late: late_ranks.py SECONDS RANK LAYER [program's arguments].

RANK sleeps so long before its LAYER of each step of one token; "all" is each rank in turn, or every layer.
"""

import sys
import time
from itertools import count
from typing import Any

from mpillama.__main__ import main
from mpillama.comm.launcher import launched_rank, launched_size
from mpillama.models.decoder import DecoderLayer

SECONDS, RANK, LAYER, ARGUMENTS = float(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
forward, turns = DecoderLayer.forward, count()
layers: list[DecoderLayer] = []
"""In order of their first call."""


def late(layer: DecoderLayer, a: Any, cache: Any) -> None:
    """As DecoderLayer.forward."""
    if layer not in layers:
        layers.append(layer)
    if len(a.x) == 1 and LAYER in ("all", str(layers.index(layer))):
        turn = next(turns) % launched_size()[1]
        time.sleep(SECONDS * (launched_rank() == (turn if RANK == "all" else int(RANK))))
    forward(layer, a, cache)


if __name__ == "__main__":
    DecoderLayer.forward = late  # type: ignore[method-assign]
    sys.exit(main(ARGUMENTS))
