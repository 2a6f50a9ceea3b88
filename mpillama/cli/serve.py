"""`serve`: OpenAI's API and a chat page from inside the job."""

import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self, cast

from mpillama.cli.display import watched
from mpillama.cli.engines import ReplicaWorld, prompter, replicated
from mpillama.cli.options import ServeOptions
from mpillama.cli.running import loaded, running
from mpillama.cli.values import refuse_unwritable
from mpillama.comm.failure import Interrupted
from mpillama.engine.sequence import Pooling
from mpillama.errors import UserError
from mpillama.job.deadline import Deadline, StopRequest, ignore_stop_signals
from mpillama.job.start import World
from mpillama.loading.load import open_shared_executor
from mpillama.loading.session import Session
from mpillama.openai.answer_formats import reasoning_format, tool_format
from mpillama.redaction import keep_secret
from mpillama.replicas.replica import Replica, follow_router
from mpillama.replicas.runner import EngineRunner
from mpillama.server.app import create_app
from mpillama.server.async_engine import AsyncEngine, ServerState
from mpillama.server.connections import PLACES_KEPT, most_connections
from mpillama.server.engine_loop import EngineLoop, Shutdown
from mpillama.server.engine_requests import Output, ServerAdapter, ServerRequest
from mpillama.server.http_server import Address, HttpServer
from mpillama.server.middleware import Middleware, Rules
from mpillama.server.rendezvous import Rendezvous, default_path, is_loopback, tunnel
from mpillama.text.constraint import Grammars, json_object_grammar


@dataclass(frozen=True)
class Settings:
    key: str | None = field(repr=False)
    made_key: bool
    body_bytes: int
    rendezvous: Path


def check(options: ServeOptions) -> Settings:
    """Raise UserError for what is wrong with the options."""
    key, made = _key(options)
    if key is None and not options.no_auth and not is_loopback(options.host):
        raise UserError(
            f"--host {options.host} is reached from other machines: give a key (--api-key auto makes one, "
            "--api-key-file, MPILLAMA_API_KEY), or say --no-auth."
        )
    keep_secret(key)
    path = Path(options.rendezvous) if options.rendezvous else default_path(os.environ)
    refuse_unwritable("--rendezvous", str(path))
    return Settings(key, made, options.body_limit_bytes, path)


def _key(options: ServeOptions) -> tuple[str | None, bool]:
    """The key, and whether it was made here."""
    given = options.api_key or os.environ.get("MPILLAMA_API_KEY") or None
    if options.api_key_file:
        try:
            given = (Path(options.api_key_file).read_text().splitlines() or [""])[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {options.api_key_file}: cannot be read ({error}).") from error
    if options.no_auth and given:
        raise UserError("--no-auth and a key exclude each other: leave one out.")
    if given == "auto":
        return secrets.token_urlsafe(24), True
    if given is not None and not (given and given.isascii() and given.isprintable() and " " not in given):
        raise UserError("the API key must be printable ASCII without blanks: choose another one.")
    return given, False


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
        with (
            api or nullcontext(),
            replicated(job, size) as replica,
            loaded(job, partial(open_shared_executor, options), replica.world) as session,
        ):
            if api:
                ServeJob(options, api, replica, world.comm.size).run(session)
            elif session.is_root and replica.mailbox:
                job.status = follow_router(replica.mailbox, make_runner(session, make_grammars(session)))
    return job.status


def replica_size(options: ServeOptions, world: World) -> int:
    """Ranks that share a model; UserError if the ranks do not divide evenly."""
    if world.comm.size % options.replicas:
        reason = f"{world.comm.size} ranks do not divide into so many groups"
        raise UserError(f"--replicas is {options.replicas}: {reason}.")
    return world.comm.size // options.replicas


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


@dataclass(frozen=True)
class Listener:
    """The HTTP server, which answers that the model is loading until it is; leaving its block stops it."""

    settings: Settings
    engine: AsyncEngine
    server: HttpServer
    port: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop()


def listen(options: ServeOptions, settings: Settings) -> Listener:
    """Start the HTTP server; UserError if the address or the certificate cannot be used."""
    address = Address(options.host, options.port, options.tls_certificate, options.tls_key)
    bound, engine = address.bind(), AsyncEngine()
    app = create_app(engine, options.request_timeout, options.log_prompts)
    sys.setswitchinterval(SWITCH_SECONDS)
    most = most_connections(options.connections)
    limited = Middleware(app, _rules(options, settings, most), app.state.metrics.note)
    server = HttpServer(limited, address, bound, options.write_timeout, most)
    server.start(engine.attach)
    return Listener(settings, engine, server, bound.getsockname()[1])


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

    def __init__(self, options: ServeOptions, api: Listener, replica: ReplicaWorld, ranks: int):
        self.options = options
        self.api = api
        self.settings = api.settings
        self.replica = replica
        self.ranks = ranks
        self.stop = StopRequest(SIGNALS)

    def run(self, session: Session) -> None:
        grammars = make_grammars(session)
        router = self.replica.router(make_runner(session, grammars), "start the server again.")
        state, rendezvous = self._state(session, grammars, router.replicas), self._rendezvous(session)
        shutdown = Shutdown(self.stop, Deadline.of_run(self.options.time_limit), self.options.grace)
        self.stop.install()
        self.api.engine.now_serving(state)
        rendezvous.write(self.settings.rendezvous)
        try:
            self._announce(rendezvous)
            EngineLoop(router, self.api.engine, shutdown, self._tell_end).run()
        finally:
            rendezvous.remove(self.settings.rendezvous)

    def _tell_end(self, reason: str) -> None:
        self._say(f"{reason}: no more requests, running answers have {self.options.grace:g} s to finish")

    def _state(
        self, session: Session, grammars: Grammars, replicas: Sequence[Replica[ServerRequest, Output]]
    ) -> ServerState:
        options, file = self.options, session.loaded.file
        source = file.texts.get("chat_template.jinja")
        tools = tool_format(source.decode()) if source is not None else None
        thoughts = reasoning_format(source.decode(), grammars.token_id) if source is not None else None
        asks = prompter(session, options)
        asks = replace(asks, for_template=tools.for_template) if tools else asks
        path = Path(file.path)
        name = options.model_name or path.stem
        return ServerState(
            name, frozenset({name, path.name, path.stem}), int(time.time()), session.executor.max_seq_len, asks,
            grammars, tools, thoughts, cast(Pooling, options.pooling), replicas,
            options.queue + options.sequences * len(replicas), file.config.hidden_size,
            generates=file.config.lm_head,
        )  # fmt: skip

    def _rendezvous(self, session: Session) -> Rendezvous:
        host, node, environment = self.options.host, os.uname().nodename, os.environ
        reached = host if is_loopback(host) else node
        shown = f"[{reached}]" if ":" in reached else reached
        url = f"{'https' if self.options.tls_certificate else 'http'}://{shown}:{self.api.port}"
        ssh = tunnel(host, self.api.port, node, environment.get("SLURM_SUBMIT_HOST"))
        model, job = self.options.model_name or Path(session.path).stem, environment.get("SLURM_JOB_ID")
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


def make_runner(session: Session, grammars: Grammars) -> EngineRunner[ServerRequest, Output]:
    return EngineRunner(session.engine, ServerAdapter(grammars))


def make_grammars(session: Session) -> Grammars:
    """What builds grammars; the first takes a second for a large vocabulary, and not every tokenizer allows them."""
    grammars = Grammars(session.tokenizer, session.loaded.file.config.vocab_size)
    try:
        grammars.check(json_object_grammar())
    except UserError as error:
        LOG.info("answers cannot be constrained: %s", error)
    return grammars
