"""What a run will need of each rank and node, before it is queued: memory exactly, speed by the limits.

Memory is that of loading/memory.py. Speed: decode reads the weights and the KV cache once a token, and changes
recurrent states; the network adds the latencies and bytes of loading/traffic.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mpillama.loading.memory import RESERVE, MemoryModel, RankMemory
from mpillama.loading.settings import state_slots
from mpillama.loading.shares import Measured, measured_division, repeats_cache
from mpillama.loading.traffic import (
    COARSE_BITS,
    EXACT_BITS,
    Layout,
    Network,
    Sent,
    pieces_sent,
    step_seconds,
    step_sent,
)
from mpillama.models.cache import STATES_OF_DRAFTS, held_blocks
from mpillama.models.config import ModelConfig
from mpillama.models.partition import Division, micro_batches, steps_at_once
from mpillama.models.tensors import EMBEDDING, LM_HEAD, TensorSpec, WeightTypes
from mpillama.models.weights import slice_bytes
from mpillama.quant.registry import SMALLEST

GOOD_EFFICIENCY = 0.85
"""The share of the read bandwidth that a decode step reaches."""
STEP_SECONDS, LAYER_SECONDS = 5e-4, 2e-5
"""What a step and a layer take beside what they read, where `bench` has not measured it (docs/performance.md)."""


@dataclass(frozen=True)
class PlanRequest:
    """What the user wants to run, and on what."""

    config: ModelConfig
    types: WeightTypes
    nodes: int
    ranks_per_node: int
    memory_per_node: int
    max_seq_len: int
    batch: int
    kv_type: str
    prefill_chunk: int = 256
    tokenizer: bool = True
    threads: int = 16
    shares: tuple[float, ...] | None = None
    measured: tuple[Measured, ...] | None = None
    """Each rank's bandwidth and memory, if they are known one by one."""
    stages: int = 1
    sync: str = "exact"
    context_parallel: bool = False
    draft: "DraftRequest | None" = None
    rows: int = 1
    """Positions of each sequence that a decode step computes: more than one with drafts."""
    drafts_for: "PlanRequest | None" = None
    """Of a draft model: the model that it drafts for."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @cached_property
    def staged(self) -> list["StageTraffic"]:
        """The stages, and how their ranks lie on nodes."""
        group, bits = self.division.group, COARSE_BITS if self.sync == "q80" else EXACT_BITS
        layout = Layout(-(-group // self.ranks_per_node), min(group, self.ranks_per_node), bits)
        last, holders = self.layers_of_stages[-1], self.division.holders
        divided = self.max_seq_len if holders > 1 else 0
        return [
            StageTraffic(
                replace(self.config, blocks=self.config.blocks[own.start : own.stop]), layout, own == last, divided
            )
            for own in self.layers_of_stages
        ]

    @cached_property
    def specs(self) -> list[TensorSpec]:
        return self.config.tensors(self.types)

    @property
    def division(self) -> Division:
        return Division(self.ranks, self.shares, self.stages, self.context_parallel)

    @cached_property
    def layers_of_stages(self) -> tuple[range, ...]:
        """The layers of each stage, the first ones first."""
        return self.config.layers_of_stages(self.stages)

    @property
    def memory_model(self) -> MemoryModel:
        sizes = (self.kv_type, self.prefill_chunk, self.batch)
        return MemoryModel(
            self.config, self.specs, self.division, *sizes, has_tokenizer=self.tokenizer, states=self.states,
            threads=self.threads,
        )  # fmt: skip

    @property
    def states(self) -> int:
        """Slots for recurrent states."""
        if self.drafts_for is not None:
            return STATES_OF_DRAFTS * self.batch
        return state_slots(self.batch, self.draft.tokens if self.draft else 0)

    @property
    def blocks(self) -> int:
        """Cache blocks of all sequences, on all ranks that divide them."""
        holders = self.division.holders
        return held_blocks(self.max_seq_len, holders) * holders * self.batch

    @property
    def memory_of_nodes(self) -> list[int]:
        """Bytes that each node has."""
        if self.measured is None:
            return [self.memory_per_node] * self.nodes
        ranks = [rank.memory for rank in self.measured]
        return [sum(ranks[i : i + self.ranks_per_node]) for i in range(0, len(ranks), self.ranks_per_node)]

    def speeds(self, node: "Node") -> list[float]:
        """Bytes per second that each rank reads from memory."""
        if self.measured is None:
            return [node.memory_bandwidth / self.ranks_per_node] * self.ranks
        return [rank.bandwidth for rank in self.measured]


@dataclass(frozen=True)
class DraftRequest:
    """How tokens are drafted: so many of each sequence, of which a share comes true; by a model if there is a `config`,
    on all ranks or on rank 0 alone.
    """

    tokens: int
    acceptance: float
    config: ModelConfig | None = None
    types: WeightTypes = field(default_factory=lambda: WeightTypes(SMALLEST))
    alone: bool = False

    def plan(self, request: PlanRequest) -> "Plan | None":
        """The draft model's own plan beside a model, on the ranks that hold it."""
        if self.config is None:
            return None
        context = min(request.max_seq_len, self.config.longest_context)
        nodes, ranks = (1, 1) if self.alone else (request.nodes, request.ranks_per_node)
        sizes = (self.config, self.types, nodes, ranks, request.memory_per_node, context, request.batch)
        return make_plan(
            PlanRequest(
                *sizes, request.kv_type, request.prefill_chunk, tokenizer=False, threads=request.threads,
                drafts_for=request,
            )
        )  # fmt: skip

    @property
    def tokens_per_step(self) -> float:
        """Drafts count up to the first that does not come true; behind the last one that does comes one more token."""
        return sum(self.acceptance**i for i in range(self.tokens + 1))


def shared_by_measure(request: PlanRequest, measured: Sequence[Measured]) -> PlanRequest:
    """The request with shares by each rank's bandwidth, limited by its memory."""
    known = replace(request, measured=tuple(measured))
    division = measured_division(measured, known.memory_model, request.max_seq_len)
    return replace(known, shares=division.shares)


@dataclass(frozen=True)
class StageTraffic:
    """What the ranks of a stage say to each other: a model of its layers, and how they lie on nodes."""

    config: ModelConfig
    layout: Layout
    samples: bool
    divided: int = 0
    """Positions of a sequence that the ranks divide, 0 if they do not."""

    def sent(self, network: Network, tokens: int) -> Sent:
        """What a node's first rank sends in a step of decoding."""
        pieces = pieces_sent(self.config, self.layout, tokens, self.divided)
        return step_sent(self.config, self.layout, tokens, network, tokens * self.samples) + pieces

    def seconds(self, network: Network, tokens: float, prefill: bool) -> float:
        """Seconds of a step or a part of one."""
        rows, count = 0 if prefill or not self.samples else math.ceil(tokens), math.ceil(tokens)
        context = min(1, self.divided) if prefill else self.divided  # prefill is predicted without attention
        pieces = pieces_sent(self.config, self.layout, count, context).seconds(network)
        return step_seconds(self.config, self.layout, count, network, rows) + pieces


@dataclass(frozen=True)
class Plan:
    """Every rank's needs, and the nodes'."""

    request: PlanRequest
    ranks: tuple[RankMemory, ...]

    @property
    def nodes(self) -> list[int]:
        """Bytes that each node needs, the ranks' reserve included; ranks fill node after node."""
        per_node = self.request.ranks_per_node
        needs = [rank.total + RESERVE for rank in self.ranks]
        return [sum(needs[i : i + per_node]) for i in range(0, len(needs), per_node)]

    @property
    def headroom(self) -> int:
        """Bytes that stay free on the fullest node; below 0 if it does not fit."""
        return min(has - need for has, need in zip(self.request.memory_of_nodes, self.nodes, strict=True))

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def cache_by_positions(self) -> int:
        """Bytes of the fullest rank's cache with --context-parallel."""
        request = replace(self.request, context_parallel=True)
        parts = request.config.partition(request.division)
        held = held_blocks(request.max_seq_len, request.division.holders) * request.batch
        return held * max(request.memory_model.cache_block_bytes(part) for part in parts)

    @property
    def repeats_cache(self) -> bool:
        """Whether several ranks hold the same part of the cache."""
        request = self.request
        return not request.context_parallel and repeats_cache(request.config, request.division)

    @property
    def beside_model(self) -> list[int]:
        """Bytes that a draft model takes on each rank: it has a block for each of the model's, of any length."""
        main, request = self.request.drafts_for, self.request
        assert main is not None
        parts = request.config.partition(request.division)
        blocks = [request.memory_model.cache_block_bytes(part) * main.blocks for part in parts]
        return [r.total - r.python - r.kv_cache + size for r, size in zip(self.ranks, blocks, strict=True)]

    @property
    def inequality(self) -> float:
        """The fullest rank's excess over the mean, as a share."""
        totals = [r.total for r in self.ranks]
        return max(totals) / (sum(totals) / len(totals)) - 1


def make_plan(request: PlanRequest) -> Plan:
    """Compute what every rank needs."""
    ranks = request.memory_model.of_ranks(request.max_seq_len)
    of_draft = request.draft.plan(request) if request.draft else None
    drafts = of_draft.beside_model if of_draft else []
    drafts += [0] * (len(ranks) - len(drafts))
    return Plan(request, tuple(replace(rank, draft=size) for rank, size in zip(ranks, drafts, strict=True)))


# -- remedies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remedy:
    """A change that makes a plan fit, checked by planning it."""

    text: str
    plan: Plan


def remedies(plan: Plan) -> list[Remedy]:
    """The cheapest single changes that make it fit: context, KV type, weights, ranks."""
    return list(_remedies(plan)) if not plan.fits else []


def _remedies(plan: Plan) -> Iterator[Remedy]:
    request = plan.request
    shorter = _largest_context(request)
    if shorter:
        changed = make_plan(replace(request, max_seq_len=shorter))
        yield Remedy(f"--max-seq-len {shorter} instead of {request.max_seq_len}", changed)
    candidates = [(f"--kv-type {kind}", replace(request, kv_type=kind)) for kind in ("q8", "q4")]
    if plan.repeats_cache:
        candidates.append(("--context-parallel", replace(request, context_parallel=True)))
    if any(s.weight_type != SMALLEST for s in request.specs if not s.vector):
        candidates.append((f"--weights {SMALLEST.name}", replace(request, types=WeightTypes(SMALLEST))))
    for text, changed_request in candidates:
        changed = make_plan(changed_request)
        if changed.fits:
            yield Remedy(text, changed)
    more = None if request.measured or request.shares else _least_nodes(request)
    if more:
        yield Remedy(f"--nodes {more.request.nodes} instead of {request.nodes}", more)


def _largest_context(request: PlanRequest) -> int:
    """The longest context, in steps of 64 positions, that fits; 0 if none does."""
    low, high = 0, request.max_seq_len // 64
    while low < high:
        middle = (low + high + 1) // 2
        if make_plan(replace(request, max_seq_len=64 * middle)).fits:
            low = middle
        else:
            high = middle - 1
    return 64 * low


def _least_nodes(request: PlanRequest) -> Plan | None:
    """The fewest nodes that fit; None if more ranks than the model has parts would be needed."""
    step = request.stages // math.gcd(request.stages, request.ranks_per_node)  # nodes that stages can share evenly
    most = request.config.most_busy_ranks * request.stages // request.ranks_per_node // step
    low = -(-request.nodes // step)
    high = max(low, most)
    if not make_plan(replace(request, nodes=step * high)).fits:
        return None
    while low < high:
        middle = (low + high) // 2
        if make_plan(replace(request, nodes=step * middle)).fits:
            high = middle
        else:
            low = middle + 1
    return make_plan(replace(request, nodes=step * low))


# -- speed ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """A prediction for one step of `batch` sequences; messages and bytes are those that a host's first rank sends."""

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    bytes_per_step: int
    messages_per_step: int
    communication_bytes_per_step: int
    communication_share: float
    load_seconds: float | None
    waiting_share: float
    """What ranks wait for late ones, if it was measured."""


@dataclass(frozen=True)
class Waiting:
    """What ranks waited for each other in a measured run of `ranks`, as a share of their work."""

    share: float
    ranks: int

    def seconds(self, work: float, ranks: int) -> float:
        """What they will wait where each works so long.

        Delays that come by chance add up as the latest of n does: with the root of log n.
        """
        return work * self.share * math.sqrt(math.log(ranks) / math.log(self.ranks)) if ranks > 1 else 0.0


@dataclass(frozen=True)
class Node:
    """What a node does in a second: bytes read from memory, multiply-adds, and bytes read from the file system."""

    memory_bandwidth: float
    multiply_adds: float
    read_bandwidth: float | None = None
    waiting: Waiting | None = None
    step_seconds: float = 0.0
    layer_seconds: float = 0.0
    """What a step, and each of its layers, takes beside that: Python, norms, the meeting of threads."""


def predict(plan: Plan, node: Node, network: Network) -> Speed:
    """Predict decoding at the full context, and prefill without the attention's part."""
    request = plan.request
    positions = request.batch * request.rows
    work, communication = _decode(plan, node, network)
    waiting = node.waiting.seconds(work, request.division.group) if node.waiting else 0.0
    seconds = work + communication + waiting
    chunk, parts = request.prefill_chunk, micro_batches(request.prefill_chunk, request.stages)
    prefill = chunk / sum(_step(plan, node, network, _passing(plan, node, network, chunk / parts, True), parts))
    streamed = _streamed_of_ranks(plan, positions)
    sent = max((stage.sent(network, positions) for stage in request.staged), key=lambda each: each.bytes)
    fullest_read = max(r.reads for r in plan.ranks) * request.ranks_per_node
    hop = _hop(request, positions)
    return Speed(
        request.batch / seconds,
        prefill,
        sum(weights + cache for weights, cache in streamed),
        sent.messages + hop.messages,
        round(sent.bytes + hop.bytes),
        communication / seconds,
        fullest_read / node.read_bandwidth if node.read_bandwidth else None,
        waiting / seconds,
    )


def _hop(request: PlanRequest, tokens: float) -> Sent:
    """What a rank sends to the stage after of a part of a step."""
    return Sent(1, 1, 4 * request.config.padded_hidden_size * tokens) if request.stages > 1 else Sent()


def _decode(plan: Plan, node: Node, network: Network) -> tuple[float, float]:
    """Seconds of work and of communication in which each sequence gets on by a step.

    Each stage has a part of the sequences. A part comes round when it has passed all stages, or when the slowest stage
    is done with all parts: whichever takes longer.
    """
    request, positions = plan.request, plan.request.batch * plan.request.rows
    at_once = steps_at_once(request.batch, request.stages)
    tokens = positions / at_once
    parts = max(1, micro_batches(math.ceil(tokens), request.stages) // at_once)
    passing = _passing(plan, node, network, tokens / parts, prefill=False)
    round_trip = _step(plan, node, network, passing, parts)
    busy = at_once * (node.step_seconds + parts * passing.slowest_work), at_once * parts * passing.slowest_talk
    return max(round_trip, busy, key=sum)


@dataclass(frozen=True)
class Passing:
    """What so many tokens at once take in each stage: seconds of work, and of communication."""

    tokens: float
    works: list[float]
    talks: list[float]

    @property
    def slowest(self) -> int:
        """The stage that takes longest."""
        return max(range(len(self.works)), key=lambda stage: self.works[stage] + self.talks[stage])

    @property
    def slowest_work(self) -> float:
        return self.works[self.slowest]

    @property
    def slowest_talk(self) -> float:
        return self.talks[self.slowest]


def _passing(plan: Plan, node: Node, network: Network, tokens: float, prefill: bool) -> Passing:
    talks = [stage.seconds(network, tokens, prefill) for stage in plan.request.staged]
    return Passing(tokens, _works(plan, node, tokens, prefill), talks)


def _step(plan: Plan, node: Node, network: Network, passing: Passing, parts: int) -> tuple[float, float]:
    """Seconds of work and of communication in a step, which goes through the stages in so many parts.

    The first part passes all stages, the others follow at the pace of the slowest.
    """
    request = plan.request
    hops = (request.stages - 1) * _hop(request, passing.tokens).seconds(network)
    if request.stages > 1:  # the plan: to each stage, and through it
        hops += (1 + math.ceil(math.log2(max(1.0, request.nodes / request.stages)))) * network.round_seconds
    return (
        node.step_seconds + sum(passing.works) + (parts - 1) * passing.slowest_work,
        sum(passing.talks) + (parts - 1) * passing.slowest_talk + hops,
    )


def _works(plan: Plan, node: Node, tokens: float, prefill: bool) -> list[float]:
    """Seconds that the slowest rank of each stage works on a part of a step: it reads its weights, or multiplies."""
    request, found = plan.request, []
    speeds, streamed = request.speeds(node), _streamed_of_ranks(plan, tokens)
    compute = node.multiply_adds / request.ranks_per_node
    panels = request.config.blocks[-1].mlp.splits[0]
    parts = request.config.partition(request.division)
    whole, count = multiply_adds(request.config), request.config.num_hidden_layers
    for stage, layers in enumerate(request.layers_of_stages):
        mates = [rank for rank in range(request.ranks) if request.division.stage_of(rank) == stage]
        share = max(len(parts[rank][panels]) for rank in mates) / panels.count
        multiplying = tokens * whole * len(layers) / count * share / compute
        reading = max(
            (streamed[rank][0] + streamed[rank][1] * tokens / request.batch / request.rows)
            / speeds[rank]
            / GOOD_EFFICIENCY
            for rank in mates
        )
        found.append((multiplying if prefill else max(reading, multiplying)) + node.layer_seconds * len(layers))
    return found


def _streamed_of_ranks(plan: Plan, tokens: float) -> list[tuple[int, int]]:
    """Bytes that each rank reads: weights for so many tokens at once, and KV cache and states of all sequences."""
    request, idle = plan.request, _idle_share(plan.request, tokens)
    moved = request.batch * (1 + request.rows)  # each sequence's is read, and one written behind each position
    states = [moved * rank.states // request.states for rank in plan.ranks]
    caches = [rank.cache_read + size for rank, size in zip(plan.ranks, states, strict=True)]
    return [(_streamed(request, rank, idle), cache) for rank, cache in zip(plan.ranks, caches, strict=True)]


def multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of the layers' matrix products for one token, without attention; of experts the chosen ones."""
    specs = config.tensors(WeightTypes(SMALLEST))
    layers = [s for s in specs if not s.vector and s.name not in (EMBEDDING, LM_HEAD)]
    return sum(s.rows * s.columns * s.chosen for s in layers)


def _streamed(request: PlanRequest, rank: RankMemory, idle: float) -> int:
    """Bytes of weights that a rank reads in a decode step: all but an untied embedding and experts not chosen."""
    if request.stages > 1:
        unread = 0 if rank.has_head else rank.embedding
    else:
        unread = 0 if request.config.tie_word_embeddings else rank.embedding // 2
    return round((rank.weights - unread) * (1 - idle))


def _idle_share(request: PlanRequest, positions: float) -> float:
    """The share of all weights that belongs to experts which none of so many positions chooses, each its own evenly."""
    whole = request.config.partition(1)[0]
    experts = [spec for spec in request.specs if spec.experts]
    idle = sum(slice_bytes([s], whole) * math.pow(1 - s.chosen / s.experts, positions) for s in experts)
    return idle / slice_bytes(request.specs, whole)


# -- drafts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DraftSpeed:
    """A prediction of decoding with drafts.

    `expert_reads` is how many times the experts of one position a step with drafts reads, None without experts.
    """

    tokens_per_step: float
    steps_saved: float
    decode_tokens_per_second: float
    gain: float
    draft_share: float
    expert_reads: float | None


def predict_drafts(plan: Plan, node: Node, network: Network) -> DraftSpeed | None:
    """Predict decoding with the request's drafts: a step checks all of them, after so many steps of a draft model."""
    request, draft = plan.request, plan.request.draft
    if draft is None:
        return None
    plain = predict(plan, node, network).decode_tokens_per_second
    checked = replace(plan, request=replace(request, rows=draft.tokens + 1))
    step = request.batch / predict(checked, node, network).decode_tokens_per_second
    drafting, of_draft = 0.0, draft.plan(request)
    if of_draft is not None:
        own = replace(node, memory_bandwidth=node.memory_bandwidth / request.ranks_per_node) if draft.alone else node
        drafting = draft.tokens * request.batch / predict(of_draft, own, network).decode_tokens_per_second
    tokens = draft.tokens_per_step
    speed = request.batch * tokens / (step + drafting)
    experts = next(((s.experts, s.chosen) for s in request.specs if s.experts), None)
    reads = expert_reads(*experts, request.batch * (draft.tokens + 1)) if experts else None
    return DraftSpeed(tokens, 1 - 1 / tokens, speed, speed / plain, drafting / (step + drafting), reads)


def expert_reads(experts: int, chosen: int, positions: int) -> float:
    """How many times the experts of one position are read in a step of several, if each chooses its own evenly."""
    return experts * (1 - (1 - chosen / experts) ** positions) / chosen


# -- stages ---------------------------------------------------------------------------------------------------------

MOST_STAGES = 16
WORTH_STAGES = 1.05
"""Stages are advised only if they make this much of a difference."""


@dataclass(frozen=True)
class StagePlan:
    """A number of stages for a job's ranks: memory and speed."""

    plan: Plan
    speed: Speed
    crossings: int
    """How often a decode step meets the network, one time after the other."""

    @property
    def stages(self) -> int:
        return self.plan.request.stages


def plans_of_stages(request: PlanRequest, node: Node, network: Network) -> list[StagePlan]:
    """All numbers of stages of whole nodes. With uneven shares only the number asked for, with a layer that drafts
    only one, and with a cache divided by positions those whose ranks can divide it.
    """
    found = []
    one_only = request.draft is not None and request.draft.config is not None and request.draft.config.mtp
    most = 1 if one_only else min(request.nodes, MOST_STAGES, request.config.most_stages)
    for stages in range(1, most + 1):
        if request.nodes % stages == 0 and (stages == request.stages or request.shares is None):
            changed = replace(request, stages=stages)
            even = replace(changed.division, context_parallel=False)
            if request.context_parallel and not repeats_cache(request.config, even):
                continue
            plan = make_plan(changed)
            sums = [
                stage.sent(network, request.batch).rounds for stage in plan.request.staged if stage.layout.hosts > 1
            ]
            found.append(StagePlan(plan, predict(plan, node, network), stages - 1 + sum(sums)))
    return found


def best_stages(found: Sequence[StagePlan]) -> StagePlan:
    """The fastest that fits, with as few stages as come near it; if none fits, the one that is nearest."""
    fitting = [each for each in found if each.plan.fits]
    if not fitting:
        return max(found, key=lambda each: each.plan.headroom)
    fastest = max(each.speed.decode_tokens_per_second for each in fitting)
    return next(each for each in fitting if each.speed.decode_tokens_per_second * WORTH_STAGES >= fastest)
