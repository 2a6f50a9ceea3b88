"""Run the program where the last rank never answers when latency is measured: silent_ping.py [program's arguments]."""

import sys
import time
from typing import Any

from mpillama.__main__ import main
from mpillama.cli import bench_overhead
from mpillama.comm.launcher import launched_rank, launched_size


def silent(*arguments: Any) -> float:
    time.sleep(3600)
    return 0.0


if __name__ == "__main__":
    if launched_rank() == launched_size()[1] - 1:
        bench_overhead.one_way_seconds = silent
    sys.exit(main(sys.argv[1:]))
