"""The message of a step: what was written comes out as the step, and what does not fit is refused."""

import numpy as np
import pytest

from mpillama.engine.executor import FIELDS, HEADER, STATE_FIELDS, Order, Segment, SegmentStates, StepPlan
from mpillama.models.candidates import WHOLE, Wanted


def plan() -> StepPlan:
    return StepPlan(max_tokens=8, slots=3, max_seq_len=200)


def test_segments_come_out_as_a_step():
    p = plan()
    p.write([Segment(2, 63, [5, 6, 7], 2, 0, [9, 4]), Segment(0, 0, [8], 1, 0, [3]), Segment(1, 10, [1, 2], 0, 0, [7])])
    step = p.step()
    assert p.order == Order.FORWARD
    assert step.token_ids.tolist() == [5, 6, 7, 8, 1, 2]
    assert step.positions.tolist() == [63, 64, 65, 0, 10, 11]
    assert step.slots.tolist() == [9 * 64 + 63, 4 * 64, 4 * 64 + 1, 3 * 64, 7 * 64 + 10, 7 * 64 + 11]
    assert step.segments.tolist() == [[0, 3, 63], [3, 1, 0], [4, 2, 10]]
    assert step.tables[0].tolist() == [9, 4]
    assert step.logit_rows.tolist() == [1, 2, 3]


def test_tables_are_kept_from_step_to_step():
    p = plan()
    p.write([Segment(1, 0, [], blocks=[5, 6])])
    assert len(p.step().token_ids) == 0
    p.write([Segment(1, 64, [3], 1, 2, [8])])
    step = p.step()
    assert step.slots.tolist() == [6 * 64]
    assert p.tables[1].tolist() == [5, 6, 8, 0]
    assert p.tables[0].tolist() == [0, 0, 0, 0]


def test_state_slots_come_out_as_rows_of_the_step():
    """Where none are named, a sequence's state is in the slot of its row, and begins at position 0."""
    p = StepPlan(max_tokens=8, slots=3, max_seq_len=200, states=8)
    first = SegmentStates(7, 4, [(0, 5), (2, 6)])
    p.write([Segment(2, 63, [5, 6, 7], 2, 0, [9, 4], first), Segment(1, 0, [8], 1, 0, [3]), Segment(0, 10, [1, 2])])
    step = p.step()
    assert step.states.tolist() == [[7, 4], [-1, 1], [0, 0]]
    assert step.snapshots.tolist() == [[0, 5], [2, 6]]
    assert step.positions.tolist() == [63, 64, 65, 0, 10, 11]
    assert step.tables[0].tolist() == [9, 4]
    p.write([Segment(0, 0, [], blocks=[5]), Segment(2, 66, [4], 1, states=SegmentStates(4, 4))])
    step = p.step()
    assert (step.states.tolist(), step.snapshots.tolist()) == ([[4, 4]], [])
    assert p.tables[0, 0] == 5


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(0, 0, range(9))],
        [Segment(i, 0, [1]) for i in range(4)],
        [Segment(0, 0, [1], blocks=range(100))],
        [Segment(0, 0, [1], table_start=3, blocks=[7, 8])],
        [Segment(0, 0, [1], table_start=4, blocks=[7])],
    ],
)
def test_what_does_not_fit_is_refused(segments):
    with pytest.raises(ValueError, match="a step of"):
        plan().write(segments)


@pytest.mark.parametrize("states", [SegmentStates(0, 8), SegmentStates(8, 0), SegmentStates(0, 1, [(0, 8)])])
def test_a_state_slot_that_there_is_not_is_refused(states):
    """Kernels write wherever they are told."""
    p = StepPlan(max_tokens=8, slots=3, max_seq_len=200, states=8)
    with pytest.raises(ValueError, match="state slot 8 of 8"):
        p.write([Segment(0, 9, [1], 1, states=states)])


def test_the_message_is_small_and_of_one_size():
    p = StepPlan(max_tokens=256, slots=32, max_seq_len=131072)
    assert p.buffer.nbytes == 8 * (HEADER + 32 * FIELDS + 256 + 4 + 64)
    with_states = StepPlan(max_tokens=256, slots=32, max_seq_len=131072, states=64)
    assert with_states.buffer.nbytes == p.buffer.nbytes + 8 * (32 * STATE_FIELDS + 256)
    p.write_order(Order.END, 3)
    assert (p.order, p.status) == (Order.END, 3)
    assert np.all(p.tables == 0)


def test_what_is_wanted_of_rows_comes_out():
    p = plan()
    greedy, drawn = Wanted(1, 0.0), Wanted(40, 0.7)
    p.write([Segment(2, 3, [5, 6], 2, wanted=greedy), Segment(0, 0, [8], 0), Segment(1, 9, [1], 1, wanted=drawn)])
    assert p.wanted() == [greedy, greedy, drawn]
    p.write([Segment(2, 3, [5, 6], 2)])
    assert p.wanted() == [WHOLE, WHOLE]
