"""A replica may fail while the job goes on: who is told, and how its ranks wait for the job's end.

A rank that fails by an exception tells the other ranks of its replica (Watch.tell_gone) and rank 0. All of them wait
for the job's end, and the router gives the replica's requests to the other replicas.
"""

from dataclasses import dataclass

from mpillama.comm.mailbox import Mailbox
from mpillama.comm.watchdog import GroupFailedError, Watch


@dataclass(frozen=True)
class Failed:
    """A rank of the sender's replica has failed."""

    sentence: str


@dataclass(frozen=True)
class End:
    """The job is over."""

    status: int


def wait_for_end(mailbox: Mailbox, watch: Watch, error: Exception) -> int:
    """What a rank does whose replica has failed, but for rank 0; returns the exit status that rank 0 sends."""
    sentence = give_up(error, watch)
    if not isinstance(error, GroupFailedError):
        mailbox.send(0, Failed(sentence))
    mailbox.watch(0)
    while True:
        for _, message in mailbox.receive():
            if isinstance(message, End):
                return message.status
        mailbox.wait(0.02)


def give_up(error: Exception, watch: Watch) -> str:
    """Tell the other ranks of the replica, and say in a sentence what went wrong."""
    if isinstance(error, GroupFailedError):
        return f"{error} has given up"
    watch.tell_gone()
    where = watch.aborter.where if watch.aborter else "this rank"
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"


def end_job(mailbox: Mailbox, status: int) -> None:
    """Rank 0 lets all ranks go: leaders of replicas, and those of failed replicas, which it may not have heard of."""
    for rank in range(1, mailbox.size):
        mailbox.send(rank, End(status))
