"""Many requests at once on rank 0: each step is planned, run on all ranks, and its logits are sampled from."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np

from mpillama.engine.answer import Answer, Mark
from mpillama.engine.block_pool import BlockPool, StatePool
from mpillama.engine.disk_cache import DiskCache
from mpillama.engine.draft_model import DraftModel
from mpillama.engine.executor import Executor, Row
from mpillama.engine.mtp import MtpDrafter, MtpExecutor
from mpillama.engine.pace import Pace, StepLoad
from mpillama.engine.scheduler import ScheduledSequence, Scheduler, load_of
from mpillama.engine.sequence import EngineSequence, Request, check_prompt
from mpillama.engine.speculation import Drafter, PromptLookup
from mpillama.errors import UserError
from mpillama.models.candidates import Candidates
from mpillama.text.sampler import NonFiniteLogits, Sampler, check_bias, check_finite
from mpillama.text.tokenizer import Tokenizer


@dataclass
class Clock:
    """Tokens and seconds of one kind of step."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """0 if nothing ran."""
        return self.tokens / self.seconds if self.seconds else 0.0


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """Add the time of what is done to a clock."""
    start = time.perf_counter()
    yield
    clock.seconds += time.perf_counter() - start


@dataclass
class EngineCounts:
    """What the engine did so far; seconds of rank 0 in whole steps, and in the model.

    `decode` is of steps in which every sequence goes on from a sampled token, `prefill` of all others; drafts that did
    not come true do not count.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    finished: int = 0
    step_seconds: float = 0.0
    prefill: Clock = field(default_factory=Clock)
    decode: Clock = field(default_factory=Clock)

    @property
    def model_seconds(self) -> float:
        return self.prefill.seconds + self.decode.seconds


class Rows:
    """A step's rows, one after the other; no more than a piece of them is held, unless `take_all` fetches the rest."""

    def __init__(self, pieces: Iterator[list[Row]], clock: Clock):
        self.pieces = pieces
        self.clock = clock
        self.held: deque[Row] = deque()

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> Row:
        while not self.held:
            with timed(self.clock):
                piece = next(self.pieces, None)
            if piece is None:
                raise StopIteration
            self.held += piece
        return self.held.popleft()

    def take_all(self) -> None:
        """Compute all that are left."""
        with timed(self.clock):
            for piece in self.pieces:
                self.held += piece


@dataclass(frozen=True)
class Flight:
    """A step that the other ranks know of and this one has not run yet; `rows` of logits that each share has in it."""

    shares: list[ScheduledSequence]
    rows: list[int]
    clock: Clock
    load: StepLoad | None


@dataclass(frozen=True)
class Update:
    """A sequence that went on in a step: the tokens that were sampled and the text that became safe to print.

    `marks` are those of the tokens that the request wants to know the places of.
    """

    sequence: EngineSequence
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    marks: list[Mark] = field(default_factory=list)


class Engine:
    """Runs requests that come and go at any step; each answer has the bits of a run by itself.

    The executor is used by nobody else. `speculate` is the most draft tokens of a sequence in a step, which come from
    the executor's draft model, if it has one, or else from the text. Beside answers under way a step takes as much of
    prompts as keeps it within `max_token_delay` seconds.

    In a pipeline up to one step for each stage is under way, each with other sequences: while one's logits are
    sampled from, and on its way back to the first stage, stages work on the others. Where drafts come from a model,
    whose steps would come in between, there is one.
    """

    def __init__(
        self, executor: Executor, tokenizer: Tokenizer, speculate: int = 0, max_token_delay: float | None = None
    ):
        self.executor = executor
        self.tokenizer = tokenizer
        states = StatePool(executor.states) if executor.states else None
        self.pool = BlockPool(executor.blocks, states, executor.model.part.holders)
        self.drafter = self._make_drafter(speculate) if speculate else None
        self.scheduler = Scheduler(self.pool, executor.slots, executor.max_tokens, executor.max_seq_len, self.drafter)
        self.disk = DiskCache(executor, executor.folder, self.pool) if executor.folder else None
        self.scheduler.disk = self.disk
        self.scheduler.at_once = 1 if isinstance(self.drafter, DraftModel) else executor.ahead
        bound = None if max_token_delay is None else max_token_delay / self.scheduler.at_once
        self.pace = self.scheduler.pace = None if bound is None else Pace(bound)
        self.counts = EngineCounts()
        self.in_step = False
        """Whether a step is being computed, or was left by an exception: the other ranks then wait for its rest."""
        self._number = 0
        self._flights: deque[Flight] = deque()
        self._rows = Rows(iter(()), Clock())
        self._inboxes: dict[int, deque[Update]] = {}

    def _make_drafter(self, most: int) -> Drafter:
        draft = self.executor.draft
        if draft is None:
            return PromptLookup(most)
        make = MtpDrafter if isinstance(draft, MtpExecutor) else DraftModel
        return make(self.executor, self.pool, most)

    @property
    def longest(self) -> int:
        """The most positions of a sequence."""
        return self.executor.max_seq_len

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not (self.scheduler.waiting or self.scheduler.running or self._flights)

    @property
    def load(self) -> int:
        return len(self.scheduler.waiting) + len(self.scheduler.running)

    def submit(self, request: Request) -> EngineSequence:
        """Queue a request; UserError for a prompt that is empty, too long or has ids outside the vocabulary."""
        self.check(request)
        after = request.prompt_ids if request.continues else ()
        answer = Answer(self.tokenizer, request.sampling, request.keep_special, request.marking, after=after)
        size = self.executor.model.config.vocab_size
        sequence = EngineSequence(request, self._number, answer, list(request.prompt_ids), vocab_size=size)
        self._number += 1
        self.scheduler.add(sequence)
        return sequence

    def check(self, request: Request) -> None:
        """UserError for what can never run."""
        vocab_size = self.executor.model.config.vocab_size
        check_prompt(request.prompt_ids, self.longest, vocab_size, request.sampling.room_for(0, 1))
        check_bias(request.sampling.logit_bias, vocab_size)

    def cancel(self, sequence: EngineSequence, reason: str = "cancelled") -> None:
        """End a sequence before its time; nothing happens if it has ended."""
        if not sequence.finished:
            self._end(sequence, reason)

    def run(self, sequence: EngineSequence) -> Iterator[Update]:
        """Step until a sequence has ended, and yield its updates: at least one a step, which may be empty.

        Several such iterators may take turns. A sequence whose iterator is closed early is cancelled. No step is under
        way while the caller has the turn, who may take any time.
        """
        inbox = self._inboxes[sequence.number] = deque()
        try:
            while inbox or not sequence.finished:
                if not inbox:
                    self.step()
                    self.settle()
                yield inbox.popleft() if inbox else Update(sequence)
        finally:
            del self._inboxes[sequence.number]
            self.cancel(sequence)

    def step(self) -> list[Update]:
        """Run one step; returns the sequences that went on. Nothing happens if the engine is idle.

        More steps may be under way afterwards: call it again soon, or `settle`.
        """
        start = time.perf_counter()
        while len(self._flights) < self.scheduler.at_once and self._issue():
            pass
        return self._land(start) if self._flights else []

    def settle(self) -> None:
        """Run the steps that are under way, and begin no others."""
        while self._flights:
            self._land(time.perf_counter())

    def _issue(self) -> bool:
        """Let the ranks begin with a step, if there is something to do that is not under way."""
        drafting = self.drafter.seconds if self.drafter else 0.0
        # Other ranks may draft with this one, or read and write files.
        self.in_step = self.drafter is not None or self.disk is not None
        shares = self.scheduler.schedule()
        if self.disk is not None:
            self.disk.flush()
        self.in_step = False
        if not shares:
            return False
        decodes = all(share.count == 1 and share.sequence.answer.token_ids for share in shares)
        clock = self.counts.decode if decodes else self.counts.prefill
        segments = [share.sequence.segment(share.count, share.drafts, share.states) for share in shares]
        clock.tokens += sum(share.count for share in shares)
        clock.seconds += self.drafter.seconds - drafting if self.drafter else 0.0
        load = load_of(shares, self.scheduler.followed) if self.pace else None
        self.in_step = True
        self.executor.issue(segments)
        self.in_step = False
        self.scheduler.begin(shares)
        self._flights.append(Flight(shares, [segment.logits for segment in segments], clock, load))
        return True

    def _land(self, start: float) -> list[Update]:
        """Run the first step under way, which counts from `start` on, and sample."""
        flight = self._flights.popleft()
        shares, clock = flight.shares, flight.clock
        self.in_step = True
        with timed(clock):
            pieces = self.executor.run()
        self._rows = Rows(pieces, clock)
        updates = list(self._take(flight, self._rows))
        self.in_step = False
        for update in updates:
            clock.tokens += max(0, len(update.token_ids) - 1)
            if (inbox := self._inboxes.get(update.sequence.number)) is not None:
                inbox.append(update)
        self.counts.steps += 1
        seconds = time.perf_counter() - start
        self.counts.step_seconds += seconds
        if self.drafter is not None and clock is self.counts.decode:
            self.drafter.lengths.note_step(seconds, sum(len(share.drafts) for share in shares), len(shares))
        if self.pace is not None and flight.load is not None:
            self.pace.note(flight.load, seconds)
        return updates

    def save_cache(self, waits: bool = True) -> None:
        """Have what is in memory written to files, if there are any; between steps.

        If too much waits to be written, the ranks wait, too, or leave it out.
        """
        if self.disk is not None:
            self.in_step = True
            self.disk.save_all(waits)
            self.in_step = False

    def _take(self, flight: Flight, rows: "Rows") -> Iterator[Update]:
        """Note what was computed and sample where a sequence's last token was among it."""
        token = 0
        for share, count in zip(flight.shares, flight.rows, strict=True):
            sequence, start, row = share.sequence, share.sequence.computed, token
            if not self.scheduler.is_done(share):
                deque(islice(rows, count), maxlen=0)
                token += share.tokens
                continue
            is_last = share.count == sequence.pending
            self._tell_prompt(sequence, islice(rows, sequence.untold_among(share.count)))
            sequence.computed += share.count
            self.counts.computed_tokens += share.tokens
            if sequence.request.pooling:
                pool(sequence, self.executor.hidden_states(token, share.count))
            token += share.tokens
            if is_last and sequence.request.pooling:
                self._end(sequence, "stop")
                yield Update(sequence)
            elif is_last:
                yield self._answer(sequence, list(islice(rows, 1 + len(share.drafts))), share.drafts)
            elif sequence.error:
                self._end(sequence, "error")
                yield Update(sequence)
            if not sequence.finished:
                sequence.publish(self.pool)
            if self.drafter is not None and not sequence.finished:
                self.drafter.note_computed(sequence, row, start)

    def _tell_prompt(self, sequence: EngineSequence, rows: Iterator[Row]) -> None:
        """Pass on the logits that each next token of the prompt would have been chosen from; take all rows."""
        for row in rows:
            assert not isinstance(row, Candidates)  # whole rows were asked for
            sequence.told += 1
            if sequence.error is None and (tell := sequence.request.on_prompt_logits):
                try:
                    check_finite(row)
                except NonFiniteLogits as error:
                    sequence.error = str(error)
                else:
                    tell(row, sequence.request.prompt_ids[sequence.told])

    def _answer(self, sequence: EngineSequence, logits: list[Row], drafts: list[int]) -> Update:
        """Sample, unless the prompt was all that was wanted, or is as much as can be had."""
        if sequence.error is None and sequence.request.sampling.max_tokens != 0:
            return self._sample(sequence, logits, drafts)
        self._end(sequence, "error" if sequence.error else "length")
        return Update(sequence)

    def _sample(self, sequence: EngineSequence, logits: list[Row], drafts: list[int]) -> Update:
        """Sample a token, and one more for each draft that turns out to be that token."""
        tokens, text, marks = [], "", len(sequence.answer.marks)
        for i, row in enumerate(logits):
            try:
                token = self._choose(sequence, row)
            except (NonFiniteLogits, UserError) as error:
                sequence.error = str(error)
                self._end(sequence, "error")
                break
            tokens.append(token)
            sequence.tokens.append(token)
            text += sequence.answer.push(token, self.longest - len(sequence.tokens))
            if sequence.constraint_finished and not sequence.finished:
                text += sequence.answer.finish("stop")
            if sequence.finished:
                self._end(sequence, sequence.answer.finish_reason or "stop")
                break
            if i == len(drafts) or drafts[i] != token:
                break
            sequence.computed += 1
        self._count(sequence, len(drafts), len(tokens))
        return Update(sequence, tokens, text, sequence.answer.marks[marks:])

    def _choose(self, sequence: EngineSequence, row: Row) -> int:
        """Sample a token from logits, within the request's constraint; NonFiniteLogits or UserError if none can be."""
        if isinstance(row, Candidates):
            return self._sampler(sequence).sample_among(row, partial(self._whole_row, row.row))
        constraint = sequence.request.constraint
        token = self._sampler(sequence).sample(row if constraint is None else constraint.masked(row))
        if constraint is not None:
            constraint.accept(token)
        if sequence.request.on_logits is not None:
            sequence.request.on_logits(row, token)
        return token

    def _whole_row(self, number: int) -> np.ndarray:
        """All logits after a token of this step, once the other ranks are done with those that were asked for."""
        self._rows.take_all()
        return self.executor.whole_row(number)

    def _sampler(self, sequence: EngineSequence) -> Sampler:
        return sequence.make_sampler(self.executor.model.config.vocab_size)

    def _count(self, sequence: EngineSequence, drafts: int, tokens: int) -> None:
        self.counts.sampled_tokens += tokens
        if self.drafter is not None:
            self.drafter.note(sequence, drafts, tokens)

    def _end(self, sequence: EngineSequence, reason: str) -> None:
        """Free what the sequence holds; its full blocks stay known for others."""
        if sequence.slot is not None:
            sequence.publish(self.pool)
        self.scheduler.remove(sequence)
        sequence.sampler = None
        if not sequence.finished:
            sequence.answer.finish(reason)
            sequence.answer.finish_reason = reason
        self.counts.finished += 1
        self.counts.prompt_tokens += len(sequence.request.prompt_ids)
        self.counts.cached_tokens += sequence.cached_tokens or 0


def pool(sequence: EngineSequence, states: np.ndarray) -> None:
    """Add hidden states float32 [tokens, hidden_size] to a sequence's embedding, which is ready after the last ones."""
    states = states.astype(np.float64)
    is_first = sequence.computed == len(states)  # also after a preemption
    if sequence.pooled is None or is_first or sequence.request.pooling == "last":
        sequence.pooled = np.zeros(states.shape[1])
    for state in states if sequence.request.pooling == "mean" else states[-1:]:
        sequence.pooled += state  # one after the other, so that chunks do not change the bits
    if not sequence.pending:
        sequence.pooled /= np.sqrt(np.cumsum(sequence.pooled**2)[-1])  # not sum(), whose order depends on the processor
