"""Who waits for whom: what ranks measured of the same sums, split into waiting and the wire."""

import numpy as np
import pytest

from mpillama.engine.skew import RankTimes, skew_of


def times(rank: int, own: float, sums: list[list[float]], first_layer: int = 0) -> RankTimes:
    return RankTimes(rank, f"n{rank}", own, {}, np.array(sums), first_layer)


def test_the_others_wait_for_the_late_rank():
    skew = skew_of([times(0, 10, [[5, 6], [7, 8]]), times(1, 15, [[1, 2], [1, 2]]), times(2, 11, [[4, 5], [6, 7]])])
    assert skew.waiting == [[5, 5], [0, 0], [4, 4]]
    assert skew.wire == [3, 3, 3]
    assert (skew.late, skew.late_by) == ([1], [4])
    assert skew.mean == pytest.approx(18 / 3)


def test_ranks_that_are_late_in_turn_wait_for_each_other():
    """In the mean both spend the same in the sum; of that nothing is the wire but what both spend in each step."""
    skew = skew_of([times(0, 10, [[9], [1]]), times(1, 10, [[1], [9]])])
    assert skew.waiting == [[4], [4]]
    assert skew.wire == [1, 1]


def test_ranks_of_different_stages_do_not_meet():
    stages = [times(0, 5, [[3, 9]], 2), times(1, 4, [[1, 8]], 2), times(2, 4, [[7, 7]]), times(3, 9, [[2, 2]])]
    skew = skew_of(stages)
    assert skew.waiting == [[2, 1], [0, 0], [5, 5], [0, 0]]
    assert skew.wire == [9, 9, 4, 4]
    assert skew.late == [1, 3]


def test_a_rank_alone_waits_for_nobody():
    skew = skew_of([times(0, 5, [[0.0, 0.0]])])
    assert (skew.mean, skew.wire, skew.late) == (0, [0], [])
