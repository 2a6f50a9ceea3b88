"""Uneven shares: what --shares says, how measurements become shares, and what `plan` makes of them."""

import json
import re
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillama.errors import UserError
from mpillama.loading.plan import Node, PlanRequest, make_plan, predict, shared_by_measure
from mpillama.loading.shares import Measured, balanced, divide, gain_of, on_these_hosts, read_shares
from mpillama.loading.traffic import Network
from mpillama.models.config import ModelConfig
from mpillama.models.partition import Division
from mpillama.models.shapes import shape_config
from mpillama.models.tensors import WeightTypes
from mpillama.quant.registry import WEIGHT_TYPES
from tests.system.mpi.launch import PROGRAM, run

GB = 10**9
FAST, SLOW = Measured("fast", 100e9, 64 * GB), Measured("slow", 50e9, 64 * GB)


def asked(ranks: int, **changes) -> PlanRequest:
    config = ModelConfig.from_hf(shape_config("llama-3.1-8b"))
    fields = {"nodes": ranks, "ranks_per_node": 1, "memory_per_node": 64 * GB, "max_seq_len": 2048, **changes}
    return PlanRequest(config, WeightTypes(WEIGHT_TYPES["q4_0"]), batch=1, kv_type="f16", **fields)


def test_shares_are_numbers_or_a_report(tmp_path):
    assert read_shares("3, 1.5,0") == (3.0, 1.5, 0.0)
    path = tmp_path / "hosts.json"
    rank = {"host": "n1", "read_bandwidth_bytes_per_second": 5e10, "memory_bytes": 7, "rank": 0}
    path.write_text(json.dumps({"per_rank": [rank]}))
    assert read_shares(str(path)) == [Measured("n1", 5e10, 7)]


@pytest.mark.parametrize("text", ["0,0", "1..2,3", "no such file"])
def test_shares_that_are_none(text):
    with pytest.raises(UserError, match="--shares"):
        read_shares(text)


def test_a_report_without_bandwidths_is_refused(tmp_path):
    (tmp_path / "hosts.json").write_text(json.dumps({"per_rank": [{"host": "n1"}]}))
    with pytest.raises(UserError, match="doctor --bandwidth --json"):
        read_shares(str(tmp_path / "hosts.json"))


@pytest.mark.parametrize(
    ("ranks", "stages", "shares"), [(3, 2, None), (9, 9, None), (2, 1, (1.0,)), (4, 2, (0, 0, 1, 1))]
)
def test_divisions_that_cannot_be(ranks, stages, shares):
    with pytest.raises(UserError, match=r"--pipeline|--shares"):
        divide(ranks, stages, shares, layers=8)


def test_hosts_may_come_in_another_order():
    two = replace(FAST, memory=1)
    assert on_these_hosts([FAST, SLOW, two], ["slow", "fast", "fast"], "f") == [SLOW, FAST, two]
    with pytest.raises(UserError, match="rank 1 on slow"):
        on_these_hosts([FAST, SLOW, FAST], ["slow", "slow"], "f")


@given(
    ranks=st.lists(st.tuples(st.floats(1, 100), st.floats(0, 100)), min_size=1, max_size=12),
    need=st.floats(0.1, 1000),
)
@settings(max_examples=200, deadline=None)
def test_shares_follow_speed_as_far_as_there_is_room(ranks, need):
    speeds, rooms = zip(*ranks, strict=True)
    shares = balanced(speeds, rooms, need)
    assert sum(shares) == pytest.approx(min(need, sum(rooms)))
    assert all(share <= room * (1 + 1e-12) for share, room in zip(shares, rooms, strict=True))
    pace = [
        share / speed for share, speed, room in zip(shares, speeds, rooms, strict=True) if share < room * (1 - 1e-9)
    ]
    assert not pace or max(pace) == pytest.approx(min(pace))
    if need < sum(rooms) and pace:  # those that are full are slower for want of room, not of speed
        assert all(share / speed <= max(pace) * (1 + 1e-9) for share, speed in zip(shares, speeds, strict=True))


def test_a_host_of_half_the_bandwidth_gets_half_as_much():
    even = make_plan(asked(3))
    planned = make_plan(shared_by_measure(asked(3), [FAST, SLOW, FAST]))
    sizes = [rank.weights for rank in planned.ranks]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, rel=0.06)
    assert sizes[2] / sizes[0] == pytest.approx(1.0, rel=0.06)
    assert sum(sizes) == pytest.approx(sum(rank.weights for rank in even.ranks), rel=0.03)
    fast, same = (
        predict(make_plan(request), Node(50e9, 1e12), Network(0.0, 1e15)).decode_tokens_per_second
        for request in (planned.request, replace(planned.request, shares=None))
    )
    assert fast / same == pytest.approx(5 / 3, rel=0.06)  # 250 GB/s together, 3 times the slowest are 150
    model = replace(planned.request, shares=None).memory_model
    assert gain_of(model, planned.request.division, [FAST, SLOW, FAST]) == pytest.approx(5 / 3, rel=0.06)


def test_a_host_with_little_memory_gets_what_it_can_hold():
    small = replace(FAST, memory=GB)
    planned = make_plan(shared_by_measure(asked(2), [FAST, small]))
    assert planned.fits
    assert 0.4 * GB < planned.ranks[1].total < GB
    assert not make_plan(replace(planned.request, shares=None)).fits


def test_a_share_of_nothing_takes_nothing():
    planned = make_plan(replace(asked(3), shares=(1.0, 0.0, 1.0)))
    assert planned.ranks[1].reads < 2 * 65 * 4096 * 4  # norms alone
    parts = planned.request.config.partition(Division(3, (1.0, 0.0, 1.0)))
    assert parts[1].is_idle()
    assert not any(parts[1].ranges.values())


def test_plan_shows_the_gain_and_each_ranks_memory(tmp_path):
    path = tmp_path / "hosts.json"
    ranks = [
        {"host": f"n{i}", "read_bandwidth_bytes_per_second": speed, "memory_bytes": 64 * GB}
        for i, speed in enumerate((100e9, 50e9))
    ]
    path.write_text(json.dumps({"per_rank": ranks}))
    options = ("plan", "--shape", "llama-3.1-8b", "--nodes", "2", "--max-seq-len", "2048", "--shares", path)
    shown = run(None, *PROGRAM, *options, "--network", "1us,100GB/s")
    assert shown.status == 0, shown
    assert re.search(r"With these shares: 1\.[34]", shown.stdout), "half as much again of what reading takes"
    found = json.loads(run(None, *PROGRAM, *options, "--json").stdout)
    weights = [rank["weights"] for rank in found["ranks"]]
    assert weights[0] / weights[1] == pytest.approx(2, rel=0.06)
    assert sum(accumulate(found["shares"])) > 0
    assert found["speed"]["decode_tokens_per_second"] > found["speed_with_even_shares"]["decode_tokens_per_second"]
    wrong = run(None, *PROGRAM, *options, "--ranks-per-node", "2")
    assert (wrong.status, wrong.stderr.count("\n")) == (2, 1)
    assert "measurements of 2 ranks" in wrong.stderr
