"""Leave MPI on two ranks, of which one is late between their last meeting and the end."""

import time

from mpillama.comm.outbox import Outbox
from mpillama.job.start import start_mpi

TIMEOUT = 1.0

if __name__ == "__main__":
    with start_mpi(1, TIMEOUT) as world:
        if world.comm.rank == 1:
            (outbox,) = Outbox.opened
            receive = outbox.receive

            def receive_late() -> object:
                outbox.receive = receive
                time.sleep(3 * TIMEOUT)
                return receive()

            outbox.receive = receive_late
