"""What ranks send each other in a step, on paper: as Communicator.sent counts it."""

import math
from dataclasses import dataclass

from mpillama.comm.ways import grid_of, ways_between
from mpillama.errors import UserError
from mpillama.models.candidates import Wanted, message_numbers
from mpillama.models.config import ModelConfig
from mpillama.quant.weight_type import LANES

EXACT_BITS, COARSE_BITS = 33.0, 11.5
"""Of a number that a host adds to a sum, as measured on SmolLM2-135M: exact, and with --sync q80."""
SHARED_SECONDS = 5e-6
"""Of a sum through the memory of a host."""
MESSAGE_SECONDS = 1e-4
"""What MPI, Python and ranks that come late add to a message between hosts where `bench` has not measured it: over TCP
(docs/clusters.md).
"""
CANDIDATES = 1024
"""Logits of a row that a rank tells where sampling is not greedy."""


@dataclass(frozen=True)
class Network:
    """What a message costs: seconds, and bytes per second; `software` is MPI's and Python's part beside the latency."""

    latency: float
    bandwidth: float
    software: float = 0.0

    @property
    def round_seconds(self) -> float:
        return self.latency + self.software


@dataclass(frozen=True)
class Layout:
    """How many hosts there are, with how many ranks each, and the bits of a number in the sums between them."""

    hosts: int
    ranks_per_host: int
    bits: float = EXACT_BITS

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host


@dataclass(frozen=True)
class Sent:
    """What a rank sends: messages one after the other, all messages, and bytes."""

    rounds: int = 0
    messages: int = 0
    bytes: float = 0.0

    def seconds(self, network: Network) -> float:
        return self.rounds * network.round_seconds + self.bytes / network.bandwidth

    def times(self, count: int) -> "Sent":
        return Sent(self.rounds * count, self.messages * count, self.bytes * count)

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.rounds + other.rounds, self.messages + other.messages, self.bytes + other.bytes)


def refuse_coarse_sums(sync: str, config: ModelConfig, model: str) -> None:
    """UserError for a model, so named, in which a norm would follow on sums that --sync q80 rounds."""
    if sync == "q80" and config.has_post_norms:
        raise UserError(f"{model}: --sync q80 is for models without norms after the halves of a layer: use exact.")


def sums_of_step(config: ModelConfig) -> int:
    """The embedding, and two of each layer."""
    return 1 + 2 * config.num_hidden_layers


def sum_sent(layout: Layout, width: int, tokens: int) -> dict[str, Sent]:
    """What a host's first rank sends in one sum of `width` numbers of each token, in each way between several hosts."""
    hosts, whole = layout.hosts, width * tokens * layout.bits / 8
    steps = math.ceil(math.log2(hosts))
    joining = 2 * (
        hosts.bit_count() > 1
    )  # rounds of the hosts beyond a power of two: they join others, and are answered
    piece = 2 * (hosts - 1) / hosts * whole
    rows, columns = grid_of(hosts)
    left = int(rows * columns < hosts)  # hosts beyond the grid, as above
    in_row, in_column = 2 * (columns - 1), 2 * (rows - 1)
    ways = {
        "direct": Sent(1, hosts - 1, (hosts - 1) * whole),
        "pieces": Sent(2, 2 * (hosts - 1), piece),
        "grid": Sent(4 + 2 * left, in_row + in_column + left, ((in_row + in_column / rows) / columns + left) * whole),
        "doubling": Sent(hosts.bit_length() - 1 + joining, steps, steps * whole),
        "halving": Sent(2 * steps, 2 * steps, piece),
    }
    return {name: ways[name] for name in ways_between(hosts)}


def pieces_sent(config: ModelConfig, layout: Layout, tokens: int, positions: int) -> Sent:
    """What a rank sends the ranks of other hosts in a step, if ranks divide the positions of sequences so long.

    Queries, new keys and values of its own heads go to all; what it attended to goes to whoever has the heads.
    """
    others, total = layout.ranks - layout.ranks_per_host, Sent()
    if not positions or not others:
        return total
    for block in config.blocks:
        if (sizes := block.attention.piece_sizes) is not None:
            own = 4 * tokens * sizes.width / layout.ranks * others
            spans = sizes.spans_of(positions - 1) / layout.ranks
            records = 4 * tokens * spans * sizes.heads * sizes.record * others / layout.ranks
            total += Sent(math.ceil(math.log2(layout.hosts)) + 1, 2 * others, own + records)
    return total


def logits_sent(config: ModelConfig, layout: Layout, rows: int, whole: bool = False) -> Sent:
    """What every rank but the first sends for so many tokens to be sampled: the likeliest ones, or all logits."""
    if layout.ranks == 1:
        return Sent()
    width = max(len(part[config.vocabulary_split]) * LANES for part in config.partition(layout.ranks))
    if whole or config.vocab_size < 4 * CANDIDATES:
        return Sent(1, 1, 4 * width * rows)
    return Sent(1, 1, 4 * message_numbers(Wanted(CANDIDATES).count, width) * rows)


def step_sent(config: ModelConfig, layout: Layout, tokens: int, network: Network, rows: int) -> Sent:
    """What a host's first rank sends in a step, in the fastest way; `rows` are sampled from, 0 of a prompt's chunk."""
    logits = logits_sent(config, layout, rows)
    if layout.hosts == 1:
        return logits
    ways = sum_sent(layout, config.padded_hidden_size, tokens).values()
    return min(ways, key=lambda sent: sent.seconds(network)).times(sums_of_step(config)) + logits


def step_seconds(config: ModelConfig, layout: Layout, tokens: int, network: Network, rows: int) -> float:
    """Seconds of a step's communication: the plan, the sums inside hosts and between them, the logits."""
    if layout.ranks == 1:
        return 0.0
    inside = SHARED_SECONDS * sums_of_step(config) * (layout.ranks_per_host > 1)
    plan = math.ceil(math.log2(layout.hosts)) * network.round_seconds
    return inside + plan + step_sent(config, layout, tokens, network, rows).seconds(network)
