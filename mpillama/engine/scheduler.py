"""Which sequences' tokens make the next step: first come, first served, under a budget of tokens and cache blocks."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mpillama.engine.block_pool import BlockPool
from mpillama.engine.disk_cache import DiskCache
from mpillama.engine.executor import SegmentStates
from mpillama.engine.pace import Pace, StepLoad, seen
from mpillama.engine.recurrent_state import RecurrentState
from mpillama.engine.sequence import EngineSequence
from mpillama.engine.speculation import Drafter
from mpillama.models.attention import BLOCK_POSITIONS
from mpillama.models.cache import blocks_for
from mpillama.models.partition import steps_at_once


@dataclass(frozen=True)
class ScheduledSequence:
    """A sequence's part of a step: its next `count` tokens, and drafts of those to come; and its state slots."""

    sequence: EngineSequence
    count: int
    drafts: list[int]
    states: SegmentStates | None = None

    @property
    def tokens(self) -> int:
        return self.count + len(self.drafts)


def load_of(shares: Iterable[ScheduledSequence], followed: float = 0.0) -> StepLoad:
    """What the sequences' parts of a step make up together; `followed` is that of StepLoad."""
    answers = prompts = positions = 0
    for share in shares:
        positions += seen(share.sequence.computed, share.tokens)
        if share.sequence.answer.token_ids and share.count == 1:
            answers += share.tokens
        else:
            prompts += share.tokens
    return StepLoad(answers, prompts, positions, followed)


class Scheduler:
    """Sequences that wait, oldest first, and those that run, each in a slot.

    A step holds a token of every running sequence that decodes, then prompts in chunks, up to `max_tokens` together, or
    as many as the `pace` of those that decode allows.
    No sequence becomes longer than `longest` positions.
    When blocks run out the youngest running sequence gives its own back and is computed again later.
    What `disk` has of a text comes into the pool before its sequence runs, a piece between two steps of others.
    With up to several steps `at_once` each has its part of the sequences that decode; a sequence is in one of them.
    """

    def __init__(self, pool: BlockPool, slots: int, max_tokens: int, longest: int, drafter: Drafter | None = None):
        self.pool = pool
        self.max_tokens = max_tokens
        self.longest = longest
        self.drafter = drafter
        self.disk: DiskCache | None = None
        self.pace: Pace | None = None
        self.waiting: deque[EngineSequence] = deque()
        self.running: list[EngineSequence] = []
        self.preemptions = 0
        self.followed = 0.0
        """Of the latest step, as in StepLoad."""
        self.at_once = 1
        self._under_way: dict[int, ScheduledSequence] = {}
        self._slots = list(range(slots - 1, -1, -1))
        self._shares: dict[int, ScheduledSequence] = {}
        self._paced = False
        """Whether the step got less of a prompt than there was, so that answers need not wait longer."""

    def add(self, sequence: EngineSequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: EngineSequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._give_back(sequence)

    def begin(self, shares: Iterable[ScheduledSequence]) -> None:
        """Note that a step is under way."""
        self._under_way |= {share.sequence.number: share for share in shares}

    def is_done(self, share: ScheduledSequence) -> bool:
        """Note that a step was run; whether its sequence still wants what it computed: not if it left meanwhile."""
        if self._under_way.get(share.sequence.number) is not share:
            return False
        del self._under_way[share.sequence.number]
        return True

    def schedule(self) -> list[ScheduledSequence]:
        """Choose the next step; empty if nothing waits or runs."""
        self._shares = {}
        self._paced = False
        before = self.preemptions
        if self.drafter is not None:
            self.followed = self.drafter.followed()
            self.drafter.lengths.begin(len(self.running))
        for sequence in self._by_urgency():
            if sequence.slot is not None:  # else it left just now, for an older one
                self._schedule(sequence)
        while self._admissible() and self.preemptions == before and self._admit(self.waiting[0]):
            self._schedule(self.running[-1])
        shares = list(self._shares.values())
        if self.drafter is not None:
            self.drafter.paced = self.pace is not None and load_of(shares).answers > 0
            self.drafter.fill(shares)
        return shares if self.pool.states is None else [self._with_states(share) for share in shares]

    def _with_states(self, share: ScheduledSequence) -> ScheduledSequence:
        """Add state slots, once it is certain which sequences are in the step; drafts that get none are left out."""
        assert self.pool.states is not None
        drafts = share.drafts[: self.pool.states.available]
        return replace(share, drafts=drafts, states=share.sequence.plan_states(share.count, len(drafts)))

    def _admissible(self) -> bool:
        return bool(self._budget() and self._slots and self.waiting and not self._paced)

    def _budget(self) -> int:
        """Tokens that the step still has room for."""
        return self.max_tokens - sum(share.tokens for share in self._shares.values())

    def _by_urgency(self) -> Iterator[EngineSequence]:
        """Running sequences: those that decode, then those with a prompt to compute, each by age."""
        free = [s for s in self.running if s.number not in self._under_way]
        decoding = sum(s.pending == 1 for s in self.running)
        yield from [s for s in free if s.pending == 1][: -(-decoding // steps_at_once(decoding, self.at_once))]
        yield from [s for s in free if s.pending > 1]

    def _schedule(self, sequence: EngineSequence) -> None:
        """Give the sequence its share, with the blocks that it needs; nothing if the step is full."""
        count = self._chunk(sequence)
        if not count or not self._provide(sequence, count):
            return
        drafts = self._drafts(sequence, count)
        self._extend(sequence, count + len(drafts))
        self._shares[sequence.number] = ScheduledSequence(sequence, count, drafts)

    def _chunk(self, sequence: EngineSequence) -> int:
        """How many of its pending tokens the step takes."""
        count = min(sequence.pending, self._budget())
        if self.pace is None or sequence.pending == 1:
            return count
        load = load_of(self._shares.values(), self.followed)
        # Answers in steps under way wait for this one, too.
        load = replace(load, answers=load.answers + load_of(self._under_way.values()).answers)
        allowed = self.pace.prompt_tokens(load, sequence.computed, count)
        self._paced |= allowed < count
        return allowed

    def _drafts(self, sequence: EngineSequence, count: int) -> list[int]:
        """Guesses for which there is room in the step, the answer, and the blocks that nobody uses."""
        if self.drafter is None or count < sequence.pending or not sequence.request.speculate:
            return []
        drafts = self.drafter.reserve(sequence, min(self._budget() - count, self._draft_room(sequence)))
        while drafts and not self._has_room(sequence, count + len(drafts)):
            drafts.pop()
        return drafts

    def _draft_room(self, sequence: EngineSequence) -> int:
        """How many drafts have a place in the context and can come true: the last token is sampled, never computed."""
        left = self.longest - len(sequence.tokens)
        return min(left, sequence.request.sampling.room_for(len(sequence.answer.token_ids), left + 1) - 1)

    def _provide(self, sequence: EngineSequence, count: int) -> bool:
        """Make sure that blocks for `count` tokens are available; False if the sequence itself had to leave."""
        while not self._has_room(sequence, count):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _extend(self, sequence: EngineSequence, tokens: int) -> None:
        self.pool.extend(sequence.blocks, sequence.blocks_needed(tokens))

    def _has_room(self, sequence: EngineSequence, tokens: int) -> bool:
        return self.pool.has_room(sequence.blocks, sequence.blocks_needed(tokens))

    def _preempt(self, sequence: EngineSequence) -> None:
        """Send the youngest running sequence back to the queue, where all others are younger still."""
        self.running.remove(sequence)
        self._shares.pop(sequence.number, None)
        self._give_back(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: EngineSequence) -> None:
        assert sequence.slot is not None
        self._under_way.pop(sequence.number, None)
        self._slots.append(sequence.slot)
        sequence.leave(self.pool)

    def _admit(self, sequence: EngineSequence) -> bool:
        """Give the oldest waiting sequence a slot and what the cache knows of its text, if its tokens have room."""
        digests, room = sequence.prefix_digests(), sequence.request.sampling.room_for(0, 1)
        needed = blocks_for(len(sequence.tokens) + room)
        if self.disk is not None:
            sequence.fetch = sequence.fetch or self.disk.begin(digests)
            if self.disk.go_on(sequence.fetch, digests, needed, at_once=not (self._shares or self._under_way)):
                return False
        found = self.pool.find(digests)
        if self.pool.states is not None:
            sequence.state = RecurrentState.begin(self.pool.states, digests[: len(found)], sequence.last_reusable)
            if sequence.state is None:
                self.pool.release(found)
                return False
            self.pool.release(found[sequence.state.first_block :])
            found = found[: sequence.state.first_block]
        if not self.pool.has_room(found, needed - len(found)):
            self.pool.release(found)
            sequence.leave_state()
            return False
        self.waiting.popleft()
        sequence.slot = self._slots.pop()
        sequence.blocks = found
        sequence.computed = len(found) * BLOCK_POSITIONS
        sequence.published = len(found)
        sequence.last_digest = digests[len(found) - 1] if found else sequence.last_digest
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
        self.running.append(sequence)
        return True
