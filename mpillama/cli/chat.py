"""`chat`: talk to a model; the conversation stays in the KV cache, and with `--session` in a file."""

import json
import os
import signal
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.cli.conversation import HELP, Conversation, Message, converse, system_of
from mpillama.cli.display import in_number
from mpillama.cli.keyboard import Keyboard
from mpillama.cli.options import ChatOptions
from mpillama.cli.running import loaded, pieces_of, running, write
from mpillama.cli.values import refuse_unwritable
from mpillama.engine.sequence import Request
from mpillama.errors import UserError
from mpillama.job.start import World
from mpillama.loading.session import Session
from mpillama.text.sampling_params import SamplingParams

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class SavedChat:
    """What `--session` keeps: the messages, and how many answers were begun, which a seed depends on."""

    messages: list[Message] = field(default_factory=list)
    turns: int = 0

    @classmethod
    def read(cls, path: str | None, system: str | None) -> "SavedChat":
        """The conversation of a file, none if there is no file; UserError if it cannot go on with this `system`."""
        refuse_unwritable("--session", path)
        if path is None or not Path(path).exists():
            return cls()
        try:
            saved = cls.of_json(json.loads(Path(path).read_text("utf-8")))
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                f"--session {path}: holds no conversation of `mpillama chat`: name another file, or none that exists."
            ) from error
        if system is not None and saved.messages and system_of(saved.messages) != (system or None):
            raise UserError(f"--session {path}: has another system message: leave --system out, or name another file.")
        return saved

    @classmethod
    def of_json(cls, found: Any) -> "SavedChat":
        """A conversation as `write` has it; ValueError, TypeError or LookupError for anything else."""
        messages, turns = [{"role": m["role"], "content": m["content"]} for m in found["messages"]], found["turns"]
        if not all(m["role"] in ROLES and isinstance(m["content"], str) for m in messages):
            raise ValueError("messages that `chat` does not write")
        if type(turns) is not int or turns < 0:
            raise ValueError(f"turns: {turns}")
        return cls(messages, turns)

    def write(self, path: str) -> None:
        """Replace the file, which only its owner may read; UserError if it cannot be written."""
        new = f"{path}.{os.uname().nodename}.{os.getpid()}.new"  # two chats may write at the same time
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                with os.fdopen(fd, "w", encoding="utf-8") as file:
                    json.dump(asdict(self), file, ensure_ascii=False, indent=1)
                    file.flush()
                    os.fsync(fd)
                Path(new).rename(path)
            except BaseException:
                Path(new).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise UserError(f"--session {path}: cannot be written ({error.strerror}).") from error


def chat(options: ChatOptions, world: World) -> int:
    # A launcher passes Ctrl-C on to every rank: only rank 0 acts on it, and not before it can answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    saved = world.comm.on_root_only(lambda: SavedChat.read(options.session, options.system))
    with running(options, world) as job, loaded(job) as session:
        if session.is_root:
            _chat(session, options, saved or SavedChat())
    return job.status


def _chat(session: Session, options: ChatOptions, saved: SavedChat) -> None:
    keyboard, comm = Keyboard(), session.world.comm
    answerer = Answerer(session, options.sampling, saved.turns)

    def save(messages: list[Message]) -> None:
        if options.session is not None:
            SavedChat(messages, answerer.turn).write(options.session)
            session.engine.save_cache(waits=False)

    conversation = Conversation(answerer.answer, options.system, partial(write, comm), save)
    if not options.quiet:
        keyboard.tell(HELP)
    if saved.messages:
        conversation.messages = saved.messages
        if not options.quiet:
            keyboard.tell(f"{options.session}: goes on after {in_number(len(saved.messages), 'message')}.")
    prompt, advice = "" if options.quiet else "> ", " /reset begins a new conversation."
    converse(conversation, keyboard, prompt, advice, comm.idle)


class Answerer:
    """Answers by an engine; what its cache knows of a conversation is not computed again."""

    def __init__(self, session: Session, sampling: SamplingParams, turn: int = 0):
        self.session = session
        self.sampling = sampling
        self.turn = turn

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        rendered = self.session.chat_template.render_marked(messages)
        request = Request(self.session.tokenizer.encode_marked(rendered), self._sampling())
        yield from pieces_of(self.session, self.session.engine.submit(request))

    def _sampling(self) -> SamplingParams:
        """The sampling options; a given seed gives each turn a seed of its own."""
        self.turn += 1
        if self.sampling.seed is None:
            return self.sampling
        return replace(
            self.sampling, seed=int(np.random.SeedSequence([self.sampling.seed, self.turn]).generate_state(1)[0])
        )
