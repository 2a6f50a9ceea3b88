"""What a run will need of each rank and node, before it is queued: memory exactly, speed by the limits.

Memory is that of loading/memory.py. Speed: decode reads the weights and the KV cache once a token, and changes
recurrent states; the network adds a latency and the bytes of each all-reduce.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from mpillama.loading.memory import RESERVE, MemoryModel, RankMemory
from mpillama.loading.settings import state_slots
from mpillama.models.cache import blocks_for
from mpillama.models.config import ModelConfig
from mpillama.models.tensors import EMBEDDING, LM_HEAD, TensorSpec, WeightTypes
from mpillama.models.weights import slice_bytes
from mpillama.quant.registry import SMALLEST

GOOD_EFFICIENCY = 0.85
"""The share of the read bandwidth that a decode step reaches."""


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

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @cached_property
    def specs(self) -> list[TensorSpec]:
        return self.config.tensors(self.types)

    @property
    def memory_model(self) -> MemoryModel:
        sizes = (self.ranks, self.kv_type, self.prefill_chunk, self.batch)
        return MemoryModel(
            self.config, self.specs, *sizes, has_tokenizer=self.tokenizer, states=state_slots(self.batch),
            threads=self.threads,
        )  # fmt: skip


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
        return self.request.memory_per_node - max(self.nodes)

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def cache_by_positions(self) -> int:
        """Bytes of a rank's cache if ranks held parts of the positions instead of heads, or of the same latents."""
        request = self.request
        whole = request.memory_model.cache_block_bytes(request.config.partition(1)[0])
        return -(-blocks_for(request.max_seq_len) * request.batch * whole // request.ranks)

    @property
    def repeats_cache(self) -> bool:
        """Whether several ranks hold the same part of the cache."""
        return sum(rank.kv_cache for rank in self.ranks) > self.request.ranks * self.cache_by_positions

    @property
    def inequality(self) -> float:
        """The fullest rank's excess over the mean, as a share."""
        totals = [r.total for r in self.ranks]
        return max(totals) / (sum(totals) / len(totals)) - 1


def make_plan(request: PlanRequest) -> Plan:
    """Compute what every rank needs."""
    return Plan(request, tuple(request.memory_model.of_ranks(request.max_seq_len)))


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
    candidates = []
    if request.kv_type != "q8":
        candidates.append(("--kv-type q8", replace(request, kv_type="q8")))
    if any(s.weight_type != SMALLEST for s in request.specs if not s.vector):
        candidates.append((f"--weights {SMALLEST.name}", replace(request, types=WeightTypes(SMALLEST))))
    for text, changed_request in candidates:
        changed = make_plan(changed_request)
        if changed.fits:
            yield Remedy(text, changed)
    more = _least_nodes(request)
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
    most = max(request.nodes, request.config.most_busy_ranks // request.ranks_per_node)
    low, high = request.nodes, most
    if not make_plan(replace(request, nodes=high)).fits:
        return None
    while low < high:
        middle = (low + high) // 2
        if make_plan(replace(request, nodes=middle)).fits:
            high = middle
        else:
            low = middle + 1
    return make_plan(replace(request, nodes=low))


# -- speed ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """What a message costs: seconds, and bytes per second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Speed:
    """A prediction for one step of `batch` sequences; the communication is that of one rank."""

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    bytes_per_step: int
    messages_per_step: int
    communication_bytes_per_step: int
    communication_share: float
    load_seconds: float | None


@dataclass(frozen=True)
class Node:
    """What a node does in a second: bytes read from memory, multiply-adds, and bytes read from the file system."""

    memory_bandwidth: float
    multiply_adds: float
    read_bandwidth: float | None = None


def predict(plan: Plan, node: Node, network: Network) -> Speed:
    """Predict decoding at the full context, and prefill without the attention's part."""
    request = plan.request
    per_rank = node.memory_bandwidth / request.ranks_per_node * GOOD_EFFICIENCY
    idle = _idle_share(request)
    streamed = [_streamed(request, r, idle) for r in plan.ranks]
    calls = 2 * request.config.num_hidden_layers + 2 if request.ranks > 1 else 0
    message = 8 * request.config.padded_hidden_size * request.batch
    communication = _communication(request, network, request.batch)
    fullest_read = max(r.reads for r in plan.ranks) * request.ranks_per_node
    seconds = max(streamed) / per_rank + communication
    return Speed(
        request.batch / seconds,
        _prefill(request, node, network),
        sum(streamed),
        calls,
        2 * calls * message,
        communication / seconds,
        fullest_read / node.read_bandwidth if node.read_bandwidth else None,
    )


def _communication(request: PlanRequest, network: Network, tokens: int) -> float:
    """Seconds of a step's all-reduces of so many tokens."""
    if request.ranks == 1:
        return 0.0
    rounds = math.ceil(math.log2(request.ranks))
    message = 8 * request.config.padded_hidden_size * tokens
    calls = 2 * request.config.num_hidden_layers + 2
    return calls * (2 * rounds * network.latency + 2 * message / network.bandwidth)


def _prefill(request: PlanRequest, node: Node, network: Network) -> float:
    """Tokens per second of a prompt's full chunks: the rank with the largest share of the products decides."""
    tokens = request.prefill_chunk
    panels = request.config.blocks[-1].mlp.splits[0]
    share = max(len(part[panels]) for part in request.config.partition(request.ranks)) / panels.count
    work = tokens * multiply_adds(request.config) * share
    return tokens / (work / (node.multiply_adds / request.ranks_per_node) + _communication(request, network, tokens))


def multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of the layers' matrix products for one token, without attention; of experts the chosen ones."""
    specs = config.tensors(WeightTypes(SMALLEST))
    layers = [s for s in specs if not s.vector and s.name not in (EMBEDDING, LM_HEAD)]
    return sum(s.rows * s.columns * s.chosen for s in layers)


def _streamed(request: PlanRequest, rank: RankMemory, idle: float) -> int:
    """Bytes that a rank reads in a decode step: its weights (without an untied embedding), its KV cache, and states.

    Each sequence's state is read and written.
    """
    config = request.config
    embedding = 0 if config.tie_word_embeddings else rank.embedding // 2
    states = 2 * request.batch * rank.states // state_slots(request.batch)
    return round((rank.weights - embedding) * (1 - idle)) + rank.kv_cache + states


def _idle_share(request: PlanRequest) -> float:
    """The share of all weights that belongs to experts which no sequence chooses."""
    whole = request.config.partition(1)[0]
    experts = [spec for spec in request.specs if spec.experts]
    idle = sum(slice_bytes([s], whole) * (1 - min(1.0, request.batch * s.chosen / s.experts)) for s in experts)
    return idle / slice_bytes(request.specs, whole)
