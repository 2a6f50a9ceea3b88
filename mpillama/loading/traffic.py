"""What ranks send each other in a step, on paper: as Communicator.sent counts it."""

import math
from dataclasses import dataclass

from mpillama.comm.ways import ways_between
from mpillama.models.candidates import message_numbers
from mpillama.models.config import ModelConfig
from mpillama.quant.weight_type import LANES

EXACT_BITS, COARSE_BITS = 33.0, 11.5
"""Of a number that a host adds to a sum, as measured on SmolLM2-135M: exact, and with --sync q80."""
CANDIDATES = 1024
"""Logits of a row that a rank tells where sampling is not greedy."""


@dataclass(frozen=True)
class Network:
    """What a message costs: seconds, and bytes per second."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Hosts:
    """How many there are, with how many ranks each that add up, and the bits of a number in the sums between them."""

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
        return self.rounds * network.latency + self.bytes / network.bandwidth

    def times(self, count: int) -> "Sent":
        return Sent(self.rounds * count, self.messages * count, self.bytes * count)

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.rounds + other.rounds, self.messages + other.messages, self.bytes + other.bytes)


def sum_ways(hosts: Hosts, width: int, tokens: float) -> dict[str, Sent]:
    """What a host's first rank sends in one sum of `width` numbers of each token, in each way between several hosts."""
    count, whole = hosts.hosts, width * tokens * hosts.bits / 8
    steps = math.ceil(math.log2(count))
    piece = 2 * (count - 1) / count * whole
    ways = {
        "direct": Sent(1, count - 1, (count - 1) * whole),
        "pieces": Sent(2, 2 * (count - 1), piece),
        "doubling": Sent(steps, steps, steps * whole),
        "halving": Sent(2 * steps, 2 * steps, piece),
    }
    return {name: ways[name] for name in ways_between(count)}


def sum_sent(hosts: Hosts, width: int, tokens: float, network: Network) -> Sent:
    """The same in the fastest way; nothing if there is one host."""
    if hosts.hosts == 1:
        return Sent()
    return min(sum_ways(hosts, width, tokens).values(), key=lambda sent: sent.seconds(network))


def logits_sent(config: ModelConfig, hosts: Hosts, rows: int) -> Sent:
    """What every rank but the first sends for so many tokens to be sampled: the likeliest ones, or all logits."""
    if hosts.ranks == 1:
        return Sent()
    width = LANES * math.ceil(config.vocab_size / LANES / hosts.ranks)
    if config.vocab_size < 4 * CANDIDATES:
        return Sent(1, 1, 4 * width * rows)
    return Sent(1, 1, 4 * message_numbers(CANDIDATES, width) * rows)
