"""`plan`: what a run needs of each rank and node, and whether it fits; needs no MPI and reads no weights."""

import json
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpillama.cli.display import in_number, in_units, print_sentence, print_table, stages
from mpillama.cli.options import PlanOptions
from mpillama.cli.values import output_file, refuse_unwritable
from mpillama.errors import UserError
from mpillama.loading.memory import RESERVE
from mpillama.loading.model_file import open_model
from mpillama.loading.plan import (
    LAYER_SECONDS,
    STEP_SECONDS,
    DraftRequest,
    DraftSpeed,
    Node,
    Plan,
    PlanRequest,
    Remedy,
    Speed,
    StagePlan,
    Waiting,
    best_stages,
    make_plan,
    plans_of_stages,
    predict,
    predict_drafts,
    remedies,
    shared_by_measure,
)  # fmt: skip
from mpillama.loading.settings import DEFAULT_DRAFTS, parse_bytes, parse_number, refuse_staged_mtp
from mpillama.loading.shares import Measured, by_positions, divide, read_shares
from mpillama.loading.traffic import MESSAGE_SECONDS, Network, refuse_coarse_sums
from mpillama.models.config import ModelConfig
from mpillama.models.shapes import AS_PUBLISHED, shape_config, types_of_shape
from mpillama.models.tensors import WeightTypes

ENVIRONMENT = r"""# -- environment: the same lines in every script; jobs/README.md explains them --
if [[ -n ${MODULES:-} ]]; then
    # shellcheck disable=SC1091  # where the shell has not inherited `module`, the profile defines it
    [[ $(type -t module) == function ]] || source /etc/profile
    # shellcheck disable=SC2086  # a list of modules
    module load $MODULES || exit 2
fi
set -euf -o pipefail
unset SLURM_EXPORT_ENV # after `sbatch --export=...`, srun would start ranks without this environment
if [[ -n ${VENV:-} || -d .venv ]]; then
    PATH=$(realpath --canonicalize-existing "${VENV:-.venv}/bin"):$PATH
fi
export PATH
LAUNCH=${LAUNCH:-mpirun -n ${SLURM_NTASKS:-${SLURM_NNODES:-1}}}
if [[ $LAUNCH != srun* ]]; then
    unset SRUN_CPUS_PER_TASK # mpirun's own srun would squeeze all ranks of a node into these cores
elif [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since 22.05, srun does not take it over by itself
fi
# -- end of the environment --"""
"""The lines that every script in jobs/ has too."""


def job_script(options: PlanOptions) -> str:
    """Return the text of a script that runs what was planned."""
    return "\n".join([*_head(options), "", ENVIRONMENT, "", *_command(options), ""])


def _head(options: PlanOptions) -> list[str]:
    return [
        "#!/bin/bash",
        "#SBATCH --job-name=mpillama",
        "#SBATCH --output=%x-%j.out",
        f"#SBATCH --nodes={options.nodes}",
        f"#SBATCH --ntasks-per-node={options.ranks_per_node}",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        "#SBATCH --time=01:00:00",
        '# Words after the script\'s name are passed on to `mpillama generate`, for example --prompt "Once".',
        "#   MODEL  model on the shared file system",
        "#   ARGS   more options, separated by blanks",
        "#   VENV, MODULES, LAUNCH: see jobs/README.md",
    ]


def _command(options: PlanOptions) -> list[str]:
    words = ["--kv-type", options.kv_type]
    words += ["--sync", options.sync] if options.sync != "exact" else []
    if options.max_seq_len is not None:
        words += ["--max-seq-len", str(options.max_seq_len)]
    words += ["--shares", options.shares] if options.shares is not None else []
    words += ["--pipeline", str(options.pipeline)] if options.pipeline not in (None, 1) else []
    words += ["--context-parallel"] if options.context_parallel else []
    words += ["--speculate", str(options.speculate)] if options.speculate else []
    if options.draft_model is not None:
        words += ["--draft-model", options.draft_model, "--draft-ranks", options.draft_ranks]
    if options.model is not None:
        model = f"MODEL=${{MODEL:-{shlex.quote(options.model)}}}"
        words += ["--weights", options.weights] if options.weights not in ("as-stored", AS_PUBLISHED) else []
        words += ["--tokenizer", options.tokenizer] if options.tokenizer is not None else []
    else:
        model = f': "${{MODEL:?is not set: give the {options.shape} that was planned, as a file}}"'
    return [
        model,
        "# shellcheck disable=SC2086  # LAUNCH and ARGS are lists of words",
        f'exec $LAUNCH python -m mpillama generate --model "$MODEL" {shlex.join(words)} ${{ARGS:-}} "$@"',
    ]


DOES_NOT_FIT = 1


def plan(options: PlanOptions) -> int:
    """Run the command; returns the exit status: 1 if it does not fit."""
    refuse_unwritable("--sbatch", options.sbatch)
    with stages(is_root=True, quiet=options.json)("planning"):
        request = _request(options)
        node, software = _node(options)
        network = _network(options.network, software)
        compared = plans_of_stages(request, node, network) if options.nodes > 1 else []
        planned = _of_script(compared) if options.sbatch and options.pipeline is None else None
        planned = planned or make_plan(request)
    speed, even = predict(planned, node, network), None
    if planned.request.shares is not None:
        even = predict(make_plan(replace(planned.request, shares=None)), node, network)
    drafted = predict_drafts(planned, node, network)
    cures = remedies(planned)
    if options.json:
        drafts = {"drafts": asdict(drafted)} if drafted else {}
        report = {**_as_json(planned, speed, even, cures), **drafts, **_layouts_as_json(compared)}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _print(planned, speed, even)
        if drafted:
            _print_drafts(planned, drafted)
        _print_verdict(planned, cures)
        if len(compared) > 1:
            _print_layouts(compared, network)
    if options.sbatch and planned.fits:
        _write_sbatch(replace(options, pipeline=planned.request.stages))
        if not options.json:
            _print_stages_of_script(options, planned.request.stages, compared)
    return 0 if planned.fits else DOES_NOT_FIT


def _of_script(compared: list[StagePlan]) -> Plan | None:
    """The plan that a job script is for, if the user leaves the stages open: the best one that fits, if one does."""
    best = best_stages(compared) if compared else None
    return best.plan if best and best.plan.fits else None


def _request(options: PlanOptions) -> PlanRequest:
    config, types = _model(options)
    known = config.longest_context
    context = config.max_position_embeddings if options.max_seq_len is None else options.max_seq_len
    if not 1 <= context <= known:
        raise UserError(f"--max-seq-len is {context}: this model's context holds 1 to {known} tokens.")
    memory = parse_bytes("--memory-per-node", options.memory_per_node)
    nodes, ranks = options.nodes, options.ranks_per_node
    if options.layers is not None:
        if not 1 <= options.layers <= config.num_hidden_layers:
            raise UserError(f"--layers is {options.layers}: this model has 1 to {config.num_hidden_layers} layers.")
        config = config.first_layers(options.layers) if options.model else config.some_layers(options.layers)
    bench_trial = options.shape is not None and options.layers is not None  # without texts
    sizes = (nodes, ranks, memory, context, options.batch, options.kv_type)
    request = PlanRequest(
        config, types, *sizes, tokenizer=not bench_trial, sync=options.sync, stages=options.pipeline or 1,
        threads=options.threads, draft=_draft(options), context_parallel=options.context_parallel,
    )  # fmt: skip
    even = divide(request.ranks, request.stages, None, config.most_stages)
    if options.context_parallel:
        by_positions(even, config)
    return request if options.shares is None else _with_shares(request, read_shares(options.shares))


def _draft(options: PlanOptions) -> DraftRequest | None:
    """What is drafted, and by which model."""
    if options.draft_model is None:
        return DraftRequest(options.speculate, options.acceptance_rate) if options.speculate else None
    file = open_model(options.draft_model)
    refuse_staged_mtp(options.draft_model, bool(file.config.mtp), options.pipeline or 1)
    tokens = options.speculate or DEFAULT_DRAFTS
    return DraftRequest(
        tokens, options.acceptance_rate, file.config, file.weight_types, alone=options.draft_ranks == "first"
    )


def _with_shares(request: PlanRequest, shares: tuple[float, ...] | list[Measured]) -> PlanRequest:
    """Ranks of a measurement are those of the plan in the same order, whatever their hosts are called."""
    if isinstance(shares, tuple):
        divide(request.ranks, request.stages, shares, request.config.most_stages)
        return replace(request, shares=shares)
    if len(shares) != request.ranks:
        raise UserError(
            f"--shares has measurements of {len(shares)} ranks: plan as many (--nodes times --ranks-per-node is "
            f"{request.ranks})."
        )
    return shared_by_measure(request, shares)


def _model(options: PlanOptions) -> tuple[ModelConfig, WeightTypes]:
    if options.shape is not None:
        config = ModelConfig.from_hf(shape_config(options.shape))
        refuse_coarse_sums(options.sync, config, options.shape)
        return config, types_of_shape(options.shape, options.weights, config)
    file = open_model(options.model or "", options.weights, options.tokenizer)
    refuse_coarse_sums(options.sync, file.config, file.path)
    return file.config, file.weight_types


def _network(text: str, software: float) -> Network:
    """Read LATENCY,BANDWIDTH, for example 2us,12GB/s."""
    latency, _, bandwidth = text.partition(",")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(us|ms|s)\s*", latency)
    if not match or not bandwidth:
        raise UserError(f"--network {text!r} is not of the form LATENCY,BANDWIDTH, for example 2us,12GB/s.")
    seconds = float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]
    return Network(seconds, _bandwidth("--network", bandwidth), software)


def _bandwidth(option: str, text: str) -> int:
    """Bytes per second, above 0."""
    return _above_zero(option, text, parse_bytes(option, text))


def _above_zero(option: str, text: str, speed: int) -> int:
    """UserError for a speed by which nothing would ever be done."""
    if not speed:
        raise UserError(f"{option}: a speed of {text} is none: give more than 0.")
    return speed


def _node(options: PlanOptions) -> tuple[Node, float]:
    """As given, or a host's part of what a saved `bench --json` measured; and what software adds to a message."""
    read = _bandwidth("--read-bandwidth", options.read_bandwidth) if options.read_bandwidth else None
    if options.bench is None:
        compute = parse_number("--compute", options.compute, "MAC", "multiply-adds a second: write it like 2TMAC/s")
        compute = _above_zero("--compute", options.compute, compute)
        bandwidth = _bandwidth("--memory-bandwidth", options.memory_bandwidth)
        return Node(bandwidth, compute, read, None, STEP_SECONDS, LAYER_SECONDS), MESSAGE_SECONDS
    try:
        found = json.loads(Path(options.bench).read_text())
        hosts = int(found.get("hosts", 1))  # older ones do not tell
        compute = max(entry["multiply_adds_per_second"] for entry in found["prefill"]) / hosts
        beside = found["decode"][0].get("overhead_seconds", {})  # older ones have none
        step, layer = beside.get("step", STEP_SECONDS), beside.get("layer", LAYER_SECONDS)
        measured = float(found["read_bandwidth_bytes_per_second"]) / hosts
        node = Node(measured, float(compute), read, _waiting(found), float(step), float(layer))
        message = beside.get("message")  # None of a single host
        return node, MESSAGE_SECONDS if message is None else float(message)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"--bench {options.bench}: is no output of `bench --json` ({error}).") from error


def _waiting(bench: dict[str, Any]) -> Waiting | None:
    """What ranks waited in the decode step of the fewest sequences, if a `bench --where` of several ranks says so."""
    step = next((step for step in bench.get("where", ()) if "waiting_share_of_work" in step), None)
    return Waiting(float(step["waiting_share_of_work"]), int(bench["ranks"])) if step else None


def _as_json(planned: Plan, speed: Speed, even: Speed | None, cures: list[Remedy]) -> dict[str, Any]:
    shares = {"shares": planned.request.shares, "speed_with_even_shares": asdict(even)} if even else {}
    return {
        **shares,
        "fits": planned.fits,
        "pipeline": planned.request.stages,
        "headroom_bytes_per_node": planned.headroom,
        "inequality": planned.inequality,
        "bytes_per_node": planned.nodes,
        "kv_cache_bytes_if_divided_by_positions": planned.cache_by_positions,
        "ranks": [{"rank": rank, **asdict(memory), "total": memory.total} for rank, memory in enumerate(planned.ranks)],
        "speed": asdict(speed),
        "remedies": [{"change": cure.text, "headroom_bytes_per_node": cure.plan.headroom} for cure in cures],
    }


def _print(planned: Plan, speed: Speed, even: Speed | None) -> None:
    request, rows = planned.request, list[tuple[str, ...]]()
    count = len(planned.ranks)
    fullest = max(range(count), key=lambda rank: planned.ranks[rank].total)
    for rank in range(count) if count <= 8 else sorted({0, 1, 2, fullest, count - 1}):
        r, mark = planned.ranks[rank], " (most)" if rank == fullest and planned.inequality > 0 else ""
        states = (r.states,) if request.config.has_state else ()
        draft = (r.draft,) if any(each.draft for each in planned.ranks) else ()
        row = (r.weights, r.embedding, r.kv_cache, *states, r.buffers, *draft, r.python, r.total, r.reads)
        share = [f"{100 * r.weights / sum(each.weights for each in planned.ranks):.1f} %"] if request.shares else []
        rows.append((f"{rank}{mark}", *share, *map(in_units, row)))
    states_column = ("states",) if request.config.has_state else ()
    draft_column = ("draft model",) if any(each.draft for each in planned.ranks) else ()
    columns = ("weights", "embedding, head", "KV cache", *states_column, "buffers", *draft_column)
    columns = (*columns, "Python", "total", "reads")
    print_table(("rank", *(["share"] if request.shares else []), *columns), rows)
    on = f"{in_number(request.nodes, 'node')} x {in_number(request.ranks_per_node, 'rank')}"
    print_sentence(
        f"{on}: the fullest needs {in_units(max(planned.nodes))} of {in_units(_memory_of_fullest(planned))}, "
        f"{in_units(RESERVE)} a rank in reserve; the fullest rank is {100 * planned.inequality:.1f} % above the mean."
    )
    busy, group = request.config.most_busy_ranks, request.division.group
    if request.shares is None and busy < group:
        print_sentence(
            f"The model is too small for {group} ranks{' in a stage' if request.stages > 1 else ''}: more than {busy} "
            "gain nothing. Several replicas (`batch` and `serve` with --tensor-parallel) use the others."
        )
    most = max(r.kv_cache for r in planned.ranks)
    if planned.repeats_cache and planned.cache_by_positions < most:
        print_sentence(
            f"Several ranks hold the same part of the KV cache, {in_units(most)} on a rank; "
            f"divided by positions (--context-parallel) it would be {in_units(planned.cache_by_positions)}."
        )
    loads = f", loads in {speed.load_seconds:.0f} s" if speed.load_seconds else ""
    communication = (
        f", {100 * speed.communication_share:.0f} % of it communication "
        f"({speed.messages_per_step} messages, {in_units(speed.communication_bytes_per_step)} a rank and step)"
    )
    if speed.waiting_share:
        communication += f" and {100 * speed.waiting_share:.0f} % waiting for late ranks"
    print_sentence(
        f"Predicted: decode {speed.decode_tokens_per_second:.2f} tok/s at the full context"
        f"{communication if request.ranks > 1 else ''}; "
        f"prefill {speed.prefill_tokens_per_second:.0f} tok/s without attention{loads}."
    )
    if even:
        gain = speed.decode_tokens_per_second / even.decode_tokens_per_second
        print_sentence(
            f"With these shares: {gain:.2f} times the {even.decode_tokens_per_second:.2f} tok/s of even shares."
        )


def _print_drafts(planned: Plan, drafted: DraftSpeed) -> None:
    draft = planned.request.draft
    assert draft is not None
    experts = (
        f"; a step reads {drafted.expert_reads:.1f} times the experts of one token" if drafted.expert_reads else ""
    )
    model = f"; {100 * drafted.draft_share:.0f} % of the time is the draft model's" if draft.config else ""
    print_sentence(
        f"With {in_number(draft.tokens, 'draft')} for each sequence, {100 * draft.acceptance:.0f} % of them true: "
        f"{drafted.tokens_per_step:.2f} tokens a step, {100 * drafted.steps_saved:.0f} % of the steps saved, decode "
        f"{drafted.decode_tokens_per_second:.2f} tok/s, {drafted.gain:.2f} times that without{experts}{model}."
    )


def _layouts_as_json(compared: list[StagePlan]) -> dict[str, Any]:
    if not compared:
        return {}
    found = [
        {
            "pipeline": layout.stages,
            "fits": layout.plan.fits,
            "bytes_of_fullest_node": max(layout.plan.nodes),
            "decode_tokens_per_second": layout.speed.decode_tokens_per_second,
            "prefill_tokens_per_second": layout.speed.prefill_tokens_per_second,
        }
        for layout in compared
    ]
    return {"layouts": found, "best_pipeline": best_stages(compared).stages}


def _print_layouts(compared: list[StagePlan], network: Network) -> None:
    """The ways to divide the nodes into stages, and which is best, and why."""
    header = ("stages x ranks", "fullest node", "fits", "decode tok/s", "prefill tok/s", "communication")
    rows = [
        (
            f"{layout.stages} x {layout.plan.request.division.group}",
            in_units(max(layout.plan.nodes)),
            "yes" if layout.plan.fits else "no",
            f"{layout.speed.decode_tokens_per_second:.2f}",
            f"{layout.speed.prefill_tokens_per_second:.0f}",
            f"{100 * layout.speed.communication_share:.0f} %",
        )
        for layout in compared
    ]
    print_table(header, rows)
    best = best_stages(compared)
    one = next((layout for layout in compared if layout.stages == 1), best)
    ratio = best.speed.decode_tokens_per_second / one.speed.decode_tokens_per_second
    if best.stages == 1:
        print_sentence(
            "Best: --pipeline 1, all ranks divide every layer: stages would wait for each other longer than the sums "
            "over this network take."
        )
    elif one.plan.fits:
        print_sentence(
            f"Best: --pipeline {best.stages}, {ratio:.2f} times the decode speed of one stage: a step meets the "
            f"network of {1e6 * network.latency:.0f} µs {_times(best.crossings)} instead of {_times(one.crossings)}."
        )
    else:
        print_sentence(f"Best: --pipeline {best.stages}, the fastest that fits.")


def _print_stages_of_script(options: PlanOptions, stages: int, compared: list[StagePlan]) -> None:
    """Where a script has more stages than `generate` by itself, or other ones than are best."""
    if stages not in [layout.stages for layout in compared]:
        return
    best = best_stages(compared).stages
    if options.pipeline is None and stages > 1:
        print_sentence(f"{options.sbatch} runs with --pipeline {stages}, the best, which is what is planned here.")
    elif stages != best:
        print_sentence(f"{options.sbatch} runs with --pipeline {stages}, as asked for; --pipeline {best} is best.")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _memory_of_fullest(planned: Plan) -> int:
    """What the node has that needs most."""
    return max(zip(planned.nodes, planned.request.memory_of_nodes, strict=True))[1]


def _print_verdict(planned: Plan, cures: list[Remedy]) -> None:
    if planned.fits:
        sys.stdout.write(f"fits, {in_units(planned.headroom)} stay free on the fullest node\n")
        return
    sys.stdout.write(f"does not fit: {in_units(-planned.headroom)} too much on the fullest node\n")
    for cure in cures:
        sys.stdout.write(f"  would fit with {cure.text} ({in_units(cure.plan.headroom)} free)\n")
    if not cures:
        sys.stdout.write("  no single change of context, KV type, weights or number of nodes makes it fit\n")


def _write_sbatch(options: PlanOptions) -> None:
    with output_file("--sbatch", options.sbatch or "") as file:
        file.write(job_script(options).encode())
