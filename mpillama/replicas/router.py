"""Rank 0 routes: requests to the least loaded replica, outputs back, and elsewhere what a failed one did not finish."""

from collections.abc import Iterator, Sequence
from typing import Generic

from mpillama.comm.mailbox import Mailbox
from mpillama.errors import UserError
from mpillama.replicas.replica import AskMemory, Cancel, LocalReplica, RemoteReplica, Replica
from mpillama.replicas.runner import OutputT, RequestT


class Router(Generic[RequestT, OutputT]):
    """Runs requests on replicas; `mailbox` brings the news of those that other processes lead.

    A request that a failed replica did not finish begins anew on another one, and so do its outputs.
    `advice` says what to do once all have failed.
    """

    def __init__(self, replicas: Sequence[Replica[RequestT, OutputT]], mailbox: Mailbox | None, advice: str):
        self.replicas = replicas
        self.mailbox = mailbox
        self.advice = advice
        self._remote = {rank: r for r in replicas if isinstance(r, RemoteReplica) for rank in r.ranks}
        self._waiting: dict[int, RequestT] = {}

    @property
    def idle(self) -> bool:
        """Whether a step would compute nothing in this process."""
        return all(replica.idle for replica in self.replicas)

    @property
    def active(self) -> int:
        return len(self._waiting) + sum(len(replica.requests) for replica in self.replicas)

    @property
    def room(self) -> int:
        """Requests that the least loaded replica wants."""
        return max((replica.room for replica in self._ready()), default=0)

    @property
    def failures(self) -> list[str]:
        return [replica.failure for replica in self.replicas if replica.failure]

    def _ready(self) -> list[Replica[RequestT, OutputT]]:
        return [replica for replica in self.replicas if replica.ready]

    def submit(self, request: RequestT) -> None:
        """Give a request to the replica with the most room; while all are loading, it waits."""
        replica = max(self._ready(), key=lambda replica: replica.room, default=None)
        if replica is None:
            self._waiting[request.key] = request
            return
        replica.requests[request.key] = request
        replica.send(request)

    def cancel(self, key: int) -> None:
        """Forget a request; nothing happens if it is over."""
        self._waiting.pop(key, None)
        for replica in self.replicas:
            if replica.requests.pop(key, None) is not None and not replica.failure:
                replica.send(Cancel(key))

    def ask_memory(self) -> None:
        for replica in self._ready():
            replica.send(AskMemory())

    def step(self) -> list[OutputT]:
        """Run a step and return the outputs of all replicas; UserError once all have failed."""
        self._fail_over()  # first, so that what a replica finished before it failed is delivered
        self._receive()
        return [output for replica in self.replicas for output in self._outputs(replica)]

    def _receive(self) -> None:
        if self.mailbox is None:
            return
        for rank, message in self.mailbox.receive():
            if rank in self._remote:
                self._remote[rank].hear(message)
        self.mailbox.beat()

    def _fail_over(self) -> None:
        if len(self.failures) == len(self.replicas):
            raise UserError(f"no replica is left: {'; '.join(self.failures)}; {self.advice}")
        left, self._waiting = self._waiting, {}
        for replica in self.replicas:
            if replica.failure:
                left |= replica.requests
                replica.requests = {}
                self._show_life(replica.ranks)
        for request in left.values():
            self.submit(request)

    def _show_life(self, ranks: range) -> None:
        """Let the ranks of a failed replica, which wait for the job's end, hear of this one."""
        for rank in ranks:
            if self.mailbox and rank:
                self.mailbox.beat_to(rank)

    @staticmethod
    def _outputs(replica: Replica[RequestT, OutputT]) -> Iterator[OutputT]:
        """A step's outputs of requests that were not cancelled."""
        for output in replica.step():
            if output.key in replica.requests:
                if output.finished:
                    del replica.requests[output.key]
                yield output

    def close(self) -> None:
        """No more steps will come: let the ranks of this process's replica know."""
        for replica in self.replicas:
            if isinstance(replica, LocalReplica):
                replica.runner.wake()
