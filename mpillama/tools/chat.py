"""`chat`: talk to a model; the conversation stays in the KV cache."""

import signal
import sys
from typing import Any

import numpy as np

from mpillama.comm.start import World
from mpillama.engine.answer import Answer
from mpillama.engine.generate import Generation, text_pieces
from mpillama.engine.speculation import Drafter
from mpillama.errors import UserError
from mpillama.options import ChatOptions
from mpillama.text.sampler import Sampler
from mpillama.tools.keyboard import Keyboard
from mpillama.tools.running import Run, after_prompt, check_speculation, loaded, running

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit leaves; Ctrl-C stops an answer."
Message = dict[str, Any]


def chat(options: ChatOptions, world: World) -> int:
    """Run the command; returns the exit status."""
    check_speculation(options)
    # A launcher passes Ctrl-C on to every rank: only rank 0 acts on it, and not before it can answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with running(options, world) as job, loaded(job) as run:
        if run.is_root:
            Conversation(run, options).run()
    return job.status


class Conversation:
    """Messages of a chat and the tokens that the cache holds of them."""

    def __init__(self, run: Run, options: ChatOptions):
        self.run_state = run
        self.drafter = Drafter(options.speculate)
        self.options = options
        self.template = run.chat_template
        self.keyboard = Keyboard()
        self.cached: list[int] = []
        self.turn = 0
        self.messages: list[Message] = []
        self._reset(options.system)

    def run(self) -> None:
        """Answer until the input ends."""
        if not self.options.quiet:
            sys.stderr.write(HELP + "\n")
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
        with self.run_state.world.comm.idle():
            return self.keyboard.line("" if self.options.quiet else "> ")

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name == "/reset":
            self._reset(self._system_message())
        elif name == "/system" and argument:
            self._reset(argument)
        else:
            sys.stderr.write(HELP + "\n")

    def _reset(self, system: str | None) -> None:
        """Begin anew; what the cache shares with the next prompt is kept by itself."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def _system_message(self) -> str | None:
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def _answer(self, text: str) -> None:
        """Stream the answer to a message; a message that does not fit is told and dropped."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._stream(self.run_state.tokenizer.encode_marked(self.template.render_marked(self.messages)))
        except UserError as error:
            self.messages.pop()
            sys.stderr.write(f"mpillama: {error} /reset begins a new conversation.\n")
            return
        self.messages.append({"role": "assistant", "content": answer})

    def _stream(self, prompt_ids: list[int]) -> str:
        """Run what the cache does not hold yet of the prompt, print the answer and return it."""
        run, options = self.run_state, self.options
        keep = common_prefix(self.cached, prompt_ids[:-1])
        run.session.truncate(keep)
        sampler = Sampler(self._sampling(), run.loaded.file.config.vocab_size, prompt_ids)
        answer = Answer(run.tokenizer, options.sampling)
        pieces = text_pieces(run.session, sampler, Generation(prompt_ids, answer), prompt_ids[keep:], self.drafter)
        self.cached = self.cached[:keep]
        for piece in after_prompt(run, pieces):
            run.write(piece)
            if self.keyboard.interrupted:
                sys.stdout.write(" (stopped)")
                break
        sys.stdout.write("\n")
        self.cached = (prompt_ids + answer.token_ids)[: run.session.length]
        return answer.text

    def _sampling(self) -> Any:
        """The sampling options; a given seed gives each turn a seed of its own."""
        options = self.options.sampling
        if options.seed is None:
            return options
        self.turn += 1
        fields = {**vars(options), "seed": int(np.random.SeedSequence([options.seed, self.turn]).generate_state(1)[0])}
        return type(options)(**fields)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many first elements two lists share."""
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared
