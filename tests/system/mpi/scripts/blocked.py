"""Ranks 0 and up wait inside MPI for the last rank, which does not come."""

import time

from mpi4py import MPI

from mpillama.job.start import start_mpi

MPI.COMM_WORLD.Barrier()  # no rank begins to wait while another one is still being started
with start_mpi(1, timeout=1) as world:
    if world.comm.rank == world.comm.size - 1:
        time.sleep(600)
    world.comm.neighbours()
