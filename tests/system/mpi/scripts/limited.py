"""Run the program with a bound on the size of the files it may write; MPI, which needs large ones, starts before."""

import resource
import sys

from mpi4py import MPI

from mpillama.__main__ import main

if __name__ == "__main__":
    assert MPI.Is_initialized()
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(sys.argv[2:]))
