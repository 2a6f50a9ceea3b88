"""Which replica a request goes to, and where what a failed one leaves."""

from dataclasses import dataclass

import pytest

from mpillama.errors import UserError
from mpillama.replicas.replica import AskMemory, Cancel, Failed, Ready, RemoteReplica, Report
from mpillama.replicas.router import Router
from mpillama.replicas.runner import EngineStats
from tests.replicas.scripted import ScriptedReplica


@dataclass(frozen=True)
class Request:
    key: int


@dataclass(frozen=True)
class Output:
    key: int
    finished: bool = True


def scripted(*arguments, **named) -> ScriptedReplica:
    return ScriptedReplica(lambda request: Output(request.key), *arguments, **named)


def router(*replicas: ScriptedReplica) -> Router:
    return Router(replicas, None, "start again.")


def finished(routing: Router, steps: int = 30) -> list[int]:
    return [output.key for _ in range(steps) for output in routing.step()]


def test_requests_go_where_the_most_room_is():
    wide, narrow = scripted(8), scripted(2)
    routing = router(narrow, wide)
    for key in range(8):
        routing.submit(Request(key))
    assert (len(wide.taken), len(narrow.taken), routing.room) == (7, 1, 1)
    assert sorted(finished(routing)) == list(range(8))
    assert (routing.active, routing.idle, routing.room) == (0, True, 8)


def test_more_than_there_is_room_for_is_shared_evenly():
    replicas = [scripted(2) for _ in range(3)]
    routing = router(*replicas)
    for key in range(30):
        routing.submit(Request(key))
    assert [len(replica.taken) for replica in replicas] == [10, 10, 10]
    assert routing.room < 0


def test_outputs_of_cancelled_requests_are_dropped():
    replica = scripted()
    routing = router(replica)
    for key in range(3):
        routing.submit(Request(key))
    routing.cancel(1)
    routing.cancel(77)
    assert replica.cancelled == [1]
    assert (finished(routing), routing.active) == ([0, 2], 0)


def test_an_answer_that_goes_on_stays_under_way():
    replica = ScriptedReplica(lambda request: Output(request.key, finished=False))
    routing = router(replica)
    routing.submit(Request(1))
    assert (finished(routing), routing.active) == ([1], 1)


def test_what_a_failed_replica_did_not_finish_begins_again_elsewhere():
    good, bad = scripted(2), scripted(8, fails=5)
    routing = router(good, bad)
    for key in range(5):
        routing.submit(Request(key))
    assert bad.failure
    assert sorted(finished(routing)) == [0, 1, 2, 3, 4]
    assert good.taken == [0, 1, 2, 3, 4]
    assert routing.failures == ["out of memory"]
    routing.submit(Request(5))
    assert good.taken[-1] == 5


class ScriptedMailbox:
    """Brings what is put into `arrived`, and notes what is sent."""

    def __init__(self):
        self.arrived: list[tuple[int, object]] = []
        self.sent: list[tuple[int, object]] = []
        self.beats_to: set[int] = set()
        self.watched: set[int] = set()
        self.beat_to, self.watch, self.unwatch = self.beats_to.add, self.watched.add, self.watched.discard

    def send(self, to: int, value: object) -> None:
        self.sent.append((to, value))

    def receive(self) -> list[tuple[int, object]]:
        arrived, self.arrived = self.arrived, []
        return arrived

    def beat(self) -> None:
        pass


def test_a_remote_replica_takes_part_from_its_word_that_it_is_ready_to_its_failure():
    mailbox, own = ScriptedMailbox(), scripted(0)
    remote = RemoteReplica(mailbox, range(2, 4))
    routing = Router([own, remote], mailbox, "start again.")
    for key in range(3):
        routing.submit(Request(key))
    assert (finished(routing, 2), mailbox.sent, mailbox.watched) == ([], [], set())
    mailbox.arrived = [(2, Ready(3))]
    finished(routing, 2)
    assert mailbox.sent == [(2, Request(key)) for key in range(3)]
    assert (mailbox.beats_to, mailbox.watched) == ({2}, {2})
    routing.cancel(1)
    routing.ask_memory()
    assert mailbox.sent[3:] == [(2, Cancel(1)), (2, AskMemory())]
    own.capacity = 3
    report = Report([Output(0), Output(1)], EngineStats(steps=7))
    mailbox.arrived = [(2, report), (3, Failed("rank 3: disk")), (2, Report([Output(2)], EngineStats()))]
    assert finished(routing, 1) == [0]  # what it finished before, but not what was cancelled or came too late
    assert (remote.failure, remote.ready, remote.stats.steps) == ("rank 3: disk", False, 7)
    assert finished(routing, 2) == [2]
    assert own.taken == [2]
    assert (mailbox.beats_to, mailbox.watched) == ({2, 3}, set())


def test_a_cancelled_request_does_not_begin_again():
    good, bad = scripted(1), scripted(8, fails=3)
    routing = router(good, bad)
    for key in range(3):
        routing.submit(Request(key))
    routing.cancel(1)
    assert bad.cancelled == []
    assert sorted(finished(routing)) == [0, 2]


def test_requests_wait_for_a_replica_that_is_still_loading():
    failed, loading = scripted(fails=1), scripted(0)
    routing = router(failed, loading)
    routing.submit(Request(1))
    routing.submit(Request(2))
    assert (finished(routing, 3), routing.active, routing.room) == ([], 2, 0)
    routing.cancel(2)
    loading.capacity = 3
    assert finished(routing) == [1]


def test_once_all_have_failed_it_says_why():
    routing = router(scripted(fails=1), scripted(fails=1))
    routing.submit(Request(1))
    with pytest.raises(UserError, match=r"no replica is left: out of memory; out of memory; start again\."):
        finished(routing)


def test_what_was_finished_before_the_last_one_failed_is_delivered():
    only = scripted(fails=2)
    routing = router(only)
    routing.submit(Request(1))
    assert finished(routing, 1) == [1]
    routing.submit(Request(2))
    with pytest.raises(UserError):
        routing.step()
