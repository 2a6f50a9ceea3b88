"""`serve`: OpenAI's API and a chat page from inside the job."""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, cast

from mpillama.comm.failure import Interrupted
from mpillama.comm.start import World, start_mpi
from mpillama.engine.deadline import Deadline, StopRequest, ignore_stop_signals
from mpillama.errors import UserError
from mpillama.options import ServeOptions
from mpillama.tools.display import watched
from mpillama.tools.engines import opener, prompter, run_in_groups
from mpillama.tools.running import Run, choose_target, observed, run_in_world
from mpillama.tools.serve_settings import Settings, check

if TYPE_CHECKING:
    from mpillama.comm.groups import Post
    from mpillama.comm.watchdog import Watch
    from mpillama.engine.sequence import Pooling
    from mpillama.serve.desk import EngineDesk
    from mpillama.serve.dispatcher import Inbox
    from mpillama.serve.front import Front, Service
    from mpillama.serve.guard import Rules
    from mpillama.serve.http_server import HttpServer
    from mpillama.serve.rendezvous import Rendezvous
    from mpillama.serve.replicas import RemoteReplica, Replica
    from mpillama.text.constraint import Grammars

LOG = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BODIES = 16
"""So many of the largest bodies may be in memory together."""
SWITCH_SECONDS = 0.0005
"""How long one thread may keep Python from the other: the engine's comes back from its kernels many times a step."""


def serve(options: ServeOptions) -> int:
    """Run the command until a signal or the end of the job; returns the exit status."""
    from mpillama.comm.launcher import launched_rank

    settings = check(options)
    if launched_rank() == 0:
        signal.signal(signal.SIGUSR1, _interrupt)  # until the model is loaded, as SIGTERM and SIGINT
    else:
        ignore_stop_signals(SIGNALS)
    quiet = options.quiet
    with (
        start_mpi(options.threads, timeout=options.timeout, beside=1) as world,
        observed(options, world, quiet) as monitor,
    ):
        if options.replicas < 1 or world.comm.size % options.replicas:
            reason = f"{world.comm.size} ranks do not divide into so many groups"
            raise UserError(f"--replicas is {options.replicas}: {reason}.")
        target = choose_target(world)
        job = ServeJob(options, settings, world)
        world.comm.on_root_only(job.listen)
        size = world.comm.size // options.replicas
        if options.replicas == 1:
            return run_in_world(options, quiet, job.run, opener(options), world, target, monitor)
        return run_in_groups(options, quiet, world, size, target, monitor, job.gather_groups, job.run, job.lead)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


class ServeJob:
    """What rank 0 does beside loading; the other ranks use `lead` only."""

    def __init__(self, options: ServeOptions, settings: Settings, world: World):
        self.options = options
        self.settings = settings
        self.world = world
        self.remote: list[RemoteReplica] = []
        self.post: Post | None = None
        self.own_watch: Watch | None = None
        self.stop = StopRequest(SIGNALS)
        self.front: Front
        self.server: HttpServer
        self.inbox: Inbox
        self.port = options.port

    def listen(self) -> None:
        """Begin to answer (that the model is being loaded)."""
        from queue import SimpleQueue

        from mpillama.serve.app import create_app
        from mpillama.serve.connections import most_connections
        from mpillama.serve.front import Front
        from mpillama.serve.guard import Guard
        from mpillama.serve.http_server import Address, HttpServer

        options = self.options
        address = Address(options.host, options.port, options.tls_certificate, options.tls_key)
        bound = address.bind()
        self.port = bound.getsockname()[1]
        self.inbox = SimpleQueue()
        self.front = Front(self.inbox)
        app = create_app(self.front, options.request_timeout, options.log_prompts)
        sys.setswitchinterval(SWITCH_SECONDS)
        most = most_connections(options.connections)
        guard = Guard(app, self._rules(most), app.state.metrics.note)
        self.server = HttpServer(guard, address, bound, options.write_timeout, most)
        self.server.start(self.front.attach)

    def _rules(self, most_connections: int) -> "Rules":
        from mpillama.serve.connections import PLACES_KEPT
        from mpillama.serve.guard import Rules
        from mpillama.serve.rendezvous import is_loopback

        options, key = self.options, self.settings.key
        only_local = key is None and is_loopback(options.host)
        hosts = frozenset({"localhost", "127.0.0.1", "[::1]", options.host}) if only_local else None
        return Rules(
            key, hosts, min(options.connections, most_connections - PLACES_KEPT), self.settings.body_bytes,
            options.body_timeout, options.write_timeout,
            BODIES * self.settings.body_bytes, frozenset(options.cors),
        )  # fmt: skip

    def gather_groups(self, post: "Post", group: World) -> None:
        """Take the other groups of the job in; this process's own may then retire, too."""
        from mpillama.serve.replicas import RemoteReplica

        size = group.comm.size
        self.post, self.own_watch = post, group.comm.watch
        self.remote = [RemoteReplica(post, range(i, i + size)) for i in range(size, self.world.comm.size, size)]

    def lead(self, run: Run, post: "Post") -> int:
        """What the first rank of another group does; returns the exit status."""
        from mpillama.serve.replicas import follow_rank_0

        return follow_rank_0(post, self._desk(run))

    def run(self, run: Run) -> int:
        """Serve; returns the exit status."""
        from mpillama.comm.failure import USER_ERROR_STATUS

        status = USER_ERROR_STATUS
        try:
            self._serve(run)
            status = 0
        finally:
            self.server.stop()
            self._end(status)
        return status

    def _serve(self, run: Run) -> None:
        from mpillama.serve.replicas import LocalReplica

        options = self.options
        desk = self._desk(run)
        own = LocalReplica(desk, range(run.world.comm.size), self.own_watch)
        replicas: list[Replica] = [own, *self.remote]
        service, rendezvous = self._service(run, desk.grammars, replicas), self._rendezvous(run)
        self.stop.install()
        self.front.now_serving(service)
        rendezvous.write(self.settings.rendezvous)
        try:
            self._announce(rendezvous)
            self._dispatch(replicas, Deadline.of_run(options.time_limit))
        finally:
            rendezvous.remove(self.settings.rendezvous)
            run.executor.abandoned = own.failure is not None

    def _dispatch(self, replicas: "list[Replica]", deadline: Deadline) -> None:
        from mpillama.comm.retirement import Office
        from mpillama.serve.dispatcher import Dispatcher, Life

        office = Office(self.post, self.remote) if self.post else None
        dispatcher = Dispatcher(
            replicas, self.inbox, self.front.now_delivered, self._tell_end, self.front.now_ended,
            Life(self.stop, deadline, self.options.grace), office.collect if office else lambda: None,
        )  # fmt: skip
        dispatcher.run()

    def _tell_end(self, reason: str) -> None:
        self.front.now_draining(reason)
        self._say(f"{reason}: no more requests, running answers have {self.options.grace:g} s to finish")

    def _desk(self, run: Run) -> "EngineDesk":
        from mpillama.engine.engine import Engine
        from mpillama.serve.desk import EngineDesk
        from mpillama.text.constraint import Grammars

        grammars = Grammars(run.tokenizer, run.loaded.file.config.vocab_size)
        prepare(grammars)
        return EngineDesk(Engine(run.executor, run.tokenizer, self.options.speculate), grammars)

    def _service(self, run: Run, grammars: "Grammars", replicas: "list[Replica]") -> "Service":
        from dataclasses import replace

        from mpillama.api.reasoning import reasoning_format
        from mpillama.api.tool_calls import tool_format
        from mpillama.serve.front import Service

        options, file = self.options, run.loaded.file
        source = file.texts.get("chat_template.jinja")
        tools = tool_format(source.decode()) if source is not None else None
        thoughts = reasoning_format(source.decode(), grammars.token_id) if source is not None else None
        asks = prompter(run, options)
        asks = replace(asks, for_template=tools.for_template) if tools else asks
        path = Path(file.path)
        name = options.model_name or path.stem
        return Service(
            name, frozenset({name, path.name, path.stem}), int(time.time()), run.executor.max_seq_len, asks,
            grammars, tools, thoughts, cast("Pooling", options.pooling), replicas,
            options.queue + options.sequences * len(replicas), file.config.hidden_size,
            generates=file.config.lm_head,
        )  # fmt: skip

    def _rendezvous(self, run: Run) -> "Rendezvous":
        from mpillama.serve.rendezvous import Rendezvous, is_loopback, tunnel

        host, node, environment = self.options.host, os.uname().nodename, os.environ
        reached = host if is_loopback(host) else node
        shown = f"[{reached}]" if ":" in reached else reached
        url = f"{'https' if self.options.tls_certificate else 'http'}://{shown}:{self.port}"
        ssh = tunnel(host, self.port, node, environment.get("SLURM_SUBMIT_HOST", "LOGIN-NODE"))
        model, job = self.options.model_name or Path(run.loaded.file.path).stem, environment.get("SLURM_JOB_ID")
        return Rendezvous(url, self.settings.key, model, node, self.port, ssh, job)

    def _announce(self, rendezvous: "Rendezvous") -> None:
        ranks = self.world.comm.size
        self._say(f"serving {rendezvous.model} on {ranks} rank{'s' if ranks > 1 else ''}: {rendezvous.url}")
        self._say(f"for `mpillama client`: {self.settings.rendezvous}; from elsewhere: {rendezvous.ssh}")
        if self.settings.made_key and watched(self.options.quiet):  # a job's log may be read by others
            sys.stderr.write(f"mpillama: key: {rendezvous.key}; the page: {rendezvous.url}/#key={rendezvous.key}\n")
        elif self.settings.key:
            self._say("clients need the key, which is in that file")

    def _say(self, text: str) -> None:
        LOG.info("%s", text)
        if not self.options.quiet:
            sys.stderr.write(f"mpillama: {text}\n")
            sys.stderr.flush()

    def _end(self, status: int) -> None:
        """Let all ranks of other groups go, and those of a group that has failed."""
        from mpillama.comm.retirement import End

        if self.post:
            for rank in range(1, self.world.comm.size):
                self.post.send(rank, End(status))


def prepare(grammars: "Grammars") -> None:
    """Build what grammars need, which takes a second for a large vocabulary; not every tokenizer allows them."""
    from mpillama.text.constraint import json_object_grammar

    try:
        grammars.check(json_object_grammar())
    except UserError as error:
        LOG.info("answers cannot be constrained: %s", error)
