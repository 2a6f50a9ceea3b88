"""`serve`: OpenAI's API and a chat page from inside the job."""

import logging
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self, cast

from mpillama.api.reasoning import reasoning_format
from mpillama.api.tool_calls import tool_format
from mpillama.comm.failure import Interrupted
from mpillama.comm.retirement import Office
from mpillama.comm.start import World
from mpillama.engine.deadline import Deadline, StopRequest, ignore_stop_signals
from mpillama.engine.engine import Engine
from mpillama.engine.sequence import Pooling
from mpillama.errors import UserError
from mpillama.options import ServeOptions
from mpillama.serve.app import create_app
from mpillama.serve.connections import PLACES_KEPT, most_connections
from mpillama.serve.desk import EngineDesk
from mpillama.serve.dispatcher import Dispatcher, Inbox, Life
from mpillama.serve.front import Front, Service
from mpillama.serve.guard import Guard, Rules
from mpillama.serve.http_server import Address, HttpServer
from mpillama.serve.rendezvous import Rendezvous, is_loopback, tunnel
from mpillama.serve.replicas import LocalReplica, RemoteReplica, Replica, follow_rank_0
from mpillama.text.constraint import Grammars, json_object_grammar
from mpillama.tools.display import watched
from mpillama.tools.engines import Group, grouped, opener, prompter
from mpillama.tools.running import Run, loaded, running
from mpillama.tools.serve_settings import Settings, check

LOG = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BODIES = 16
"""So many of the largest bodies may be in memory together."""
SWITCH_SECONDS = 0.0005
"""How long one thread may keep Python from the other: the engine's comes back from its kernels many times a step."""


def serve(options: ServeOptions, world: World) -> int:
    """Run the command until a signal or the end of the job; returns the exit status."""
    settings = world.comm.on_root_only(lambda: check(options))
    if world.comm.is_root:
        signal.signal(signal.SIGUSR1, _interrupt)  # until the model is loaded, as SIGTERM and SIGINT
    else:
        ignore_stop_signals(SIGNALS)
    with running(options, world) as job:
        size = replica_size(options, world)
        api = world.comm.on_root_only(lambda: listen(options, cast(Settings, settings)))
        with api or nullcontext(), grouped(job, size) as group, loaded(job, opener(options), group.world) as run:
            if api:
                ServeJob(options, api, group, world.comm.size).run(run)
            elif run.is_root and group.post:
                job.status = follow_rank_0(group.post, make_desk(run, options))
    return job.status


def replica_size(options: ServeOptions, world: World) -> int:
    """Ranks that share a model; UserError if they do not divide so."""
    if options.replicas < 1 or world.comm.size % options.replicas:
        reason = f"{world.comm.size} ranks do not divide into so many groups"
        raise UserError(f"--replicas is {options.replicas}: {reason}.")
    return world.comm.size // options.replicas


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


@dataclass(frozen=True)
class Listener:
    """The HTTP server, which says until the model is loaded that it is being loaded; leaving its block stops it."""

    settings: Settings
    front: Front
    inbox: Inbox
    server: HttpServer
    port: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop()


def listen(options: ServeOptions, settings: Settings) -> Listener:
    """Begin to answer; UserError if the address or the certificate cannot be had."""
    address = Address(options.host, options.port, options.tls_certificate, options.tls_key)
    bound, inbox = address.bind(), Inbox()
    front = Front(inbox)
    app = create_app(front, options.request_timeout, options.log_prompts)
    sys.setswitchinterval(SWITCH_SECONDS)
    most = most_connections(options.connections)
    guard = Guard(app, _rules(options, settings, most), app.state.metrics.note)
    server = HttpServer(guard, address, bound, options.write_timeout, most)
    server.start(front.attach)
    return Listener(settings, front, inbox, server, bound.getsockname()[1])


def _rules(options: ServeOptions, settings: Settings, most_connections: int) -> Rules:
    only_local = settings.key is None and is_loopback(options.host)
    hosts = frozenset({"localhost", "127.0.0.1", "[::1]", options.host}) if only_local else None
    return Rules(
        settings.key, hosts, min(options.connections, most_connections - PLACES_KEPT), settings.body_bytes,
        options.body_timeout, options.write_timeout,
        BODIES * settings.body_bytes, frozenset(options.cors),
    )  # fmt: skip


class ServeJob:
    """What rank 0 does once the model is loaded."""

    def __init__(self, options: ServeOptions, api: Listener, group: Group, ranks: int):
        self.options = options
        self.api = api
        self.settings = api.settings
        self.ranks = ranks
        self.post, size = group.post, group.world.comm.size
        self.own_watch = group.world.comm.watch if group.post else None
        self.remote = [RemoteReplica(group.post, range(i, i + size)) for i in range(size, ranks, size) if group.post]
        self.stop = StopRequest(SIGNALS)

    def run(self, run: Run) -> None:
        """Serve until the end."""
        options = self.options
        desk = make_desk(run, options)
        own = LocalReplica(desk, range(run.world.comm.size), self.own_watch)
        replicas: list[Replica] = [own, *self.remote]
        service, rendezvous = self._service(run, desk.grammars, replicas), self._rendezvous(run)
        self.stop.install()
        self.api.front.now_serving(service)
        rendezvous.write(self.settings.rendezvous)
        try:
            self._announce(rendezvous)
            self._dispatch(replicas, Deadline.of_run(options.time_limit))
        finally:
            rendezvous.remove(self.settings.rendezvous)
            run.executor.abandoned = own.failure is not None

    def _dispatch(self, replicas: list[Replica], deadline: Deadline) -> None:
        office = Office(self.post, self.remote) if self.post else None
        dispatcher = Dispatcher(
            replicas, self.api.inbox, self.api.front.now_delivered, self._tell_end, self.api.front.now_ended,
            Life(self.stop, deadline, self.options.grace), office.collect if office else lambda: None,
        )  # fmt: skip
        dispatcher.run()

    def _tell_end(self, reason: str) -> None:
        self.api.front.now_draining(reason)
        self._say(f"{reason}: no more requests, running answers have {self.options.grace:g} s to finish")

    def _service(self, run: Run, grammars: Grammars, replicas: list[Replica]) -> Service:
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
            grammars, tools, thoughts, cast(Pooling, options.pooling), replicas,
            options.queue + options.sequences * len(replicas), file.config.hidden_size,
            generates=file.config.lm_head,
        )  # fmt: skip

    def _rendezvous(self, run: Run) -> Rendezvous:
        host, node, environment = self.options.host, os.uname().nodename, os.environ
        reached = host if is_loopback(host) else node
        shown = f"[{reached}]" if ":" in reached else reached
        url = f"{'https' if self.options.tls_certificate else 'http'}://{shown}:{self.api.port}"
        ssh = tunnel(host, self.api.port, node, environment.get("SLURM_SUBMIT_HOST", "LOGIN-NODE"))
        model, job = self.options.model_name or Path(run.loaded.file.path).stem, environment.get("SLURM_JOB_ID")
        return Rendezvous(url, self.settings.key, model, node, self.api.port, ssh, job)

    def _announce(self, rendezvous: Rendezvous) -> None:
        ranks = self.ranks
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


def make_desk(run: Run, options: ServeOptions) -> EngineDesk:
    """The engine of this process's group."""
    grammars = Grammars(run.tokenizer, run.loaded.file.config.vocab_size)
    prepare(grammars)
    return EngineDesk(Engine(run.executor, run.tokenizer, options.speculate), grammars)


def prepare(grammars: Grammars) -> None:
    """Build what grammars need, which takes a second for a large vocabulary; not every tokenizer allows them."""
    try:
        grammars.check(json_object_grammar())
    except UserError as error:
        LOG.info("answers cannot be constrained: %s", error)
