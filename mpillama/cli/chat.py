"""`chat`: talk to a model; the conversation stays in the KV cache."""

import signal
import sys
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from mpillama.cli.keyboard import Keyboard
from mpillama.cli.options import ChatOptions
from mpillama.cli.running import loaded, pieces_of, running, write
from mpillama.engine.sequence import Request
from mpillama.errors import UserError
from mpillama.job.start import World
from mpillama.loading.session import Session
from mpillama.text.sampling_params import SamplingParams

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit leaves; Ctrl-C stops an answer."
Message = dict[str, Any]


def chat(options: ChatOptions, world: World) -> int:
    # A launcher passes Ctrl-C on to every rank: only rank 0 acts on it, and not before it can answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with running(options, world) as job, loaded(job) as session:
        if session.is_root:
            Conversation(session, options).run()
    return job.status


class Conversation:
    """Messages of a chat, and the engine whose cache knows what was said before."""

    def __init__(self, session: Session, options: ChatOptions):
        self.session = session
        self.options = options
        self.keyboard = Keyboard()
        self.turn = 0
        self.messages: list[Message] = []
        self._reset(options.system)

    def run(self) -> None:
        """Answer until the input ends."""
        if not self.options.quiet:
            self.keyboard.tell(HELP)
        with self.keyboard.listening():
            while (line := self._line()) is not None:
                text = line.strip()
                if text == "/quit":
                    break
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self._answer(text)

    def _line(self) -> str | None:
        with self.session.world.comm.idle():
            return self.keyboard.line("" if self.options.quiet else "> ")

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name == "/reset":
            self._reset(self._system_message())
        elif name == "/system" and argument:
            self._reset(argument)
        else:
            self.keyboard.tell(HELP)

    def _reset(self, system: str | None) -> None:
        """Start a new conversation; the cache keeps whatever the next prompt shares with it."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def _system_message(self) -> str | None:
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def _answer(self, text: str) -> None:
        """Stream the answer to a message; one that does not fit is reported and dropped."""
        self.messages.append({"role": "user", "content": text})
        try:
            rendered = self.session.chat_template.render_marked(self.messages)
            answer = self._stream(self.session.tokenizer.encode_marked(rendered))
        except UserError as error:
            self.messages.pop()
            self.keyboard.tell(f"mpillama: {error} /reset begins a new conversation.")
            return
        self.messages.append({"role": "assistant", "content": answer})

    def _stream(self, prompt_ids: list[int]) -> str:
        """Print the answer as it comes and return it; what the cache knows of the prompt is not computed again."""
        sequence = self.session.engine.submit(Request(prompt_ids, self._sampling()))
        with closing(pieces_of(self.session, sequence)) as pieces:
            answer = ""
            for piece in pieces:
                write(self.session.world.comm, piece)
                answer += piece
                if self.keyboard.interrupted:
                    sys.stdout.write(" (stopped)")
                    break
        sys.stdout.write("\n")
        return answer

    def _sampling(self) -> SamplingParams:
        """The sampling options; a given seed gives each turn a seed of its own."""
        params = self.options.sampling
        if params.seed is None:
            return params
        self.turn += 1
        return replace(params, seed=int(np.random.SeedSequence([params.seed, self.turn]).generate_state(1)[0]))
