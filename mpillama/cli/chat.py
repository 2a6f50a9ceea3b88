"""`chat`: talk to a model; the conversation stays in the KV cache."""

import signal
from collections.abc import Generator
from dataclasses import replace
from functools import partial

import numpy as np

from mpillama.cli.conversation import HELP, Conversation, Message, converse
from mpillama.cli.keyboard import Keyboard
from mpillama.cli.options import ChatOptions
from mpillama.cli.running import loaded, pieces_of, running, write
from mpillama.engine.sequence import Request
from mpillama.job.start import World
from mpillama.loading.session import Session
from mpillama.text.sampling_params import SamplingParams


def chat(options: ChatOptions, world: World) -> int:
    # A launcher passes Ctrl-C on to every rank: only rank 0 acts on it, and not before it can answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with running(options, world) as job, loaded(job) as session:
        if session.is_root:
            _chat(session, options)
    return job.status


def _chat(session: Session, options: ChatOptions) -> None:
    keyboard, comm = Keyboard(), session.world.comm
    conversation = Conversation(Answerer(session, options.sampling).answer, options.system, partial(write, comm))
    if not options.quiet:
        keyboard.tell(HELP)
    prompt, advice = "" if options.quiet else "> ", " /reset begins a new conversation."
    converse(conversation, keyboard, prompt, advice, comm.idle)


class Answerer:
    """Answers by an engine; what its cache knows of a conversation is not computed again."""

    def __init__(self, session: Session, sampling: SamplingParams):
        self.session = session
        self.sampling = sampling
        self.turn = 0

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        rendered = self.session.chat_template.render_marked(messages)
        request = Request(self.session.tokenizer.encode_marked(rendered), self._sampling())
        yield from pieces_of(self.session, self.session.engine.submit(request))

    def _sampling(self) -> SamplingParams:
        """The sampling options; a given seed gives each turn a seed of its own."""
        if self.sampling.seed is None:
            return self.sampling
        self.turn += 1
        return replace(
            self.sampling, seed=int(np.random.SeedSequence([self.sampling.seed, self.turn]).generate_state(1)[0])
        )
