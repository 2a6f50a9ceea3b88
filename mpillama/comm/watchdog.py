"""Bounded waits: no rank waits for another forever.

Communicator's waits poll, and look here now and then: a Liveness check finds out who is missing. What blocks inside MPI
itself, and signals that come while no Python runs, are left to a thread.
"""

import mmap
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Generic, TypeVar

from mpillama.comm.failure import Aborter
from mpillama.comm.liveness import NO_NEWS, PASSED_ON, Kind, Liveness, Message, Messages, Place, State, describe

LOOK_SECONDS = 0.1
"""Time between two looks of a wait, or of a rank that works."""
TICK = 1.0
"""Time between two looks of the thread."""
MARGIN = 5.0
"""The thread leaves the main thread this much longer, since the main thread can say more."""
MOST_TURNS = 5
"""So many ranks take turns in saying that they are stuck, a TICK after one another."""
SIGNAL_SECONDS = 2.5
"""How long the main thread may take to act upon a signal."""

Display = Callable[[str], AbstractContextManager[Callable[[str], None]]]
"""Tells a person, as long as it is open, what takes long; gives the function that is told how far it is."""


def no_display(what: str) -> AbstractContextManager[Callable[[str], None]]:
    """The display of ranks that show nothing."""
    return nullcontext(lambda how_far: None)


class OthersFailedError(Exception):
    """Another rank has failed at its part, so this rank's work is pointless; it says so once all ranks meet."""


class PeerFailedError(Exception):
    """A rank of this group has given up: the group does nothing more, but other groups may."""


RESERVE_BYTES = 32 << 20
"""Addresses, not memory, that are given back when something fails: MPI's end and a thread want some."""


class Watch:
    """What this process is doing, for its own waits, for the other ranks, and for the thread.

    Without `messages` (one rank, or MPI not yet started) nobody is asked. `timeout` 0 waits for ever.
    """

    def __init__(self, aborter: Aborter | None = None, timeout: float = 0.0):
        self.aborter = aborter
        self.timeout = timeout
        self.messages: Messages | None = None
        self.names: Sequence[str] = ()
        self.hosts: Sequence[str] = ()
        self.clock: Callable[[], float] = time.perf_counter
        self.entered = 0
        self.work = 0
        self.polls = 0
        self.place = ""
        self.next_look = 0.0
        self.next_attention = 0.0
        self.liveness: Liveness | None = None
        self.idle_at = -1
        self.failed_at = -1
        self.job_ends = False
        self.blamed: Sequence[int] = ()
        self.display: Display = no_display
        self._reserve: mmap.mmap | None = mmap.mmap(-1, RESERVE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    # -- waits ---------------------------------------------------------------------------------------------------------

    def enter(self, place: str, of_all: bool = True) -> None:
        """Begin a wait. Only waits of all ranks together are counted: the others may differ between hosts."""
        self.entered += of_all
        self.place = place
        self.liveness = None
        self.next_look = 0.0

    def leave(self) -> None:
        """The wait is over."""
        self.place = ""

    def poll(self) -> None:
        """Called whenever a poll finds that the wait is not over; ends the job if it lasts too long."""
        now = self.clock()
        if now < self.next_look:
            return
        is_new, self.next_look = not self.next_look, now + LOOK_SECONDS
        if is_new:
            return
        self.polls += 1
        if self.messages is None:
            return
        mpi = self.messages.mpi
        if self.liveness is None:
            self.liveness = Liveness(self.state(), mpi.rank, self.messages.neighbours, self.timeout, self.clock)
        self._listen()
        if self.timeout:
            self._call(self.messages, self.liveness)

    def state(self) -> State:
        """How far this rank is."""
        return State(self.entered, self.work, bool(self.place))

    def _call(self, messages: Messages, liveness: Liveness) -> None:
        liveness.pass_time()
        if self.idle_at >= 0 and self.entered == self.idle_at + 1:
            liveness.restart()  # rank 0 waits for a person before it comes here
            return
        asked = [*liveness.to_call(), *liveness.to_probe(self.hosts)]
        messages.send(asked, Message(Kind.CALL, self.state(), liveness.news))
        messages.send(liveness.to_tell(), Message(Kind.HERE, self.state(), liveness.news))
        verdict, mates = liveness.verdict()
        if verdict:
            answering = liveness.answering_hosts(self.hosts)
            self.blamed = [mate.rank for mate in mates]
            place = Place(messages.mpi.rank, self.place, self.names, self.hosts, answering)
            self.abort(describe(verdict, mates, place, self.timeout))

    def _listen(self) -> None:
        """Answer whoever asks, and note what others say."""
        if self.messages is None:
            return
        gone: int | None = None
        for rank, message in self.messages.receive():
            kind, state = message.kind, message.state
            if kind is Kind.CALL:
                news = self.liveness.news if self.liveness else NO_NEWS
                self.messages.send([rank], Message(Kind.HERE, self.state(), news))
            if kind in PASSED_ON and not (kind is Kind.ENDING and self.job_ends):
                self.messages.pass_on(rank, message)
            if kind in (Kind.IDLE, Kind.BACK):
                self.idle_at = state.entered if kind is Kind.IDLE else -1
            elif kind is Kind.FAILED:
                self.failed_at = state.entered
            elif kind is Kind.ENDING:
                self.job_ends = True
            elif kind is Kind.GONE:
                gone = message.news[0]
            elif self.liveness is not None:
                self.liveness.hear(rank, message)
        if gone is not None:
            raise PeerFailedError(self.names[gone] if self.names else f"rank {gone}")

    def tell_end(self) -> None:
        """Let the other ranks know that this one ends the job and says why."""
        if self.messages is not None and threading.current_thread() is threading.main_thread():
            self.messages.send_all(Kind.ENDING, self.state(), self.blamed)

    def knows_of_end(self) -> bool:
        """Whether another rank has told so."""
        if threading.current_thread() is threading.main_thread():
            with suppress(PeerFailedError):
                self._listen()
        return self.job_ends

    def abort(self, sentence: str) -> None:
        """End the job with a sentence."""
        if self.aborter is not None:
            self.aborter.fail(f"mpillama: {sentence}")

    # -- work, silence, MPI's own waits --------------------------------------------------------------------------------

    def answer(self) -> None:
        """Answer the others during long work; does nothing outside the main thread."""
        now = self.clock()
        if now >= self.next_attention and threading.current_thread() is threading.main_thread():
            self.next_attention = now + LOOK_SECONDS
            self._listen()

    def attend(self) -> None:
        """Answer, and raise OthersFailedError if another rank has failed."""
        self.answer()
        if self.failed_at == self.entered:
            raise OthersFailedError

    def tell_failure(self) -> None:
        """Let the other ranks leave off what this rank has failed at, if need be with the memory kept for it."""
        if self._reserve is not None:
            self._reserve.close()
            self._reserve = None
        if self.messages is not None:
            self.messages.send_all(Kind.FAILED, self.state())

    def tell_gone(self) -> None:
        """Let the other ranks of a group know that this one has given up."""
        if self.messages is not None:
            self.messages.send_all(Kind.GONE, self.state())

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Rank 0 waits for a person or a pipe: for that long the others' waits are not counted."""
        if self.messages is None:
            yield
            return
        self.messages.send_all(Kind.IDLE, self.state())
        try:
            yield
        finally:
            self.messages.send_all(Kind.BACK, self.state())

    def allow_silence(self) -> None:
        """Rank 0 may be busy with anything before the next wait, which so may last as long as it takes."""
        self.idle_at = self.entered

    @contextmanager
    def blocking(self, place: str) -> Iterator[None]:
        """A wait inside MPI, in which nobody can be asked: the thread looks after it."""
        self.enter(place)
        try:
            yield
        finally:
            self.leave()


class Guard(threading.Thread):
    """Ends the job if the main thread is stuck inside MPI, or does not act upon a signal."""

    def __init__(self, watch: Watch, aborter: Aborter):
        super().__init__(daemon=True, name="guard")
        self.watch = watch
        self.aborter = aborter
        self.waited = 0.0
        self.seen: tuple[int, int] | None = None
        self.awake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def run(self) -> None:
        """Watch the main thread until the process ends."""
        while True:
            if select.select([self.awake], [], [], TICK)[0]:
                self._after_signals(os.read(self.awake, 64))
            self._look()

    def _after_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if self.aborter.answers(number):
                time.sleep(SIGNAL_SECONDS)  # the main thread ends the job meanwhile, if it can
                self.aborter.end_by_signal(number)

    def _look(self) -> None:
        now, place = (self.watch.entered, self.watch.polls), self.watch.place
        self.waited = self.waited + TICK if place and now == self.seen else 0.0
        self.seen = now
        turn = TICK * min(self.aborter.rank, MOST_TURNS)  # the lowest rank that waits has the word
        if self.watch.timeout and self.waited >= self.watch.timeout + MARGIN + turn:
            self.aborter.fail(
                f"mpillama: {self.aborter.where} has been stuck in {place} for {self.waited:.0f} s; which rank it "
                "waits for cannot be known: a rank was stopped, or its host or the network hangs; all ranks end "
                "(--timeout SECONDS waits longer, 0 for ever)."
            )


# -- long work --------------------------------------------------------------------------------------------------------


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
