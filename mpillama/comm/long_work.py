"""Work that may take minutes and knows nothing of other ranks: a thread does it, the main thread answers the others."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from mpillama.comm.watchdog import LOOK_SECONDS, Watch

T = TypeVar("T")

STACK_BYTES = 16 << 20
"""For deep recursion: where a job's stack is unlimited, a thread gets 2 MiB by itself."""


class _Worker(threading.Thread, Generic[T]):
    """Does one thing; it lives on until it is `released`, so that its processor time can be asked for."""

    def __init__(self, action: Callable[[], T]):
        super().__init__(daemon=True, name="long work")
        self.action = action
        self.ended, self.released = threading.Event(), threading.Event()
        self.clock: int | None = None
        self.seconds = 0.0
        self.result: T
        self.error: BaseException | None = None

    def run(self) -> None:
        self.clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            self.result = self.action()
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.error = error
        self.ended.set()
        self.released.wait()

    def got_on(self) -> bool:
        """Whether it has computed since the last call: one that waits for a file server for ever has not."""
        before = self.seconds
        self.seconds = time.clock_gettime(self.clock) if self.clock is not None else 0.0
        return self.seconds > before


def do_in_thread(watch: Watch, action: Callable[[], T]) -> T:
    """Return what `action` does, which must not use MPI; call it from the main thread, which stays open to signals."""
    worker, usual = _Worker(action), threading.stack_size(STACK_BYTES)
    try:
        worker.start()
    finally:
        threading.stack_size(usual)
    while not worker.ended.wait(LOOK_SECONDS):
        watch.work += worker.got_on()
        watch.answer()
    worker.released.set()
    if worker.error is not None:
        raise worker.error
    return worker.result
