"""Run the program with MPILLAMA_RANKS_PER_HOST of each rank's own, so that stages of a pipeline are on other numbers of
hosts: hosts_of_ranks.py 2/2/1/1 [program's arguments].
"""

import os
import sys

from mpillama.__main__ import main
from mpillama.comm.launcher import launched_rank
from mpillama.comm.ways import RANKS_PER_HOST

if __name__ == "__main__":
    os.environ[RANKS_PER_HOST] = sys.argv[1].split("/")[launched_rank()]
    sys.exit(main(sys.argv[2:]))
