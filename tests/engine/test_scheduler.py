"""The scheduler alone: whatever comes and goes, no block is lost, nobody waits for ever, the budget is kept."""

from collections import Counter
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillama.engine import block_pool
from mpillama.engine.answer import Answer
from mpillama.engine.block_pool import NO_TOKENS, BlockPool, StatePool, prefix_digests, salt_digest
from mpillama.engine.executor import SegmentStates
from mpillama.engine.pace import LEAST_TOKENS, Pace
from mpillama.engine.scheduler import ScheduledSequence, Scheduler
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.engine.speculation import PromptLookup, last_occurrence
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer
from tests import tiny_models as models

SLOTS, BUDGET, BLOCKS = 4, 48, 8
LONGEST = 64 * BLOCKS
TOKENIZER = Tokenizer(models.toy_tokenizer(), bos_token_id=models.BOS, eos_token_ids=(), add_bos=True)


class Simulation:
    """Requests whose answers are known beforehand, run by the scheduler without a model."""

    def __init__(self, drafts: int = 0, states: int = 0, blocks: int = BLOCKS, holders: int = 1, slots: int = SLOTS):
        self.pool = BlockPool(blocks, StatePool(states) if states else None, holders)
        self.states = States(states)
        self.slots = slots
        self.scheduler = Scheduler(self.pool, slots, BUDGET, LONGEST, PromptLookup(drafts) if drafts else None)
        self.alive: list[EngineSequence] = []
        self.number = 0
        self.computed = 0
        self.accepted = 0

    def submit(self, prompt: int, answer: int, family: int, salt: str = "") -> EngineSequence:
        return self.submit_ids([family * 1000 + i % 7 for i in range(prompt)], answer, salt)

    def submit_ids(self, ids: list[int], answer: int, salt: str = "") -> EngineSequence:
        request = Request(ids, SamplingParams(max_tokens=answer), cache_salt=salt)
        sequence = EngineSequence(request, self.number, Answer(TOKENIZER, request.sampling), list(ids))
        self.number += 1
        self.scheduler.add(sequence)
        self.alive.append(sequence)
        return sequence

    def cancel(self, index: int) -> None:
        if self.alive:
            self.scheduler.remove(self.alive.pop(index % len(self.alive)))

    def step(self) -> set[int]:
        """Run a step; returns the numbers of the sequences that went on."""
        shares = self.scheduler.schedule()
        self.check(shares)
        if self.pool.states is not None:
            self.states.run(shares)
        for share in shares:
            sequence = share.sequence
            segment = sequence.segment(share.count, share.drafts, share.states)
            assert len(segment.token_ids) == share.tokens
            last = share.count == sequence.pending
            sequence.computed += share.count
            self.computed += share.count
            if last:
                self.sample(sequence, share.drafts)
            sequence.publish(self.pool)
            if sequence.state is not None:
                assert self.states.after(sequence) == sequence.tokens[: sequence.computed]
            if len(sequence.answer.token_ids) >= sequence.request.sampling.max_tokens:
                self.scheduler.remove(sequence)
                self.alive.remove(sequence)
        return {share.sequence.number for share in shares}

    def sample(self, sequence: EngineSequence, drafts: list[int]) -> None:
        """Append the next token of the answer, and one for each draft that comes true."""
        for draft in [*drafts, None]:
            token = (
                len(sequence.tokens) % 7 if len(sequence.tokens) % 32 else 9
            )  # also a surprise at a border of blocks
            sequence.tokens.append(token)
            sequence.answer.token_ids.append(0)
            if draft != token or len(sequence.answer.token_ids) >= sequence.request.sampling.max_tokens:
                break
            sequence.computed += 1
            self.accepted += 1

    def check(self, shares) -> None:
        assert sum(share.tokens for share in shares) <= BUDGET
        running = self.scheduler.running
        assert len({s.slot for s in running}) == len(running) <= self.slots
        assert [s.number for s in running] == sorted(s.number for s in running)
        numbers = [s.number for s in (*running, *self.scheduler.waiting)]
        assert numbers == sorted(numbers), "first come, first served"
        for share in shares:
            s = share.sequence
            assert len(s.blocks) * 64 >= s.computed + share.tokens
            assert share.drafts == [] or share.count == s.pending
        users = Counter(block for s in running for block in s.blocks)
        assert all(self.pool._users[block] == users[block] for block in range(self.pool.size))
        assert self.pool.available == self.pool.size - len(users)
        for s in running:
            holders = [block % self.pool.holders for block in s.blocks]
            pieces = [holders[i : i + block_pool.PIECE_BLOCKS] for i in range(0, len(holders), block_pool.PIECE_BLOCKS)]
            assert all(len(set(piece)) == 1 for piece in pieces), "a piece lies on one rank"
        if self.pool.states is not None:
            assert set(self.pool.states._known) <= set(self.pool._known), "no snapshot without its block"
            for digest, slot in self.pool.states._known.items():
                assert prefix_digests(self.states.slots[slot])[-1] == digest


class States:
    """What a model would have in its state slots: the tokens that led to each state."""

    def __init__(self, slots: int):
        self.slots: list[list[int] | None] = [None] * slots

    def run(self, shares: list[ScheduledSequence]) -> None:
        """Run a step as kernels may: in any order of sequences."""
        reads = [share.states.read for share in shares]
        writes = [[share.states.write, *(slot for _, slot in share.states.snapshots)] for share in shares]
        written = [slot for slots in writes for slot in slots]
        assert len(set(written)) == len(written), "no slot is written twice"
        for i, slots in enumerate(writes):
            assert not set(slots) & {read for j, read in enumerate(reads) if j != i}, "no slot of another is written"
        for share in reversed(shares):
            self._run(share.sequence, share.states, share.count, share.drafts)

    def _run(self, sequence: EngineSequence, states: SegmentStates, count: int, drafts: list[int]) -> None:
        start = sequence.computed
        assert (states.read < 0) == (start == 0)
        before = self.slots[states.read] if start else []
        assert before == sequence.tokens[:start]
        text = [*sequence.tokens[: start + count], *drafts]
        indices = [index for index, _ in states.snapshots]
        assert indices == sorted(set(indices))
        for index, slot in states.snapshots:
            self.slots[slot] = text[: start + index + 1]
        self.slots[states.write] = text

    def after(self, sequence: EngineSequence) -> list[int] | None:
        """What a sequence goes on from."""
        state = sequence.state
        return self.slots[state.own if state.source is None else state.source]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 300), st.integers(1, 200), st.integers(0, 1)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("steps"), st.integers(1, 40)),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, drafts=st.sampled_from([0, 5]))
def test_invariants_hold_and_everything_ends(events, drafts):
    check_that_everything_ends(Simulation(drafts), events)


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, drafts=st.sampled_from([0, 5]), states=st.sampled_from([SLOTS + 1, 7, 12, 40]))
def test_every_sequence_goes_on_from_its_own_state(events, drafts, states):
    """Whatever is found in the cache, pushed out or guessed wrongly, with enough slots for snapshots and with few."""
    simulation = Simulation(drafts, states)
    check_that_everything_ends(simulation, events)
    assert simulation.pool.states.available == states


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, drafts=st.sampled_from([0, 5]), sizes=st.sampled_from([(2, 8), (3, 12), (2, 10), (5, 10)]))
def test_everything_ends_where_holders_have_pieces(events, drafts, sizes):
    """Pieces of two blocks, so that few make a sequence; each holder has room for its part of the longest one."""
    holders, blocks = sizes
    with patch.object(block_pool, "PIECE_BLOCKS", 2):
        check_that_everything_ends(Simulation(drafts, blocks=blocks, holders=holders), events)


def check_that_everything_ends(simulation, events):
    for kind, *values in events:
        if kind == "submit":
            simulation.submit(*values)
        elif kind == "cancel":
            simulation.cancel(*values)
        else:
            for _ in range(values[0]):
                simulation.step()
    for _ in range(sum(len(s.tokens) + s.request.sampling.max_tokens for s in simulation.alive) * 2 + 1):
        if not simulation.alive:
            break
        oldest = simulation.alive[0]
        went_on = simulation.step()
        assert oldest.number in went_on, "the oldest goes on in every step"
    assert not simulation.alive
    assert simulation.pool.available == simulation.pool.size
    assert simulation.scheduler.schedule() == []


def test_the_youngest_leaves_when_blocks_run_out_and_comes_back():
    simulation = Simulation()
    old, young = simulation.submit(250, 200, 0), simulation.submit(40, 200, 1)
    while not young.preemptions:
        simulation.step()
    assert old.preemptions == 0
    assert young.slot is None
    while simulation.alive:
        simulation.step()
    assert len(young.answer.token_ids) == 200


def test_a_known_beginning_is_not_computed_again():
    simulation = Simulation()
    simulation.submit(200, 1, 0)
    while simulation.alive:
        simulation.step()
    second = simulation.submit(200, 1, 0)
    simulation.step()
    assert second.cached_tokens == 192
    other = simulation.submit(200, 1, 1)
    simulation.step()
    assert other.cached_tokens == 0


def test_sequences_with_other_salts_share_nothing():
    simulation = Simulation()
    found = []
    for salt in ("", "mine", "yours", "mine", "", "yours/mine", "mine"):
        sequence = simulation.submit(100, 1, 0, salt)
        while not sequence.finished and sequence in simulation.alive:
            simulation.step()
        found.append(sequence.cached_tokens)
    assert found == [0, 0, 0, 64, 64, 0, 64]


def test_a_preempted_sequence_finds_only_what_its_salt_opens():
    """Also what it published before it had to leave."""
    simulation = Simulation()
    salted = simulation.submit(64 * 3 + 5, 200, 0, "mine")
    while salted.published < 3:
        simulation.step()
    simulation.scheduler._preempt(salted)
    assert simulation.pool.find(prefix_digests(salted.tokens)) == []
    found = simulation.pool.find(prefix_digests(salted.tokens, salt_digest("mine")))
    assert len(found) == 3
    simulation.pool.release(found)
    while salted.published < 3:
        simulation.step()
    assert simulation.pool.find(prefix_digests(salted.tokens)) == []


# -- recurrent state --------------------------------------------------------------------------------------------------


def run_alone(simulation: Simulation, prompt: list[int], answer: int = 1) -> EngineSequence:
    """Run a sequence to its end; returns it."""
    sequence = simulation.submit_ids(prompt, answer)
    while sequence in simulation.alive:
        simulation.step()
    return sequence


def text(family: int, tokens: int) -> list[int]:
    return [family * 1000 + i for i in range(tokens)]


def test_a_text_goes_on_from_the_last_border_of_its_beginning():
    """The end of a prompt has a snapshot, and so have both its answer and what the answer was asked for again."""
    simulation = Simulation(states=12)
    prompt = text(1, 200)
    first = run_alone(simulation, prompt, answer=70)
    assert run_alone(simulation, prompt).cached_tokens == 192
    assert run_alone(simulation, [*first.tokens, 1, 2]).cached_tokens == 256
    assert run_alone(simulation, [*first.tokens[:150], 1, 2]).cached_tokens == 128, "chunks of 48 end at 144"


def test_where_texts_part_others_find_a_snapshot():
    """With two slots for snapshots: the second text has one made where it parts from the first."""
    simulation = Simulation(states=3)
    shared = text(1, 140)
    found = [run_alone(simulation, shared + text(family, 150)).cached_tokens for family in (2, 3, 4, 5)]
    assert found == [0, 64, 128, 128]


def test_a_preempted_sequence_goes_on_from_its_last_snapshot():
    simulation = Simulation(states=SLOTS + 1)
    sequence = simulation.submit(150, 100, 0)
    while len(sequence.tokens) < 215:
        simulation.step()
    simulation.scheduler._preempt(sequence)
    before = simulation.computed
    simulation.step()
    assert simulation.computed - before == 215 - 192
    while simulation.alive:
        simulation.step()
    assert len(sequence.answer.token_ids) == 100


def test_drafts_take_no_more_slots_than_there_are():
    """Each needs one for the time of a step; the answer goes on from the state before the first wrong one."""
    for states in (SLOTS + 1, 40):
        simulation = Simulation(drafts=5, states=states)
        for family in range(SLOTS):
            simulation.submit(30, 60, family)
        while simulation.alive:
            simulation.step()
        assert simulation.accepted > 0
        assert simulation.pool.states.available == states


def test_snapshots_are_forgotten_with_their_blocks_and_superseded_ones_first():
    states = StatePool(3)
    pool, digests = BlockPool(3, states), prefix_digests(range(192))
    blocks = [pool.take() for _ in digests]
    slots = [states.take() for _ in digests]
    for block, slot, digest in zip(blocks, slots, digests, strict=True):
        pool.publish(block, digest)
        states.publish(slot, digest)
        states.release([slot])
    states.supersede(digests[2])
    assert states.take() == slots[2]
    assert states.find(digests) == (2, slots[1])
    pool.release(blocks)
    assert [pool.take(), pool.take()] == [blocks[2], blocks[1]]
    assert states.find(digests) == (1, slots[0])
    states.release([slots[1]])
    assert states.available == 1, "a snapshot in use is not given away, and free once it is not"


# -- the pool ---------------------------------------------------------------------------------------------------------


def test_the_longest_unused_block_is_forgotten_first_and_a_beginning_last():
    pool, digests = BlockPool(3), prefix_digests(range(192))
    blocks = [pool.take() for _ in digests]
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    assert pool.available == 3
    assert pool.take() == blocks[2]
    assert pool.find(digests) == blocks[:2]


def test_shared_blocks_live_until_their_last_user():
    pool, digests = BlockPool(2), prefix_digests(range(64))
    block = pool.take()
    pool.publish(block, digests[0])
    assert pool.find(digests) == [block]
    pool.release([block])
    assert pool.available == 1
    pool.release([block])
    assert pool.available == 2


def test_no_salt_is_no_change_and_digests_of_salts_are_their_own():
    ids = list(range(64))
    assert salt_digest("") == NO_TOKENS
    assert prefix_digests(ids, salt_digest("")) == prefix_digests(ids)
    salts = ("", "a", "b", "a/b", "\ud800", "a" * 10_000)
    assert len({prefix_digests(ids, salt_digest(salt))[0] for salt in salts}) == len(salts)


def test_digests_depend_on_all_that_came_before():
    one, two = prefix_digests([1] * 128), prefix_digests([2] * 64 + [1] * 64)
    assert len(one) == 2
    assert one[1] != two[1]
    assert one[0] != one[1]


# -- drafts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([1, 2, 9, 1, 2, 3, 1, 2], [3, 1, 2]),  # the latest occurrence
        ([7, 1, 2, 9, 9, 1, 2, 3, 7, 1, 2], [9, 9, 1]),  # the longest match first
        ([9, 1, 2, 1, 2], [1, 2, 1]),  # goes on repeating
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_drafts_are_what_followed_before(text, expected):
    assert PromptLookup(9).draft(text, 3) == expected


def test_last_occurrence_may_overlap():
    import numpy as np

    assert last_occurrence(np.array([5, 5, 5]), 2) == 2


def test_pieces_fill_holders_alike():
    """Short texts too, so that no holder runs out while others have room."""
    pool = BlockPool(96, holders=3)
    texts = [list[int]() for _ in range(6)]
    for blocks in texts:
        pool.extend(blocks, 5)
    assert [pool.available_of(holder) for holder in range(3)] == [22, 22, 22]
    pool.extend(texts[0], 13)
    assert len({block % 3 for block in texts[0][:16]}) == 1
    assert [pool.available_of(holder) for holder in range(3)] == [11, 20, 22]
    assert not pool.has_room(texts[0], 3 * 32)


def test_a_piece_that_two_holders_computed_is_found_on_one():
    pool, digests = BlockPool(32, holders=2), prefix_digests(range(192))
    first, second = [pool.take(0), pool.take(0)], [pool.take(1), pool.take(1), pool.take(1)]
    pool.publish(first[0], digests[0])
    pool.publish(second[1], digests[1])
    pool.publish(second[2], digests[2])
    assert pool.find(digests) == first[:1]


# -- steps under way ---------------------------------------------------------------------------------------------------


def decoding(count: int, blocks: int = 2 * BLOCKS) -> Simulation:
    """So many sequences that have computed a token, for two steps at once."""
    simulation = Simulation(blocks=blocks, slots=2 * SLOTS)
    simulation.scheduler.at_once = 2
    for family in range(count):
        simulation.submit(1, 100, family)
    assert len(simulation.step()) == count
    return simulation


def numbers(shares: list[ScheduledSequence]) -> list[int]:
    return [share.sequence.number for share in shares]


def test_steps_under_way_have_a_part_of_the_sequences_each():
    scheduler = decoding(8).scheduler
    first = scheduler.schedule()
    scheduler.begin(first)
    second = scheduler.schedule()
    scheduler.begin(second)
    assert (numbers(first), numbers(second)) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert scheduler.schedule() == []
    assert all(map(scheduler.is_done, first))
    assert not any(map(scheduler.is_done, first)), "each was done once"
    assert numbers(scheduler.schedule()) == [0, 1, 2, 3]


def test_few_sequences_are_in_one_step():
    scheduler = decoding(7).scheduler
    assert numbers(scheduler.schedule()) == [*range(7)]


def test_what_a_sequence_computed_that_was_sent_back_meanwhile_is_not_wanted():
    """The oldest sequence needs a block that the youngest has, which is in a step under way."""
    simulation = decoding(2, blocks=2)
    scheduler, (old, young) = simulation.scheduler, simulation.alive
    shares = scheduler.schedule()
    assert numbers(shares) == [0, 1]
    scheduler.begin(shares[1:])
    old.tokens += [5] * 64
    old.computed = len(old.tokens) - 1
    assert numbers(scheduler.schedule()) == [0]
    assert (young.slot, scheduler.preemptions) == (None, 1)
    assert not scheduler.is_done(shares[1])


@pytest.mark.parametrize("answers", [0, 1])
def test_answers_under_way_keep_prompts_short(answers: int):
    """They wait for the next step, too, in which they are not themselves."""
    simulation = decoding(answers)
    scheduler = simulation.scheduler
    scheduler.pace = Pace(0.1)
    scheduler.begin(scheduler.schedule())
    simulation.submit(BUDGET, 1, family=9)
    (share,) = scheduler.schedule()
    assert share.count == (LEAST_TOKENS if answers else BUDGET)
