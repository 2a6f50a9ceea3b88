"""What `batch` and `serve` share: replicas, and options as defaults of requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mpillama.cli.options import BatchOptions, ServeOptions
from mpillama.cli.running import Job
from mpillama.comm.failure import USER_ERROR_STATUS
from mpillama.comm.mailbox import Mailbox
from mpillama.job.start import World
from mpillama.loading.session import Session
from mpillama.openai.prompts import Prompter
from mpillama.replicas.replica import LocalReplica, RemoteReplica, end_job, wait_for_end
from mpillama.replicas.router import Router
from mpillama.replicas.runner import EngineRunner, OutputT, RequestT


@dataclass(frozen=True)
class ReplicaWorld:
    """The ranks that share a model with this one, and the mailbox between several such replicas."""

    world: World
    mailbox: Mailbox | None

    def router(self, runner: EngineRunner[RequestT, OutputT], advice: str) -> Router[RequestT, OutputT]:
        """On rank 0: what gives requests to all replicas; `advice` says what to do once all have failed."""
        size, mailbox = self.world.comm.size, self.mailbox
        own = LocalReplica(runner, range(size), self.world.comm.watch if mailbox else None)
        firsts = range(size, mailbox.size, size) if mailbox else ()
        return Router([own, *(RemoteReplica(mailbox, range(i, i + size)) for i in firsts if mailbox)], mailbox, advice)


@contextmanager
def replicated(job: Job, size: int) -> Iterator[ReplicaWorld]:
    """Divide the ranks of a job into replicas of `size` ranks, each of which loads the model.

    Rank 0 leaves the block when all is done, and lets the others go with `job.status`. A replica that fails, but for
    rank 0's, waits for that outside its block.
    """
    world, status = job.world, USER_ERROR_STATUS
    if size == world.comm.size:
        yield ReplicaWorld(world, None)
        return
    own, mailbox = world.split(size), Mailbox(world.comm)
    if world.comm.is_root:
        try:
            yield ReplicaWorld(own, mailbox)
            status = job.status
        finally:
            end_job(mailbox, status)
        return
    try:
        yield ReplicaWorld(own, mailbox)
    except Exception as error:  # noqa: BLE001 - whatever it is, the replica fails and rank 0 tells the user
        job.status = wait_for_end(mailbox, own.comm.watch, error)


def prompter(session: Session, options: BatchOptions | ServeOptions) -> Prompter:
    """What turns bodies into requests, with the command's sampling options as defaults."""
    vocab_size = session.loaded.file.config.vocab_size
    return Prompter(session.tokenizer, lambda: session.chat_template, vocab_size, options.sampling)
