"""Run the program with something wrong on one rank: sabotage.py FAULT PHASE RANK DIRECTORY [program's arguments].

The phase (import, table, load, prefill or decode) is made slow on all ranks; the import of the command, the table,
which only rank 0 reads, and for some faults loading on RANK only. Each writes a file PHASE-RANK into DIRECTORY when it
has entered it. FAULT happens in the midst of it on RANK, which touches the file `failed`; "none" leaves the fault to
the caller. Each rank that ends by itself leaves its status in a file.
"""

import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil

import mpillama
from mpillama import __main__ as program
from mpillama.comm.launcher import launched_rank, launched_size
from mpillama.kernels import target

FAULT, PHASE, RANK, DIRECTORY = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
ARGUMENTS = sys.argv[5:]
SLOW_READ = 1.0
SLOW_STEP = 0.03
SLOW_START = 5.0
REDUCTIONS = 3
"""The fault comes at this reduction of the second step of a phase, while the other ranks wait in it."""


# -- phases -----------------------------------------------------------------------------------------------------------


def entered() -> None:
    """Tell that this rank is in the midst of the phase."""
    (DIRECTORY / f"{PHASE}-{launched_rank()}").touch()


def failing(action: Callable[[], None]) -> None:
    (DIRECTORY / "failed").touch()
    action()


def late(do: Callable[..., Any], action: Callable[[], None] | None) -> Callable[..., Any]:
    """`do`, once RANK has computed for longer than the time-out; or something instead."""
    is_slow = RANK in ("all", str(launched_rank()))

    def do_late(*arguments: Any) -> Any:
        entered()
        if action:
            failing(action)
        end = time.thread_time() + SLOW_START * is_slow
        while time.thread_time() < end:
            pass
        return do(*arguments)

    return do_late


def in_import(action: Callable[[], None] | None) -> None:
    program.import_command = late(program.import_command, action)


def in_table(action: Callable[[], None] | None) -> None:
    from mpillama.loading import load as loading

    loading.open_model = late(loading.open_model, action)


def in_load(action: Callable[[], None] | None) -> None:
    """Read the weights slowly; do something at the first read."""
    from mpillama.loading import load as loading

    preadv, load_weights = os.preadv, loading.load_weights

    def slow_read(*arguments: Any) -> int:
        entered()
        if action:
            failing(action)
        is_slow = RANK in (str(launched_rank()), "none", "all") or FAULT in ("cut", "starved")
        time.sleep(SLOW_READ * is_slow)
        return preadv(*arguments)

    def load(*arguments: Any) -> Any:
        os.preadv = slow_read
        return load_weights(*arguments)

    loading.load_weights = load


def in_step(action: Callable[[], None] | None) -> None:
    """Compute slowly; do something at a reduction."""
    from mpillama.comm.communicator import Communicator
    from mpillama.models.decoder import Decoder

    forward, shared_for, steps, left = Decoder.advance, Communicator.shared_for, [0], [REDUCTIONS]

    def slow_forward(self: Decoder, step: Any, *arguments: Any) -> Any:
        is_phase = (len(step.token_ids) > 1) == (PHASE == "prefill")
        if is_phase and self.comm.size == launched_size()[1]:
            steps[0] += 1
            if steps[0] > 1:
                entered()
            time.sleep(SLOW_STEP)
        return forward(self, step, *arguments)

    def about_to_reduce(self: Communicator, *arguments: Any) -> Any:
        if action and steps[0] > 1:
            left[0] -= 1
            if not left[0]:
                failing(action)
        return shared_for(self, *arguments)

    Decoder.advance, Communicator.shared_for = slow_forward, about_to_reduce


def after_prepare(patch: Callable[[], None]) -> None:
    """Patch once the kernels' target is prepared: then the ranks have met."""
    prepare = target.prepare

    def prepare_and_patch(*arguments: Any) -> Any:
        found = prepare(*arguments)
        patch()
        return found

    target.prepare = prepare_and_patch


# -- faults in the midst of a phase -----------------------------------------------------------------------------------


def fail() -> NoReturn:
    raise RuntimeError("sabotage")


def fail_in_thread() -> None:
    threading.Thread(target=fail).start()
    time.sleep(60)


def hang() -> None:
    """As a read from a file server that is gone."""
    time.sleep(600)


def leave() -> None:
    sys.exit(3)


def starve() -> None:
    """Ask for more memory than the system gives to this process."""
    allow(1 << 20)
    np.ones(1 << 28)


def cut_file() -> None:
    """Somebody shortens the file that is being read."""
    os.truncate(DIRECTORY / "private.h5", 100)


def allow(more: int) -> None:
    """Limit this process's memory to what it has, and so many bytes."""
    limit = psutil.Process().memory_info().vms + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


# -- faults from the beginning ----------------------------------------------------------------------------------------


def with_private_file(change: Callable[[Path], None], flags: int = os.O_RDONLY) -> Callable[[], None]:
    """This rank's host sees a file of its own at the model's path."""

    def patch() -> None:
        model = ARGUMENTS[ARGUMENTS.index("--model") + 1]
        copy, system_open = DIRECTORY / "private.h5", os.open
        shutil.copy(model, copy)
        change(copy)

        def private_open(path: Any, given: int, *arguments: Any, **options: Any) -> int:
            if str(path) != model:
                return system_open(path, given, *arguments, **options)
            with as_nobody():
                return system_open(copy, (given | flags) if flags else given)

        os.open = private_open

    return patch


class as_nobody:  # noqa: N801 - reads as a statement
    """Root may read everything: be somebody else for a moment."""

    def __enter__(self) -> None:
        if FAULT == "forbidden" and os.getuid() == 0:
            os.seteuid(65534)

    def __exit__(self, *error: object) -> None:
        if FAULT == "forbidden" and os.getuid() == 0:
            os.seteuid(0)


def shorten(copy: Path) -> None:
    os.truncate(copy, copy.stat().st_size - 1)


def change_half(copy: Path) -> None:
    """The same size and the same table, other weights."""
    content = np.fromfile(copy, np.uint8)
    content[len(content) // 2 :] ^= 0x55
    content.tofile(copy)


def change_end(copy: Path) -> None:
    """The last page has not arrived yet."""
    content = np.fromfile(copy, np.uint8)
    content[-4096:] ^= 0x55
    content.tofile(copy)


def starve_before_preflight() -> None:
    after_prepare(lambda: allow(112 << 20))


def starve_after_preflight() -> None:
    """The limit strikes when the memory for the weights is asked for."""

    def patch() -> None:
        from mpillama.loading import load as loading

        load_weights = loading.load_weights

        def starved(*arguments: Any) -> Any:
            failing(lambda: allow(0))
            return load_weights(*arguments)

        loading.load_weights = starved

    after_prepare(patch)


def other_program(change: Callable[[str], str]) -> Callable[[], None]:
    """Run another copy of the package."""

    def execute() -> None:
        package = Path(mpillama.__file__).parent
        shutil.copytree(package, DIRECTORY / "mpillama", ignore=shutil.ignore_patterns("__pycache__"))
        init = DIRECTORY / "mpillama" / "__init__.py"
        init.write_text(change(init.read_text()))
        os.chdir(DIRECTORY)
        os.execv(sys.executable, [sys.executable, "-m", "mpillama", *ARGUMENTS])

    return execute


IN_PHASE: dict[str, Callable[[], None]] = {
    "exception": fail,
    "thread": fail_in_thread,
    "leave": leave,
    "hang": hang,
    "starved": starve,
    "cut": cut_file,
}
FROM_START: dict[str, Callable[[], None]] = {
    "vanished": with_private_file(lambda copy: copy.unlink()),
    "forbidden": with_private_file(lambda copy: copy.chmod(0)),
    "shorter": with_private_file(shorten),
    "unreadable": with_private_file(lambda copy: None, os.O_WRONLY),
    "stale": with_private_file(change_half),
    "unfinished": with_private_file(change_end),
    "cut": with_private_file(lambda copy: None),
    "no_room": starve_before_preflight,
    "starved_load": starve_after_preflight,
    "version": other_program(lambda text: text.replace(mpillama.__version__, "0.0.1")),
    "sources": other_program(lambda text: text + "# changed\n"),
}

if __name__ == "__main__":
    is_victim = RANK in ("all", str(launched_rank()))
    if is_victim and FAULT in FROM_START:
        FROM_START[FAULT]()
    action = IN_PHASE.get(FAULT) if is_victim else None
    if PHASE == "import":
        in_import(action)
    elif PHASE != "any":
        patch = {"table": in_table, "load": in_load}.get(PHASE, in_step)
        after_prepare(lambda: patch(action))
    status = program.main(ARGUMENTS)
    (DIRECTORY / f"status-{launched_rank()}").write_text(str(status))
    sys.exit(status)
