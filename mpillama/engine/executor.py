"""Steps on all ranks: rank 0 says what goes through the model, the others follow."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import cast

import numpy as np
import psutil

from mpillama.comm.communicator import Communicator
from mpillama.engine.cache_folder import CacheFolder, Place
from mpillama.engine.step_parts import StepParts
from mpillama.models.cache import KVCache, Step, blocks_for, dealt_blocks, held_blocks, joint_step
from mpillama.models.candidates import WHOLE, Candidates, Wanted
from mpillama.models.decoder import Decoder
from mpillama.text.tokenizer import check_token_ids

HEADER = 6
"""Numbers at the beginning of the message: order, tokens (or exit status, or row), segments (or how many steps ago),
block ids, in how many parts the step goes through layers, and how many micro-batches through stages."""
FIELDS = 8
"""Numbers of a segment: slot, first position, tokens, rows of logits, first table place, new block ids, candidates,
temperature (the bits of a float64)."""
STATE_FIELDS = 2
"""With recurrent layers also: the state slot that is read, and the one that is written."""
NOWHERE = -1
"""No state slot."""
PLACE_FIELDS = 3
"""Numbers of a place of the cache: block, or -1 - state slot; and the digest, 16 bytes."""


class Order(IntEnum):
    """What a message asks for."""

    FORWARD = 1
    END = 2
    REPORT_MEMORY = 3
    LOGITS = 4
    SAVE = 5
    LOAD = 6
    DRAFT = 7


@dataclass(frozen=True)
class SegmentStates:
    """Where recurrent layers have the state of a sequence: the slot before a segment (-1 is none yet) and behind it.

    `snapshots` are more slots, each with the index of the token after which it is written, in ascending order.
    """

    read: int
    write: int
    snapshots: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Segment:
    """New tokens of one sequence, from position `start` on, with the logits after the last `logits` of them, or what
    is `wanted` of these.

    `slot` is the sequence's row in the block tables, which every rank keeps; `blocks` are written into that row from
    place `table_start` on before the step. Without tokens only the table is written. Without `states` the state of a
    model that has one is in state slot `slot`.
    """

    slot: int
    start: int
    token_ids: Sequence[int] | np.ndarray
    logits: int = 0
    table_start: int = 0
    blocks: Sequence[int] | np.ndarray = ()
    states: SegmentStates | None = None
    wanted: Wanted = WHOLE

    @property
    def state_slots(self) -> SegmentStates:
        return self.states or SegmentStates(self.slot if self.start else NOWHERE, self.slot)


class StepPlan:
    """The message's buffer, int64, of a size fixed by the most tokens and sequences of a step: no pickling, no sizes.

    `tables` int64 [slots, blocks of the longest sequence] are the block tables of this rank. Of a model that has
    `states` slots for recurrent states the message also says where states are; a token has at most one slot of its own.
    """

    def __init__(self, max_tokens: int, slots: int, max_seq_len: int, states: int = 0):
        self.max_tokens = max_tokens
        self.slots = slots
        self.states = states
        self.has_state = has_state = states > 0
        self.max_blocks = blocks_for(max_tokens) + 2 * slots
        self.fields = FIELDS + STATE_FIELDS * has_state
        size = HEADER + self.fields * slots + max_tokens + self.max_blocks
        self.buffer = np.zeros(size + max_tokens * has_state, np.int64)
        self.snapshots = self.buffer[size:]
        """Of each token the slot that its state is written to, or -1."""
        self.tables = np.zeros((slots, blocks_for(max_seq_len)), np.int64)
        # What was never written must not be read; a slot that has no such block keeps pointing at block 0.

    # -- rank 0 ----------------------------------------------------------------------------------------------------

    def write_order(self, order: Order, status: int = 0, ago: int = 0) -> None:
        """Make the message an order without a step."""
        self.buffer[:HEADER] = order, status, ago, 0, 1, 1

    def fit(self, segments: Sequence[Segment]) -> tuple[list[Segment], list[Segment]]:
        """Split off blocks that do not fit one message: segments of blocks alone, each a message, and the rest.

        A step needs few new blocks, unless a sequence begins with a long text that the cache knows.
        """
        before, rest, room = [], [], self.max_blocks
        for s in segments:
            while len(s.blocks) > room:
                first, later = s.blocks[: self.max_blocks], s.blocks[self.max_blocks :]
                before.append(Segment(s.slot, 0, (), 0, s.table_start, first))
                s = replace(s, table_start=s.table_start + len(first), blocks=later)
            room -= len(s.blocks)
            rest.append(s)
        return before, rest

    def write(self, segments: Sequence[Segment], parts: int = 1, micro: int = 1) -> None:
        """Make the message a step; ValueError if it does not hold that many tokens, sequences or blocks, or for a place
        in a table or a state slot that there is not.
        """
        ids = np.concatenate([np.asarray(s.token_ids, np.int64) for s in segments])
        blocks = [block for s in segments for block in s.blocks]
        if len(ids) > self.max_tokens or len(segments) > self.slots or len(blocks) > self.max_blocks:
            raise ValueError(f"a step of {len(ids)} tokens, {len(segments)} sequences, {len(blocks)} new blocks")
        last = max((s.table_start + len(s.blocks) for s in segments), default=0)
        if last > self.tables.shape[1]:
            raise ValueError(f"a step of a sequence with {last} blocks, in tables for {self.tables.shape[1]}")
        self.buffer[:HEADER] = Order.FORWARD, len(ids), len(segments), len(blocks), parts, micro
        at = HEADER + self.fields * len(segments)
        fields = self.buffer[HEADER:at].reshape(len(segments), self.fields)
        fields[:, :FIELDS] = [
            (s.slot, s.start, len(s.token_ids), s.logits, s.table_start, len(s.blocks), *_numbers(s.wanted))
            for s in segments
        ]
        self.buffer[at : at + len(ids)] = ids
        self.buffer[at + len(ids) : at + len(ids) + len(blocks)] = blocks
        if self.has_state:
            self._write_states(segments, fields)

    def _write_states(self, segments: Sequence[Segment], fields: np.ndarray) -> None:
        self.snapshots[:] = NOWHERE
        first = 0
        for s, numbers in zip(segments, fields, strict=True):
            states = s.state_slots
            numbers[FIELDS:] = states.read, states.write
            for index, slot in states.snapshots:
                self.snapshots[first + index] = slot
            first += len(s.token_ids)
        last = max(int(fields[:, FIELDS:].max(initial=NOWHERE)), int(self.snapshots.max()))
        if last >= self.states:
            raise ValueError(f"a step that writes state slot {last} of {self.states}")

    @property
    def most_places(self) -> int:
        """How many places of the cache one message names."""
        return (len(self.buffer) - HEADER) // PLACE_FIELDS

    def write_places(self, order: Order, places: Sequence[Place], stamp: int = 0, waits: bool = False) -> None:
        """Make the message an order to save or to load blocks and states."""
        self.buffer[:HEADER] = order, len(places), stamp, waits, 0, 0
        numbers = self.buffer[HEADER : HEADER + PLACE_FIELDS * len(places)].reshape(-1, PLACE_FIELDS)
        for to, place in zip(numbers, places, strict=True):
            to[0] = place.number if place.kind == "block" else -1 - place.number
            to[1:] = np.frombuffer(place.digest, np.int64)

    # -- all ranks -------------------------------------------------------------------------------------------------

    def places(self) -> Iterator[Place]:
        """Those of an order to save or to load."""
        numbers = self.buffer[HEADER : HEADER + PLACE_FIELDS * int(self.buffer[1])].reshape(-1, PLACE_FIELDS)
        for number, *digest in numbers.tolist():
            name = np.array(digest, np.int64).tobytes()
            yield Place("block", number, name) if number >= 0 else Place("state", -1 - number, name)

    @property
    def order(self) -> int:
        return int(self.buffer[0])

    @property
    def status(self) -> int:
        """The exit status of an END, the row of LOGITS."""
        return int(self.buffer[1])

    @property
    def ago(self) -> int:
        """Of LOGITS, how many steps were run since."""
        return int(self.buffer[2])

    @property
    def parts(self) -> int:
        """In how many parts the step goes through layers."""
        return int(self.buffer[4])

    @property
    def micro_batches(self) -> int:
        """In how many parts the step goes through stages."""
        return int(self.buffer[5])

    def wanted(self) -> list[Wanted]:
        """What is wanted of each row of logits of the step."""
        at = HEADER + self.fields * int(self.buffer[2])
        fields = self.buffer[HEADER:at].reshape(-1, self.fields)
        of_segments = [
            Wanted(int(count), float(temperature))
            for count, temperature in zip(fields[:, 6], fields[:, 7].copy().view(np.float64), strict=True)
        ]
        return [w for w, rows in zip(of_segments, fields[:, 3].tolist(), strict=True) for _ in range(rows)]

    def step(self) -> Step:
        """Write the message's blocks into the tables and return the step that it describes."""
        tokens, count = (int(n) for n in self.buffer[1:3])
        at = HEADER + self.fields * count
        fields = self.buffer[HEADER:at].reshape(count, self.fields)
        self._write_tables(fields, self.buffer[at + tokens :])
        fields = fields[fields[:, 2] > 0]
        slots, starts, counts, logits = fields[:, 0], fields[:, 1], fields[:, 2], fields[:, 3]
        width = blocks_for(int((starts + counts).max())) if len(fields) else 0
        ids, tables = self.buffer[at : at + tokens], self.tables[slots, :width]
        if not self.has_state:
            return joint_step(ids, starts, counts, logits, tables)
        rows = np.flatnonzero(self.snapshots >= 0)
        snapshots = np.stack([rows, self.snapshots[rows]], axis=1)
        return joint_step(ids, starts, counts, logits, tables, fields[:, FIELDS:].copy(), snapshots)

    def _write_tables(self, fields: np.ndarray, blocks: np.ndarray) -> None:
        first = 0
        for slot, _, _, _, place, count in fields[fields[:, 5] > 0, :6].tolist():
            self.tables[slot, place : place + count] = blocks[first : first + count]
            first += count


def _numbers(wanted: Wanted) -> tuple[int, int]:
    return wanted.count, int(np.float64(wanted.temperature).view(np.int64))


Row = np.ndarray | Candidates
"""After one position: logits float32 [vocab_size], or the likeliest tokens."""
STAMP_STEP = 1000
"""Nanoseconds between the times at which two places are said to have been used."""
LOGIT_BYTES = 32 << 20
"""Logits that a rank holds at once where a step wants those of many positions."""


class Executor:
    """A model and a cache for up to `slots` sequences of up to `max_seq_len` positions, steps of up to `max_tokens`.

    The cache has `blocks` blocks, which rank 0 gives to sequences with the segments; without that number each slot has
    the blocks that it may need, and none need be given. A model with recurrent layers has `states` state slots, by
    default one more than sequences. On rank 0 call forward, memory_per_rank and end; on the other ranks call follow
    once. `draft` is the executor of a draft model on the ranks that hold it: all, or rank 0 alone.

    Rank 0 may issue up to `ahead` steps before it runs the first of them, so that no stage of a pipeline is idle.
    """

    def __init__(
        self, model: Decoder, max_seq_len: int, kv_type: str, max_tokens: int, slots: int = 1,
        blocks: int | None = None, states: int = 0,
    ):  # fmt: skip
        self.model = model
        self.comm: Communicator = model.all_ranks
        self.pipeline = model.pipeline
        self.ahead = 1 if model.pipeline is None else model.pipeline.stages
        self.max_seq_len = max_seq_len
        self.max_tokens = max_tokens
        self.slots = slots
        self.states = max(states, slots + 1) if model.config.has_state else 0
        self.plan = StepPlan(max_tokens, slots, max_seq_len, self.states)
        if blocks is None:
            holders = model.part.holders
            blocks = held_blocks(max_seq_len, holders) * holders * slots
            self.plan.tables[:] = dealt_blocks(slots, max_seq_len, holders)
        self.blocks = blocks
        self.piece = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
        self.abandoned = False
        self.draft: Executor | None = None
        self.step_parts = StepParts(model.most_parts)
        self.cache = KVCache(model.config, model.part, blocks, kv_type, self.states)
        self.folder: CacheFolder | None = None
        """Where this rank keeps what leaves its memory, on all ranks or on none."""
        self._issued: deque[list[list[Segment]]] = deque()
        """Steps that are still to be run, of each its messages."""
        self._ran: deque[list[Row]] = deque()
        """The rows of steps that had to be run before anybody wanted them."""
        self._ago = 0
        """How many steps were run since the one whose rows were asked for last."""

    # -- rank 0 ----------------------------------------------------------------------------------------------------

    def forward(self, segments: Sequence[Segment]) -> np.ndarray:
        """Run a step and return whole rows of logits, float32 [rows, vocab_size], in the order of the segments.

        UserError for a token that the model does not have; nothing is run then.
        """
        rows = [row for piece in self.forward_in_pieces(segments) for row in piece]
        return np.stack(cast(list[np.ndarray], rows)) if rows else self._no_logits()

    def forward_in_pieces(self, segments: Sequence[Segment]) -> Iterator[list[Row]]:
        """Run a step, with none issued before, and return its rows as `run` does. UserError as for forward."""
        self.issue(segments)
        return self.run()

    def issue(self, segments: Sequence[Segment]) -> None:
        """Say what the next step is; UserError as for forward. It may not depend on steps that are still to be run."""
        for segment in segments:
            check_token_ids(segment.token_ids, self.model.config.vocab_size)
        blocks_first, rest = self.plan.fit(segments)
        messages = [*([segment] for segment in blocks_first), rest]
        self._issued.append(messages)
        if self.pipeline is not None:
            for message in messages:
                self._write(message)
                self.pipeline.issue(self.plan.buffer)

    def run(self) -> Iterator[list[Row]]:
        """Run the first step that was issued; returns what is wanted of its rows of logits, up to `piece` at a time.

        Take them all, since all ranks compute them together.
        """
        self._ago = max(0, len(self._ran) - 1)
        return iter([self._ran.popleft()]) if self._ran else self._run_next()

    def _run_next(self) -> Iterator[list[Row]]:
        *before, last = self._issued.popleft()
        for message in before:
            deque(self._run(message), maxlen=0)
        return self._run(last)

    def _run_all(self) -> None:
        """Run what was issued, since the next order comes behind it on all ranks."""
        while self._issued:
            self._ran.append([row for piece in self._run_next() for row in piece])
            self._ago += 1

    def hidden_states(self, first: int, count: int) -> np.ndarray:
        """The last hidden states of tokens of the step that was run last, float32 [count, hidden_size]."""
        return self.model.hidden_states(first, count, self._ago)

    def _no_logits(self) -> np.ndarray:
        return np.empty((0, self.model.config.vocab_size), np.float32)

    def whole_row(self, row: int) -> np.ndarray:
        """All logits after a token of the step that was run last, whose pieces were all taken: float32 [vocab_size]."""
        self._run_all()
        self._order(Order.LOGITS, row, self._ago)
        logits: np.ndarray = self.model.logits(np.array([row]), self._ago)[0]
        return logits

    def _write(self, segments: Sequence[Segment]) -> None:
        tokens = sum(len(s.token_ids) for s in segments)
        micro = max(1, self.model.micro_batches(tokens) // max(1, len(self._issued)))
        self.plan.write(segments, self.step_parts.choose(tokens), micro)

    def _run(self, segments: Sequence[Segment]) -> Iterator[list[Row]]:
        if self.pipeline is None:
            self._write(segments)
            self._tell()
        else:
            self.pipeline.take(self.plan.buffer)
        return self._execute()

    def _tell(self) -> None:
        """Give the others the message, which all take part in now."""
        if self.pipeline is not None:
            self.pipeline.issue(self.plan.buffer)
        self._hear()

    def _hear(self) -> None:
        """Take the next message."""
        if self.pipeline is None:
            self.comm.broadcast_plan(self.plan.buffer)
        else:
            self.pipeline.take(self.plan.buffer)

    def save(self, places: Sequence[Place], stamp: int, waits: bool = False) -> None:
        """Let every rank write blocks and states to files, those last used first: at `stamp`, in ns.

        Files are written later; what is too much for that is dropped, unless the ranks shall wait.
        """
        self._run_all()
        for batch in self._batches(places):
            self.plan.write_places(Order.SAVE, batch, stamp, waits)
            self._tell()
            self._save()
            stamp -= STAMP_STEP * len(batch)

    def load(self, places: Sequence[Place]) -> int:
        """Fill blocks and states from files; returns how many of the first ones every rank has filled."""
        done = 0
        self._run_all()
        for batch in self._batches(places):
            self.plan.write_places(Order.LOAD, batch)
            self._tell()
            found = self._load()
            done += found
            if found < len(batch):
                break
        return done

    def _batches(self, places: Sequence[Place]) -> Iterator[Sequence[Place]]:
        most = self.plan.most_places
        return (places[first : first + most] for first in range(0, len(places), most))

    def end(self, status: int) -> None:
        """Let the other ranks leave follow() with an exit status; nothing happens if they have given up."""
        if not self.abandoned:
            self._order(Order.END, status)
        self._close_folder()

    def begin_drafts(self) -> None:
        """Let the other ranks follow the draft model's executor until that ends."""
        self._order(Order.DRAFT)

    def memory_per_rank(self) -> list[int]:
        """Resident bytes of every rank's process, in order of rank."""
        self._order(Order.REPORT_MEMORY)
        return self._gather_memory()

    def _order(self, order: Order, status: int = 0, ago: int = 0) -> None:
        self._run_all()
        self.plan.write_order(order, status, ago)
        self._tell()

    # -- all ranks -------------------------------------------------------------------------------------------------

    def follow(self, patient: bool = False) -> int:
        """Execute rank 0's plans until it ends; returns the exit status. The `patient` wait for each for ever."""
        while True:
            if patient:
                self.comm.watch.allow_silence()
            self._hear()
            if self.plan.order == Order.END:
                self._close_folder()
                return self.plan.status
            if self.plan.order == Order.REPORT_MEMORY:
                self._gather_memory()
            elif self.plan.order == Order.DRAFT and self.draft is not None:
                self.draft.follow(patient)
            elif self.plan.order == Order.LOGITS:
                self.model.logits(np.array([self.plan.status]), self.plan.ago)
            elif self.plan.order == Order.SAVE:
                self._save()
            elif self.plan.order == Order.LOAD:
                self._load()
            else:
                deque(self._execute(), maxlen=0)

    def _execute(self) -> Iterator[list[Row]]:
        """Run the step; its logits are computed as they are taken."""
        step, wanted = self.plan.step(), self.plan.wanted()
        if len(step.token_ids):
            start = time.perf_counter()
            self.model.advance(step, self.cache, self.plan.parts, self.plan.micro_batches)
            self.step_parts.note(len(step.token_ids), self.plan.parts, time.perf_counter() - start)
        starts = range(0, len(step.logit_rows), self.piece)
        pieces = (slice(first, first + self.piece) for first in starts)
        return (self.model.wanted_logits(step.logit_rows[piece], wanted[piece]) for piece in pieces)

    def _save(self) -> None:
        assert self.folder is not None
        stamp, waits = int(self.plan.buffer[2]), bool(self.plan.buffer[3])
        for i, place in enumerate(self.plan.places()):
            self.folder.save(place, stamp - STAMP_STEP * i, self.get_on if waits else None)
            self.get_on()

    def _load(self) -> int:
        """How many of the first places all ranks have filled; once a rank cannot write any more, none writes."""
        assert self.folder is not None
        done = 0
        for place in self.plan.places():
            if not self.folder.load(place):
                break
            done += 1
            self.get_on()
        found = self.comm.gather((done, self.folder.off), "the reading of cached blocks")
        self.folder.off = any(off for _, off in found)
        return min(done for done, _ in found)

    def abandon(self) -> None:
        """Give up after a step that not all ranks will finish: this rank can but leave, and keeps no thread at work."""
        self.abandoned = True
        for communicator in {self.comm, self.model.comm}:
            communicator.abandon_sums()
        if self.folder is not None:
            self.folder.abandon()
        if self.draft is not None:
            self.draft.abandon()

    def _close_folder(self) -> None:
        if self.folder is not None:
            self.folder.close(self.get_on)

    def get_on(self) -> None:
        """Show the others that this rank works on."""
        self.comm.watch.work += 1
        self.comm.watch.answer()

    def _gather_memory(self) -> list[int]:
        return self.comm.gather(int(psutil.Process().memory_info().rss))
