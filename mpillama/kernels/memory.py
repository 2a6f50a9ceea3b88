"""Where fresh memory lies: on machines with several memory controllers, near the thread that first writes to it."""

from numba import njit, prange

PAGE = 4096


@njit(nogil=True, parallel=True, cache=True)
def touch_pages(memory, threads):
    """Write to every page of fresh memory (uint8), each thread to the part of an array that it has in the products."""
    pages = (memory.size + PAGE - 1) // PAGE
    for thread in prange(threads):
        for page in range(pages * thread // threads, pages * (thread + 1) // threads):
            memory[page * PAGE] = 0
