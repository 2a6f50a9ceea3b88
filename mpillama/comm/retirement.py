"""Groups of ranks that may fail while the job goes on: who tells whom, and how all wait for the end.

A group that fails by an exception on one of its ranks retires: that rank tells its mates (Watch.tell_gone) and rank 0,
all of them then wait for the job's end, and rank 0 gives the group's work to the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mpillama.comm.groups import Post
from mpillama.comm.watchdog import GroupFailedError, Watch


@dataclass(frozen=True)
class Failed:
    """A rank has given up."""

    sentence: str


@dataclass(frozen=True)
class End:
    """The job is over."""

    status: int


class Member(Protocol):
    """A group that another process leads, as rank 0 sees it."""

    ranks: range

    def hear(self, message: Any) -> None:
        """Take a message of one of its ranks."""


class Office:
    """Rank 0's mail: brings each message to its group."""

    def __init__(self, post: Post, groups: Sequence[Member]):
        self.post = post
        self.groups = {rank: group for group in groups for rank in group.ranks}

    def collect(self) -> None:
        """Take what has arrived, and show the leaders that rank 0 is alive."""
        for rank, message in self.post.receive():
            if rank in self.groups:
                self.groups[rank].hear(message)
        self.post.live()


def in_group(post: Post, watch: Watch, work: Callable[[], int]) -> int:
    """Do a rank's work for its group (not rank 0); if the group fails, wait for the job's end. The exit status."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the group retires and rank 0 tells the user
        sentence = give_up(error, watch)
        if not isinstance(error, GroupFailedError):
            post.send(0, Failed(sentence))
    return wait_for_end(post)


def wait_for_end(post: Post) -> int:
    """What a rank of a group that failed does."""
    post.expect(0)
    while True:
        for _, message in post.receive():
            if isinstance(message, End):
                return message.status
        post.wait(0.02)


def give_up(error: Exception, watch: Watch) -> str:
    """Tell the mates, and say what went wrong in a sentence."""
    if isinstance(error, GroupFailedError):
        return f"{error} has given up"
    watch.tell_gone()
    where = watch.aborter.where if watch.aborter else "this rank"
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"
