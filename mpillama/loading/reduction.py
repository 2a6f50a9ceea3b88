"""How the ranks add up: through memory that the ranks of one host share, or by MPI."""

from functools import partial

from mpillama.comm.communicator import Communicator
from mpillama.comm.shared_memory import CAPACITY, SharedReduction
from mpillama.job.start import World
from mpillama.kernels.library import Team
from mpillama.kernels.shared_sum import SharedWindow, window_bytes


def choose_reduction(comm: Communicator, world: World, team: Team, hidden_size: int, chunk: int) -> None:
    """Let the ranks of one host add up through shared memory where that is faster than MPI."""
    if comm.size > 1 and world.neighbours.size == comm.size and hidden_size <= CAPACITY:
        with comm.watch.blocking("the making of memory that the ranks share"):
            shared = SharedReduction(comm.mpi, window_bytes, partial(SharedWindow, team))
        sizes = sorted({hidden_size * tokens for tokens in (1, 8, 32, chunk)})
        comm.choose_reduction(shared, sizes)
