"""Run the program with something wrong on one rank: sabotage.py KIND RANK DIRECTORY [program's arguments].

Each rank that ends by itself leaves its status as a file in DIRECTORY, a failure in mid-step its time.
"""

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpillama.__main__ import main
from mpillama.comm.launcher import launched_rank
from mpillama.files import native_reader
from mpillama.tools import running

SLOW_STEP = 0.02
REDUCTIONS = 12
"""Reductions that go well first: the failure comes within the first layers of a later step."""


def after_prepare(patch: Callable[[], None]) -> None:
    """Patch what may only be imported once the kernels' target is prepared."""
    prepare = running.prepare

    def prepare_and_patch(*arguments: Any) -> Any:
        target = prepare(*arguments)
        patch()
        return target

    running.prepare = prepare_and_patch


def slow() -> None:
    """Make each step of the model last long enough to be interrupted."""
    from mpillama.model.llama import LlamaModel

    forward = LlamaModel.forward

    def sleep_and_forward(self: LlamaModel, *arguments: Any) -> Any:
        time.sleep(SLOW_STEP)
        return forward(self, *arguments)

    LlamaModel.forward = sleep_and_forward


def at_reduction(action: Callable[[], None]) -> Callable[[], None]:
    """Do something just before one reduction of a step, while the other ranks wait in it."""

    def patch() -> None:
        from mpillama.comm.communicator import Communicator
        from mpillama.model.llama import LlamaModel

        forward, all_reduce, left = LlamaModel.forward, Communicator.all_reduce, [REDUCTIONS]

        def forward_and_arm(self: LlamaModel, *arguments: Any) -> Any:
            if self.comm.size > 1:
                Communicator.all_reduce = reduce
            return forward(self, *arguments)

        def reduce(self: Communicator, *arguments: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                (Path(sys.argv[3]) / "failed").write_text(str(time.time()))
                action()
            return all_reduce(self, *arguments)

        LlamaModel.forward = forward_and_arm

    return patch


def fail() -> None:
    raise RuntimeError("sabotage")


def fail_in_thread() -> None:
    threading.Thread(target=fail).start()
    time.sleep(60)


def hang() -> None:
    time.sleep(600)


def interrupt() -> None:
    raise KeyboardInterrupt


def leave() -> None:
    sys.exit(3)


def with_open(opened: Callable[[str], int]) -> Callable[[], None]:
    """Open something else than the model file for reading weights."""

    def patch() -> None:
        native_reader.open_for_reading = opened

    return patch


def refuse(number: int) -> Callable[[str], int]:
    def opened(path: str) -> int:
        raise OSError(number, os.strerror(number), path)

    return opened


def shorter(path: str) -> int:
    """A file on this host that lacks its last byte."""
    copy = Path(sys.argv[3]) / "shorter.h5"
    copy.write_bytes(Path(path).read_bytes()[:-1])
    return os.open(copy, os.O_RDONLY)


def input_error(path: str) -> int:
    """A file of the right size whose bytes cannot be read."""
    size = Path(path).stat().st_size
    copy = Path(sys.argv[3]) / "unreadable.h5"
    with copy.open("wb") as file:
        file.truncate(size)
    return os.open(copy, os.O_WRONLY)


KINDS: dict[str, Callable[[], None]] = {
    "slow": lambda: after_prepare(slow),
    "exception": lambda: after_prepare(at_reduction(fail)),
    "thread": lambda: after_prepare(at_reduction(fail_in_thread)),
    "stuck": lambda: after_prepare(at_reduction(hang)),
    "interrupt": lambda: after_prepare(at_reduction(interrupt)),
    "leave": lambda: after_prepare(at_reduction(leave)),
    "missing": with_open(refuse(errno.ENOENT)),
    "forbidden": with_open(refuse(errno.EACCES)),
    "shorter": with_open(shorter),
    "input_error": with_open(input_error),
}

if __name__ == "__main__":
    kind, rank, directory = sys.argv[1:4]
    if rank == "all" or launched_rank() == int(rank):
        KINDS[kind]()
    status = main(sys.argv[4:])
    (Path(directory) / f"status-{launched_rank()}").write_text(str(status))
    sys.exit(status)
