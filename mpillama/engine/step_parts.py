"""In how many parts a step goes through the model: several where sums between hosts had better travel meanwhile."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mpillama.comm.ways import overlap_wish

FEWEST_TOKENS = 8
"""Of a step that goes in parts: each part reads the weights again."""
TRIES = 5
"""Steps of as many tokens that are timed in each way before one is chosen."""
REPEAT = 64
"""Every so many steps the other way is timed again."""
KEPT = 5


@dataclass
class Timed:
    """Steps of some numbers of tokens in one way: how many there were, and seconds a token of the last ones."""

    steps: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


class StepParts:
    """Chooses by what steps of as many tokens took before, on rank 0; `most_parts` is a model's.

    The result of a step is the same in any number of parts.
    """

    def __init__(self, most_parts: Callable[[int], int]):
        self.most_parts = most_parts
        self.forced = overlap_wish()
        self._timed: dict[int, dict[bool, Timed]] = {}

    def choose(self, tokens: int) -> int:
        """The parts of the next step."""
        parts = self.most_parts(tokens) if tokens >= FEWEST_TOKENS and self.forced != "never" else 1
        return parts if parts == 1 or self.forced == "always" or self._is_better(tokens) else 1

    def note(self, tokens: int, parts: int, seconds: float) -> None:
        """What a step took."""
        if tokens >= FEWEST_TOKENS:
            timed = self._of(tokens)[parts > 1]
            timed.steps += 1
            if timed.steps > 1:  # the first one allocates
                timed.seconds.append(seconds / tokens)

    def tried(self, tokens: int) -> dict[int, float]:
        """Tokens/s of the last steps of about as many tokens, by the parts in which they went."""
        found = {self.most_parts(tokens) if in_parts else 1: each for in_parts, each in self._of(tokens).items()}
        return {parts: 1 / timed.median for parts, timed in found.items() if timed.seconds}

    def _of(self, tokens: int) -> dict[bool, Timed]:
        return self._timed.setdefault(tokens.bit_length(), {False: Timed(), True: Timed()})

    def _is_better(self, tokens: int) -> bool:
        whole, parts = self._of(tokens)[False], self._of(tokens)[True]
        if min(whole.steps, parts.steps) <= TRIES:
            return parts.steps < whole.steps
        better = parts.median < whole.median
        return better != ((whole.steps + parts.steps) % REPEAT == 0)
