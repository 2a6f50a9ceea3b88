"""How hosts exchange sums, and what is counted of it; without MPI, so that `plan` knows it, too."""

import bisect
import math
import os
import re
from dataclasses import dataclass
from itertools import accumulate

from mpillama.errors import UserError

MOST_DIRECT = 16
"""Hosts up to which each may send all it has to each."""
MOST_PIECES = 64
"""Hosts up to which each may send every other one its piece."""
FEWEST_IN_GRID = 9
"""Hosts from which a grid of them is tried: with fewer it saves hardly any messages for its two more rounds."""
RANKS_PER_HOST = "MPILLAMA_RANKS_PER_HOST"
"""For tests: the ranks of one machine are taken for those of several hosts, so many each, or as listed (3,1,1)."""

OVERLAP = "MPILLAMA_OVERLAP"
"""For tests and measurements: whether sums between hosts travel while other tokens of the step are computed, always or
never, where it is otherwise chosen by what steps take."""
OVERLAP_WISHES = ("", "always", "never")


def overlap_wish() -> str:
    """What this rank's environment says of it; UserError for any other word."""
    wish = os.environ.get(OVERLAP, "")
    if wish not in OVERLAP_WISHES:
        raise UserError(f"{OVERLAP} is {wish!r}: set it to always or never, or leave it unset to have it chosen.")
    return wish


@dataclass
class Traffic:
    """What this rank has sent: messages, and their bytes."""

    messages: int = 0
    bytes: int = 0

    def add(self, size: int, messages: int = 1) -> None:
        """Count messages of so many bytes together."""
        self.messages += messages
        self.bytes += size

    def forget(self) -> None:
        """Begin anew."""
        self.messages = self.bytes = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.messages + other.messages, self.bytes + other.bytes)


def virtual_host(text: str, rank: int) -> int:
    """The number of a rank's host, by so many ranks each (2) or a list (3,1,1), whose last number goes on for ever."""
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text):
        raise UserError(f"{RANKS_PER_HOST} is {text!r}: give a number of ranks, or a list such as 3,1,1.")
    ends = list(accumulate(int(number) for number in text.split(",")))
    last = int(text.rpartition(",")[2])
    return bisect.bisect_right(ends, rank) if rank < ends[-1] else len(ends) + (rank - ends[-1]) // last


def ways_between(hosts: int) -> list[str]:
    """The ways that so many hosts may use to exchange what they have."""
    if hosts == 1:
        return ["alone"]
    found = ["direct"] if hosts <= MOST_DIRECT else []
    found += ["pieces"] if hosts <= MOST_PIECES else []
    found += ["grid"] if hosts >= FEWEST_IN_GRID else []
    return found + (["doubling", "halving"] if hosts > 2 else [])  # with two they are the same as the others


def grid_of(hosts: int) -> tuple[int, int]:
    """Rows and columns of a grid that is nearly a square; fewer hosts than it has rows may be left over."""
    root = math.isqrt(hosts)
    rows = next((rows for rows in range(root, root // 2, -1) if hosts % rows == 0), root)
    return rows, hosts // rows
