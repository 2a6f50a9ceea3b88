"""Planning a run: sums, fits and remedies, each checked by planning it; and the command."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import psutil
import pytest

from mpillama.__main__ import main
from mpillama.comm.communicator import Communicator
from mpillama.errors import UserError
from mpillama.kernels.target import prepare, requested_isa
from mpillama.loading import plan
from mpillama.loading.memory import RESERVE, MemoryModel
from mpillama.loading.model_file import open_model
from mpillama.loading.settings import parse_bytes, state_slots
from mpillama.loading.synthetic import SyntheticWeights
from mpillama.loading.traffic import Network
from mpillama.models.attention_pieces import PIECE_BLOCKS
from mpillama.models.cache import (
    KVCache,
    blocks_for,
    dealt_blocks,
    held_blocks,
    held_positions,
    single_sequence_step,
)
from mpillama.models.config import ModelConfig
from mpillama.models.decoder import Decoder
from mpillama.models.partition import Division
from mpillama.models.shapes import shape_config
from mpillama.models.tensors import WeightTypes
from mpillama.models.weights import load_weights
from mpillama.models.workspace import scratch_bytes
from mpillama.quant.registry import WEIGHT_TYPES
from tests.system.mpi.launch import PROGRAM, run
from tests.tiny_models import LATENT_TOY, TOY, write_toy

GB = 10**9


def request(shape="llama-3.1-405b", nodes=4, memory=64 * GB, context=4096, weights="q4_0", **other):
    config, types = ModelConfig.from_hf(shape_config(shape)), WeightTypes(WEIGHT_TYPES[weights])
    fields = {"ranks_per_node": 1, "batch": 1, "kv_type": "f16", **other}
    return plan.PlanRequest(config, types, nodes, memory_per_node=memory, max_seq_len=context, **fields)


def test_405b_fits_on_four_nodes_of_64_gb():
    made = plan.make_plan(request())
    assert made.fits
    assert made.inequality < 0.02
    assert all(56 * GB < rank.weights < 58 * GB for rank in made.ranks)
    assert sum(rank.reads for rank in made.ranks) == pytest.approx(405.8e9 * 4.5 / 8, rel=0.01)


def test_the_kv_cache_is_that_of_the_formula():
    """126 layers, 8 KV heads of 128, keys and values of 2 bytes, 4096 positions of 3 sequences."""
    made = plan.make_plan(request(batch=3))
    assert sum(rank.kv_cache for rank in made.ranks) == 126 * 8 * 128 * 2 * 2 * 4096 * 3


LONG = 1 << 17


@pytest.mark.parametrize(
    ("shape", "bytes_", "idle"),
    [
        ("llama-3.1-8b", 32 * 2 * 8 * 128 * 2 * LONG, 0),
        ("gpt-oss-120b", 18 * 2 * 8 * 64 * 2 * (LONG + 128), 0),
        ("minimax-m3", 2 * 4 * 128 * 2 * (3 * LONG + 57 * 16 * 128) + 57 * 128 * 2 * LONG, 57 * 128),
        ("deepseek-v3.2", 61 * 2 * (576 * 2048 + 128 * LONG), 61 * 128),
    ],
)
def test_a_step_reads_what_of_the_cache_its_token_sees(shape, bytes_, idle):
    """All of it, windows, chosen blocks or positions, and the `idle` index keys where there is something to choose."""
    (rank,) = plan.make_plan(request(shape, nodes=1, context=LONG)).ranks
    assert rank.cache_read == bytes_
    (short,) = plan.make_plan(request(shape, nodes=1, context=64)).ranks
    assert short.cache_read == short.kv_cache - 64 * 2 * idle


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    ("shape", "kv_type"),
    [
        *(("llama-3.2-1b", kind) for kind in ("f16", "f32", "q8")),
        ("deepseek-r1", "q4"),
        ("qwen3-next-80b", "f16"),
    ],
)
def test_the_check_before_loading_asks_for_what_is_planned(ranks, shape, kv_type):
    """It adds cache blocks to what a rank takes without any, to find the longest context that fits."""
    asked = request(shape, nodes=ranks, context=1000, kv_type=kv_type)
    model = asked.memory_model
    for rank, (part, planned) in enumerate(
        zip(asked.config.partition(ranks), plan.make_plan(asked).ranks, strict=True)
    ):
        without_cache = model.of_rank(rank, part, context=0)
        checked = without_cache.to_allocate + blocks_for(1000) * model.cache_block_bytes(part)
        already_there = planned.python - planned.tokenizer
        assert checked == planned.to_allocate == planned.total - already_there


@pytest.mark.parametrize(("kv_type", "bits"), [("f32", 32), ("f16", 16), ("q8", 8.5), ("q4", 4.5)])
@pytest.mark.parametrize(("shape", "channels"), [("llama-3.2-1b", 16 * 8 * 64 * 2), ("deepseek-r1", 61 * (512 + 64))])
def test_a_cache_takes_its_bits_for_each_channel(shape, channels, kv_type, bits):
    made = plan.make_plan(request(shape, nodes=1, context=1024, kv_type=kv_type))
    assert made.ranks[0].kv_cache == 1024 * channels * bits / 8


def test_states_are_those_of_the_formula():
    """36 of 48 layers: 32 heads of 128 x 128 floats, and 3 tokens of 8,192 channels; 3 slots for each sequence."""
    slot = 36 * 4 * (32 * 128 * 128 + 3 * 8192)
    for batch in (1, 5):
        made = plan.make_plan(request("qwen3-next-80b", nodes=2, batch=batch))
        assert sum(rank.states for rank in made.ranks) == 3 * batch * slot
        assert all(rank.total > rank.states + rank.kv_cache + rank.weights for rank in made.ranks)
    assert not any(rank.states for rank in plan.make_plan(request()).ranks)


def test_slots_are_a_sequences_own_its_drafts_and_snapshots():
    assert [state_slots(1), state_slots(32), state_slots(4, drafts=3)] == [3, 96, 24]
    assert [state_slots(4, drafts=3, snapshots=1), state_slots(1, snapshots=10)] == [17, 11]


def test_only_rank_0_has_a_tokenizer():
    found = [rank.tokenizer for rank in plan.make_plan(request(nodes=2)).ranks]
    assert found[0] > 1000 * 128_256
    assert found[1] == 0


def test_nodes_add_up_their_ranks():
    made = plan.make_plan(request(nodes=2, ranks_per_node=3))
    needs = [rank.total + RESERVE for rank in made.ranks]
    assert made.nodes == [sum(needs[:3]), sum(needs[3:])]


@pytest.mark.parametrize(
    "change", [{"memory": 57_900_000_000}, {"weights": "q8_0"}, {"nodes": 3}, {"context": 131072, "memory": 60 * GB}]
)
def test_every_remedy_fits_and_the_fewest_nodes_are_the_fewest(change):
    made = plan.make_plan(request(**change))
    assert not made.fits
    cures = plan.remedies(made)
    assert cures
    assert all(cure.plan.fits for cure in cures)
    for cure in cures:
        if "--nodes" in cure.text:
            fewer = replace(cure.plan.request, nodes=cure.plan.request.nodes - 1)
            assert not plan.make_plan(fewer).fits
        if "--max-seq-len" in cure.text:
            longer = replace(cure.plan.request, max_seq_len=cure.plan.request.max_seq_len + 64)
            assert not plan.make_plan(longer).fits


def test_what_fits_needs_no_remedy():
    assert plan.remedies(plan.make_plan(request())) == []


def test_prediction_is_bounded_by_the_memory():
    made = plan.make_plan(request())
    fast = plan.predict(made, plan.Node(200e9, 2e12), Network(0.0, 1e15))
    assert fast.decode_tokens_per_second <= 200e9 / max(r.weights - r.embedding for r in made.ranks)
    assert fast.prefill_tokens_per_second == pytest.approx(4 * 2e12 / 403e9, rel=0.01)  # 405B without the head
    slow = plan.predict(made, plan.Node(200e9, 2e12, 5e9), Network(1e-3, 1e9))
    assert slow.prefill_tokens_per_second < fast.prefill_tokens_per_second
    assert slow.decode_tokens_per_second < fast.decode_tokens_per_second
    assert slow.messages_per_step == 3 * (1 + 2 * 126) + 1
    assert slow.load_seconds == pytest.approx(max(r.reads for r in made.ranks) / 5e9)


def test_what_python_and_mpi_take_is_added():
    """To a step, to each layer, and to each message that others wait for."""
    made, latency = plan.make_plan(request()), 1e-4
    free = plan.predict(made, plan.Node(200e9, 2e12), Network(latency, 1e15))
    node = plan.Node(200e9, 2e12, step_seconds=0.5, layer_seconds=0.01)
    taken = plan.predict(made, node, Network(latency, 1e15, software=2 * latency))
    layers = made.request.config.num_hidden_layers
    rounds = 1 + 2 * layers + 1 + 2  # sums, the logits, and the plan along a tree of four nodes
    beside = 0.5 + 0.01 * layers + 2 * latency * rounds
    assert 1 / taken.decode_tokens_per_second - 1 / free.decode_tokens_per_second == pytest.approx(beside)


MEASURED = {"step": 0.2, "layer": 0.01, "message": 0.03, "latency": 1e-5}


@pytest.mark.parametrize(
    ("beside", "seconds"),
    [(MEASURED, 0.2 + 16 * 0.01 + 35 * 0.03), (MEASURED | {"message": None}, 0.2 + 16 * 0.01), (None, 0.0)],
)
def test_what_bench_measured_of_python_and_mpi_is_read(beside, seconds, tmp_path, capsys):
    """A bench of a single host says nothing of messages, an older one nothing at all: usual figures stand in."""
    saved = tmp_path / "bench.json"
    prefill, decode = [{"multiply_adds_per_second": 1e12}], [{"overhead_seconds": beside} if beside else {}]
    found = {"read_bandwidth_bytes_per_second": 1e11, "prefill": prefill, "decode": decode}
    saved.write_text(json.dumps(found))
    words = ["plan", "--shape", "llama-3.2-1b", "--nodes", "2", "--max-seq-len", "64", "--bench", str(saved), "--json"]
    assert main(words) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]["decode_tokens_per_second"]
    assert seconds < 1 / speed < seconds + 0.02


def test_a_bench_over_several_hosts_tells_what_one_of_them_does(tmp_path, capsys):
    """Its ranks read and compute together; one that does not say on how many hosts is of a single one."""
    saved, speeds = tmp_path / "bench.json", []
    words = ["plan", "--shape", "llama-3.2-1b", "--nodes", "3", "--max-seq-len", "64", "--bench", str(saved), "--json"]
    for hosts, told in ((1, {}), (1, {"hosts": 1}), (4, {"hosts": 4})):
        prefill = [{"multiply_adds_per_second": hosts * 1e12}]
        beside = {"overhead_seconds": MEASURED}
        found = {"read_bandwidth_bytes_per_second": hosts * 1e11, "prefill": prefill, "decode": [beside]}
        saved.write_text(json.dumps(found | told))
        assert main(words) == 0
        speeds.append(json.loads(capsys.readouterr().out)["speed"])
    assert speeds[0] == speeds[1] == speeds[2]


def test_coarse_sums_send_less():
    exact, coarse = (
        plan.predict(plan.make_plan(request(sync=sync)), plan.Node(200e9, 2e12), Network(1e-4, 1e8))
        for sync in ("exact", "q80")
    )
    assert coarse.messages_per_step == exact.messages_per_step
    assert coarse.communication_bytes_per_step < 0.4 * exact.communication_bytes_per_step
    assert coarse.decode_tokens_per_second > exact.decode_tokens_per_second


def test_a_node_alone_sends_nothing_but_likely_tokens():
    made = plan.make_plan(request(nodes=1, memory=1000 * GB))
    speed = plan.predict(made, plan.Node(200e9, 2e12), Network(1e-4, 1e8))
    assert speed.messages_per_step == (made.request.ranks > 1)


@pytest.mark.parametrize(
    ("text", "expected"), [("64GB", 64 * GB), ("60GiB", 60 * 2**30), ("1.5TB", 15 * 10**11), ("7", 7)]
)
def test_bytes_as_people_write_them(text, expected):
    assert parse_bytes("--x", text) == expected


@pytest.mark.parametrize("text", ["", "64XB", "GB", "-3GB", "1e9"])
def test_bytes_that_are_none(text):
    with pytest.raises(UserError, match="--x"):
        parse_bytes("--x", text)


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_fits(tmp_path):
    options = ("--nodes", "4", "--memory-per-node", "64GB", "--weights", "q4_0", "--max-seq-len", "4096")
    script = tmp_path / "job.sbatch"
    result = run(None, *PROGRAM, "plan", "--shape", "llama-3.1-405b", *options, "--sbatch", script)
    assert result.status == 0, result.stderr
    assert "fits, " in result.stdout
    assert "#SBATCH --nodes=4" in script.read_text()


def test_the_command_says_what_does_not_fit():
    options = ("--nodes", "4", "--memory-per-node", "32GB", "--max-seq-len", "4096", "--json")
    result = run(None, *PROGRAM, "plan", "--shape", "llama-3.1-405b", *options)
    assert result.status == 1, result.stderr
    found = json.loads(result.stdout)
    assert found["fits"] is False
    assert [cure["change"] for cure in found["remedies"]] == ["--nodes 8 instead of 4"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--shape"),
        (("--shape", "llama-9"), "llama-9"),
        (("--shape", "llama-3.1-8b", "--nodes", "0"), "--nodes"),
        (("--shape", "llama-3.1-8b", "--memory-per-node", "much"), "--memory-per-node"),
        (("--shape", "llama-3.1-8b", "--network", "fast"), "--network"),
        (("--shape", "llama-3.1-8b", "--max-seq-len", "0"), "--max-seq-len"),
        (("--shape", "llama-3.1-8b", "--bench", "/none"), "--bench"),
    ],
)
def test_mistakes_of_the_command(options, words):
    result = run(None, *PROGRAM, "plan", *options)
    assert (result.status, result.stdout) == (2, ""), result
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


SCRATCH = {
    **LATENT_TOY, "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 128, "kv_lora_rank": 512,
    "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64,
}  # fmt: skip


def test_a_cache_that_several_ranks_hold_is_told():
    """Latents are those of all heads; KV heads are divided while there are enough ranks."""
    latents = plan.make_plan(request("deepseek-r1", context=131072, weights="fp8"))
    assert latents.repeats_cache
    assert {rank.kv_cache for rank in latents.ranks} == {4 * latents.cache_by_positions}
    assert not plan.make_plan(request()).repeats_cache
    assert plan.make_plan(request(nodes=16)).repeats_cache  # of 8 KV heads


@pytest.mark.parametrize(("shape", "nodes"), [("deepseek-r1", 4), ("llama-3.1-405b", 16)])
def test_a_cache_divided_by_positions_is_planned(shape, nodes):
    asked = request(shape, nodes=nodes, context=131072, weights="fp8", batch=2)
    usual, divided = plan.make_plan(asked), plan.make_plan(replace(asked, context_parallel=True))
    assert divided.ranks[0].kv_cache == usual.cache_by_positions < usual.ranks[0].kv_cache
    assert not divided.repeats_cache
    network, node = Network(5e-6, 1e10), plan.Node(200e9, 2e12)
    before, after = (plan.predict(made, node, network) for made in (usual, divided))
    assert after.messages_per_step > before.messages_per_step
    assert after.communication_bytes_per_step > before.communication_bytes_per_step
    assert after.bytes_per_step < before.bytes_per_step
    cures = plan.remedies(plan.make_plan(replace(asked, memory_per_node=max(divided.nodes))))
    assert "--context-parallel" in [cure.text for cure in cures]


def test_positions_lie_on_holders_in_pieces():
    for positions, holders in ((1, 1), (1, 5), (1024, 3), (1025, 3), (5000, 2), (6 * 1024, 3), (70000, 5)):
        tables = dealt_blocks(3, positions, holders)
        held = held_blocks(positions, holders)
        assert held_blocks(held_positions(held, holders), holders) == held
        assert held_positions(held, holders) >= positions
        assert len(set(tables.ravel())) == tables.size
        assert tables.max() < 3 * held * holders
        for blocks in tables:
            for first in range(0, len(blocks), PIECE_BLOCKS):
                assert len(set(blocks[first : first + PIECE_BLOCKS] % holders)) == 1
            assert held - PIECE_BLOCKS < np.bincount(blocks % holders).max() <= held


def _takes_for_long_latents() -> tuple[int, int]:
    """Bytes measured and planned: of a step of 6 tokens behind 4,090, after one at the beginning, by 8 threads."""
    threads, tokens, context = 8, 6, 4096
    config = ModelConfig.from_hf(SCRATCH)
    part, types = config.partition(1)[0], WeightTypes(WEIGHT_TYPES["f32"])
    weights = load_weights(config, config.tensors(types), part, SyntheticWeights().read)
    model = Decoder(config, weights, Communicator.alone(), prepare(requested_isa(), threads).team)
    cache = KVCache(config, part, blocks_for(context), "f32")
    taken, planned = [], []
    for start in (0, context - tokens):
        model.forward(single_sequence_step(np.arange(tokens), start, np.arange(blocks_for(context)), 1), cache)
        taken.append(psutil.Process().memory_info().vms)
        planned.append(scratch_bytes(config, part, tokens, start + tokens, threads))
    return taken[1] - taken[0], planned[1] - planned[0]


def test_what_kernels_take_for_long_latents_is_planned():
    """In a process of its own, which has no freed memory to take it from."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        taken, planned = process.submit(_takes_for_long_latents).result()
    assert taken == pytest.approx(planned, rel=0.05)
    assert planned > 12e6


def test_the_check_before_loading_knows_what_long_latents_take():
    """What `plan` says of a context is what kernels take for its last token and less."""
    model = replace(request("deepseek-r1", context=131072, weights="fp8"), threads=8).memory_model
    part = model.config.partition(4)[0]
    with_context, without = (model.of_rank(1, part, context).buffers for context in (131072, 0))
    assert with_context - without == model.scratch(part, 131072) - model.scratch(part, 0) > 0
    each, common = model.config.blocks[0].attention.scratch(part, 256, 131072, 8)
    # 15 tiles of 64 rows at the most, each 256 spans of 512 latents, a sum and a maximum.
    assert common == 15 * 256 * 64 * 514 * 4
    assert model.scratch(part, 131072) == common + 8 * each
    assert replace(model, threads=1).scratch(part, 131072) == replace(model, threads=1).scratch(part, 0)


# -- stages -----------------------------------------------------------------------------------------------------------


def staged(network: Network, **changes) -> list[plan.StagePlan]:
    asked = request("llama-3.1-70b", nodes=4, ranks_per_node=2, context=2048, **changes)
    return plan.plans_of_stages(asked, plan.Node(200e9, 2e12), network)


def test_slow_networks_want_a_stage_for_each_node_and_fast_ones_none():
    fast, slow = staged(Network(2e-6, 12e9)), staged(Network(1e-3, 120e6))
    assert [layout.stages for layout in fast] == [1, 2, 4]
    assert plan.best_stages(fast).stages == 1
    assert plan.best_stages(slow).stages == 4
    assert [layout.crossings > 100 for layout in slow] == [True, True, False]
    assert slow[-1].crossings == 3


def test_a_stage_after_the_other_takes_as_long_as_all_ranks_of_one():
    """Without a network, a single stream gains nothing from stages: each works a quarter of the time, for as long."""
    one, two, four = (layout.speed.decode_tokens_per_second for layout in staged(Network(0.0, 1e15)))
    assert one / two == pytest.approx(2, rel=0.1)
    assert one / four == pytest.approx(4, rel=0.1)


def test_prompts_keep_the_stages_busy():
    one, two, four = (layout.speed.prefill_tokens_per_second for layout in staged(Network(0.0, 1e15)))
    assert 0.85 < two / one < 1.1
    assert 0.75 < four / one < 1.1


def test_sequences_that_take_turns_keep_the_stages_busy():
    """Where products are all that takes time, in halves or quarters of the sequences as well."""
    one, two, four = (layout.speed.decode_tokens_per_second for layout in staged(Network(0.0, 1e15), batch=64))
    assert 0.85 < two / one < 1.1
    assert 0.75 < four / one < 1.1


def test_the_way_through_all_stages_limits_what_taking_turns_gains():
    """With a latency of 100 ms four stages wait for it, and more sequences take hardly any time of their own."""
    few, more = (staged(Network(0.1, 1e15), batch=batch)[-1] for batch in (16, 24))
    seconds = [each.plan.request.batch / each.speed.decode_tokens_per_second for each in (few, more)]
    assert seconds[1] == pytest.approx(seconds[0], rel=0.1)


def test_stages_need_no_more_memory_than_one():
    needs = [sum(layout.plan.nodes) for layout in staged(Network(1e-3, 1e9))]
    assert max(needs) == pytest.approx(min(needs), rel=0.02)


def test_more_nodes_are_as_many_as_stages_divide():
    """Five nodes would have the memory, but four stages share four nodes, or eight."""
    tight = plan.make_plan(request(memory=52 * GB, stages=4))
    (more,) = [each.plan for each in plan.remedies(tight) if each.text.startswith("--nodes")]
    assert not tight.fits
    assert more.fits
    assert more.request.nodes == 8


def test_the_command_compares_stages():
    options = ("--shape", "llama-3.1-70b", "--nodes", "2", "--max-seq-len", "2048", "--network", "1ms,120MB/s")
    shown = run(None, *PROGRAM, "plan", *options)
    assert "Best: --pipeline 2" in shown.stdout
    found = json.loads(run(None, *PROGRAM, "plan", *options, "--pipeline", "2", "--json").stdout)
    assert found["best_pipeline"] == 2
    speeds = [layout["decode_tokens_per_second"] for layout in found["layouts"]]
    assert found["speed"]["decode_tokens_per_second"] == speeds[1] > speeds[0]
    assert found["speed"]["messages_per_step"] == 1
    wrong = run(None, *PROGRAM, "plan", *options, "--pipeline", "3")
    assert (wrong.status, wrong.stderr.count("\n")) == (2, 1)


SLOW_NODES = ("--shape", "llama-3.1-70b", "--nodes", "2", "--max-seq-len", "2048", "--network", "1ms,120MB/s")


@pytest.mark.parametrize(
    ("asked", "written", "told"),
    [
        ((), 2, "runs with --pipeline 2, the best, which is what is planned here."),
        (("--pipeline", "1"), 1, "runs with --pipeline 1, as asked for; --pipeline 2 is best."),
        (("--pipeline", "2"), 2, ""),
        (("--network", "2us,12GB/s"), 1, ""),
    ],
)
def test_a_job_script_has_the_best_stages_unless_others_are_asked_for(asked, written, told, tmp_path, capsys):
    """And what is planned, shown and told in JSON is what the script runs."""
    script = tmp_path / "job.sbatch"
    words = ["plan", *SLOW_NODES, *asked, "--sbatch", str(script)]
    assert main(words) == 0
    assert ("--pipeline 2" in script.read_text()) == (written == 2)
    shown = capsys.readouterr().out
    assert ("job.sbatch runs with" in shown) == bool(told)
    assert told in shown
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pipeline"] == written
    (layout,) = [each for each in found["layouts"] if each["pipeline"] == written]
    assert found["speed"]["decode_tokens_per_second"] == layout["decode_tokens_per_second"]


def test_a_layer_that_drafts_has_one_stage(tmp_path, capsys):
    words = ["plan", "--model", "data/demo.h5", "--nodes", "2", "--network", "1ms,120MB/s"]
    words += ["--draft-model", "data/demo-mtp.h5"]
    script = tmp_path / "job.sbatch"
    assert main([*words, "--sbatch", str(script), "--json"]) == 0
    assert [each["pipeline"] for each in json.loads(capsys.readouterr().out)["layouts"]] == [1]
    assert "--pipeline" not in script.read_text()
    assert main([*words, "--pipeline", "2"]) == 2
    assert "a layer that drafts tokens needs --pipeline 1" in capsys.readouterr().err


def test_without_a_script_one_stage_is_planned_as_runs_have_it(capsys):
    assert main(["plan", *SLOW_NODES, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pipeline"], found["best_pipeline"]) == (1, 2)


def test_stages_that_cannot_divide_positions_are_not_compared():
    """Of the 8 KV heads 16 ranks hold each twice, but 8, 4, 2 and 1 of a stage hold none that another has."""
    asked = request("llama-3.1-70b", nodes=16, context=2048, context_parallel=True)
    found = plan.plans_of_stages(asked, plan.Node(200e9, 2e12), Network(1e-3, 120e6))
    assert [layout.stages for layout in found] == [1]
    usual = plan.plans_of_stages(replace(asked, context_parallel=False), plan.Node(200e9, 2e12), Network(1e-3, 120e6))
    assert [layout.stages for layout in usual] == [1, 2, 4, 8, 16]


# -- drafts ------------------------------------------------------------------------------------------------------------

NODE, NETWORK = plan.Node(200e9, 2e12), Network(2e-6, 12e9)


@pytest.mark.parametrize(("acceptance", "tokens"), [(0.0, 1.0), (0.5, 1.875), (1.0, 4.0)])
def test_steps_that_drafts_save(acceptance, tokens):
    """Three drafts: 1 + a + a^2 + a^3 tokens a step; where a step costs no more for them, that is the gain."""
    drafted = plan.DraftRequest(3, acceptance)
    found = plan.predict_drafts(plan.make_plan(request("llama-3.2-1b", nodes=1, draft=drafted)), NODE, NETWORK)
    assert found.tokens_per_step == pytest.approx(tokens)
    assert found.steps_saved == pytest.approx(1 - 1 / tokens)
    assert found.gain == pytest.approx(tokens, rel=0.01)
    assert found.expert_reads is None


def test_experts_that_a_step_with_drafts_reads():
    """f(r) = E (1 - (1 - k/E)^r) / k, and the bytes of a step grow with it."""
    assert plan.expert_reads(256, 8, 1) == 1
    assert plan.expert_reads(256, 8, 3) == pytest.approx(2.907, abs=0.001)
    assert plan.expert_reads(8, 2, 1000) == pytest.approx(4)
    asked = request("deepseek-r1", draft=plan.DraftRequest(2, 0.8))
    found = plan.predict_drafts(plan.make_plan(asked), NODE, NETWORK)
    assert found.expert_reads == pytest.approx(plan.expert_reads(256, 8, 3))
    one, three = (plan.predict(plan.make_plan(replace(asked, rows=rows)), NODE, NETWORK) for rows in (1, 3))
    assert 1.5 < three.bytes_per_step / one.bytes_per_step < found.expert_reads


@pytest.mark.parametrize("alone", [False, True])
def test_a_draft_model_takes_memory_and_time(alone):
    small, types = ModelConfig.from_hf(shape_config("llama-3.2-1b")), WeightTypes(WEIGHT_TYPES["q4_0"])
    asked = request("llama-3.1-70b", nodes=2, draft=plan.DraftRequest(4, 0.7, small, types, alone))
    made = plan.make_plan(asked)
    weights = [rank.draft for rank in made.ranks]
    assert weights[0] > (0.6 if alone else 0.3) * GB
    assert (weights[1] == 0) == alone
    assert [rank.total - rank.draft for rank in made.ranks] == [
        rank.total for rank in plan.make_plan(replace(asked, draft=None)).ranks
    ]
    found = plan.predict_drafts(made, NODE, NETWORK)
    free = plan.predict_drafts(plan.make_plan(replace(asked, draft=plan.DraftRequest(4, 0.7))), NODE, NETWORK)
    assert 0 < found.draft_share < 0.3
    assert found.decode_tokens_per_second < free.decode_tokens_per_second
    assert free.draft_share == 0


def test_the_plan_tells_of_drafts(capsys):
    from mpillama.__main__ import main

    common = ("plan", "--shape", "deepseek-r1", "--nodes", "8", "--max-seq-len", "2048")
    assert main([*common, "--speculate", "2", "--acceptance", "0.8"]) == 0
    assert "2.44 tokens a step, 59 % of the steps saved" in capsys.readouterr().out
    assert main([*common, "--draft-model", "data/demo.h5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drafts"]["tokens_per_step"] == pytest.approx(2.7731)
    assert found["ranks"][7]["draft"] > 0


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A draft model with a shorter context than the models that it drafts for."""
    path = tmp_path_factory.mktemp("short") / "short.h5"
    write_toy(path, "q8_0", {**TOY, "max_position_embeddings": 64})
    return path


@pytest.mark.parametrize(("kind", "longest"), [("toy", 64), ("delta", 512)])
def test_a_run_with_a_draft_model_takes_what_is_planned(kind, longest, short, model_file, capsys):
    """A block of the draft model for each of the model's, however short its own context is; states of both."""
    from mpillama.__main__ import main

    model = model_file(kind, "q8_0")
    draft = short if longest == 64 else model
    options = ("--model", model, "--draft-model", draft, "--speculate", "5", "--max-seq-len", "512", "--json")
    asked = ("--prompt-token-ids", "5,6,7", "--max-tokens", "3", "--threads", "1")
    (used,) = json.loads(run(None, *PROGRAM, "generate", *options, *asked).stdout)["memory_bytes_per_rank"]
    assert main(["plan", *map(str, options), "--threads", "1"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["ranks"]
    assert (planned["weights"], planned["kv_cache"], planned["states"]) == (
        used["weights"],
        used["kv_cache"],
        used["states"],
    )
    file = open_model(str(draft))
    memory = MemoryModel(file.config, file.specs, Division(1), "f16", 256)
    buffers = [memory.of_ranks(context)[0].buffers for context in (longest, 0)]  # at the full context, and at first
    assert planned["draft"] - buffers[0] == used["draft"] - buffers[1]


@pytest.mark.parametrize(
    "option", ["--network=1us,0GB/s", "--memory-bandwidth=0", "--compute=0MAC/s", "--read-bandwidth=0"]
)
def test_a_speed_of_nothing_is_a_mistake(option, capsys):
    assert main(["plan", "--shape", "qwen3-0.6b", "--nodes", "2", option]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mpillama: {option.partition('=')[0]}: a speed of 0")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("nodes", "context", "told"), [("16", "40960", False), ("64", "64", True)])
def test_ranks_that_gain_nothing_are_told(nodes, context, told, capsys):
    """And no division of the cache by positions that would take more."""
    assert main(["plan", "--shape", "qwen3-0.6b", "--nodes", nodes, "--max-seq-len", context]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("too small for 64 ranks: more than 16 gain nothing" in shown) is told
    assert ("--context-parallel" in shown) is not told
