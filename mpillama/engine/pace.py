"""How long a step takes, learnt from the last ones, and how much of a prompt fits one that must not take longer."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

KEPT = 32
"""Steps of each kind, with tokens of prompts and without, that are remembered."""
LEAST_TOKENS = 16
"""Prompts get on by as many tokens a step, however long it takes. More are cut to a multiple, as kernels take them."""
CAUTIOUS = 16
"""After so many steps as expected, one that was not no longer counts."""
SWEEPS = 40
MOST_CAUTION = 3.0


@dataclass(frozen=True)
class StepLoad:
    """What a step computes: tokens of answers (and drafts), of prompts, and how many positions all of them see.

    `followed` is what a layer that drafts tokens has to do with the prompts of the step before, in tokens of a prompt.
    """

    answers: int = 0
    prompts: int = 0
    positions: int = 0
    followed: float = 0.0

    def with_prompt(self, tokens: int, start: int) -> "StepLoad":
        """The same and so many tokens of a prompt, from position `start` on."""
        return replace(self, prompts=self.prompts + tokens, positions=self.positions + seen(start, tokens))

    @property
    def features(self) -> tuple[float, float, float, float]:
        return 1.0, float(self.answers), self.prompts + self.followed, float(self.positions)


def seen(start: int, tokens: int) -> int:
    """How many positions so many tokens from position `start` on see, their own included."""
    return tokens * start + tokens * (tokens + 1) // 2


@dataclass
class Pace:
    """Keeps steps that answers wait for within `bound` seconds.

    A step's time is a constant, and so much for each token of an answer, token of a prompt, and position that is seen:
    fitted to the steps of late, none negative. How far off the fit was counts, too.
    """

    bound: float
    late: int = 0
    """Steps with answers under way that took longer."""
    room: int = 0
    """Tokens of prompts for which there was room in the last step that answers waited for."""
    _plain: deque[tuple[StepLoad, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    _mixed: deque[tuple[StepLoad, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    _ratios: deque[float] = field(default_factory=lambda: deque(maxlen=CAUTIOUS))
    _costs: Sequence[float] | None = None

    def note(self, load: StepLoad, seconds: float) -> None:
        """Learn from a step."""
        if load.answers and load.prompts and self._mixed:
            self._ratios.append(seconds / max(self.seconds(load), 1e-9))
        self.late += bool(load.answers) and seconds > self.bound
        (self._mixed if load.prompts else self._plain).append((load, seconds))
        self._costs = None

    def seconds(self, load: StepLoad) -> float:
        """How long a step will take."""
        if self._costs is None:
            self._costs = fitted([*self._plain, *self._mixed])
        return sum(cost * amount for cost, amount in zip(self._costs, load.features, strict=True))

    @property
    def caution(self) -> float:
        """How many times longer than expected a step took, of those of late the longest."""
        return min(max([1.0, *self._ratios]), MOST_CAUTION)

    def prompt_tokens(self, load: StepLoad, start: int, most: int) -> int:
        """How many tokens of a prompt, from position `start` on, a step may have besides its load; up to `most`."""
        if not load.answers:
            return most
        least = 0 if load.prompts else min(most, LEAST_TOKENS)
        low, high, limit = least, most, self.bound / self.caution
        if not self._mixed:
            high = least
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(load.with_prompt(middle, start)) <= limit:
                low = middle
            else:
                high = middle - 1
        self.room = load.prompts + low
        return low if low in (least, most) else max(least, low // LEAST_TOKENS * LEAST_TOKENS)


def fitted(steps: Sequence[tuple[StepLoad, float]]) -> list[float]:
    """The costs of a step's features, none negative, that make the squares of relative errors smallest."""
    if not steps:
        return [0.0] * len(StepLoad().features)
    rows = np.array([load.features for load, _ in steps])
    scale = np.maximum(rows.max(axis=0), 1.0)
    rows = rows / scale / np.maximum([[seconds] for _, seconds in steps], 1e-9)
    squares, products = rows.T @ rows, rows.sum(axis=0)
    costs = [0.0] * len(products)
    for _ in range(SWEEPS):
        for i, diagonal in enumerate(np.diag(squares).tolist()):
            others = float(squares[i] @ costs) - diagonal * costs[i]
            costs[i] = max(0.0, (float(products[i]) - others) / diagonal) if diagonal else 0.0
    return [cost / float(factor) for cost, factor in zip(costs, scale, strict=True)]
