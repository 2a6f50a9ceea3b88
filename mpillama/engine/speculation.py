"""Guesses at the next tokens, each checked against the token that is sampled, so that the answer stays the same.

Prompt lookup (Saxena 2023) takes what followed the same tokens earlier in the text: summaries and edits repeat long
pieces of their prompt. A draft model (engine/draft_model.py) computes its guesses. A wrong guess costs a part of a
step, so a pace watches what drafts cost and how many come true, and leaves them out where they lose.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import numpy as np

from mpillama.engine.sequence import EngineSequence

LONGEST_NGRAM = 4
SHORTEST_NGRAM = 2


class Drafted(Protocol):
    """A sequence's part of a step, as far as drafts are concerned."""

    @property
    def sequence(self) -> EngineSequence: ...

    @property
    def count(self) -> int:
        """Tokens of the text that the step computes."""

    @property
    def drafts(self) -> list[int]:
        """Guesses behind them."""


STEPS_OF_MEDIAN = 9
PLAIN_INTERVAL = 64
"""Steps with drafts after which one without them shows again what drafts cost."""
PROBE_INTERVAL = 64
"""Steps without drafts after which a sequence tries them again."""
FEWEST_DRAFTS = 0.25
"""Of each sequence in the mean, or their cost is lost in the step's own ups and downs."""
WEIGHT = 1 / 8
"""Of the latest draft in the mean of those before."""
HOPE = 0.75
"""The share of drafts that are taken to come true before any was checked."""


@dataclass
class Cost:
    """Seconds of the latest steps with as many sequences, without drafts and with them; drafts a sequence."""

    plain: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_OF_MEDIAN))
    drafted: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_OF_MEDIAN))
    drafts: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_OF_MEDIAN))
    since_plain: int = 0

    @property
    def of_draft(self) -> float:
        """What a draft of each sequence adds to a step without drafts, as a share of it; 0 while that is unknown."""
        if not self.plain or not self.drafted:
            return 0.0
        return max(0.0, median(self.drafted) / median(self.plain) - 1) / median(self.drafts)

    @property
    def wants_plain(self) -> bool:
        """Whether a step without drafts is due: once there are steps to compare it with, and then now and again."""
        return len(self.drafted) > 1 and (not self.plain or self.since_plain >= PLAIN_INTERVAL)


class DraftLengths:
    """Chooses how many drafts a sequence gets: as many as make a token cheapest, by measured times and acceptance.

    Timing never touches an answer. `rate` is the acceptance of all sequences, with which a new one begins.
    """

    def __init__(self) -> None:
        self.rate = HOPE
        self._costs: dict[int, Cost] = {}
        self._cost = Cost()
        self._plain = False

    def begin(self, sequences: int) -> None:
        """A step of so many running sequences is planned."""
        self._cost = self._costs.setdefault(sequences.bit_length(), Cost())
        self._plain = self._cost.wants_plain

    def best(self, sequence: EngineSequence, most: int) -> int:
        """How many drafts of a sequence, up to `most`, make its tokens cheapest."""
        rate = sequence.drafting.rate
        return best_length(self.rate if rate is None else rate, self._cost.of_draft, most)

    def limit(self, sequence: EngineSequence, most: int) -> int:
        """The drafts of a sequence in this step, up to `most`: the best number, or all to see whether it changed."""
        if self._plain:
            return 0
        state, best = sequence.drafting, self.best(sequence, most)
        if best:
            state.skipped = 0
            return best
        state.skipped += 1
        if state.skipped > PROBE_INTERVAL:
            state.skipped = 0
            return most
        return 0

    def note_step(self, seconds: float, drafts: int, sequences: int) -> None:
        """A step took so long in which every sequence went on from a sampled token."""
        cost = self._cost
        if not drafts:
            cost.plain.append(seconds)
            cost.since_plain = 0
        elif drafts >= FEWEST_DRAFTS * sequences:
            cost.drafted.append(seconds)
            cost.drafts.append(drafts / sequences)
            cost.since_plain += 1

    def note_drafts(self, sequence: EngineSequence, checked: int, accepted: int) -> None:
        """Of a sequence's drafts so many were checked, and came true up to the first that did not."""
        state = sequence.drafting
        rate = self.rate if state.rate is None else state.rate
        for i in range(checked):
            came_true = float(i < accepted)
            rate += WEIGHT * (came_true - rate)
            self.rate += WEIGHT / 4 * (came_true - self.rate)
        state.rate = rate


def best_length(rate: float, cost: float, most: int) -> int:
    """How many drafts make a token cheapest if each comes true at a `rate` and costs such a share of a step."""
    return max(range(most + 1), key=lambda n: (tokens_of_step(rate, n) / (1 + n * cost), -n))


def tokens_of_step(rate: float, drafts: int) -> float:
    """The tokens that a step with drafts yields in the mean: drafts count up to the first that does not come true."""
    return sum(rate**i for i in range(drafts + 1))


@dataclass
class Drafter:
    """Drafts up to `most` tokens of each sequence; counts how many were proposed and came true.

    `seconds` is what a model took for them. The next step is `paced` if answers wait for it no longer than a bound.
    """

    most: int
    proposed: int = 0
    accepted: int = 0
    seconds: float = 0.0
    paced: bool = False
    lengths: DraftLengths = field(default_factory=DraftLengths)

    def reserve(self, sequence: EngineSequence, room: int) -> list[int]:
        """Up to `room` drafts of what follows on a sequence's text, or places for what `fill` will find."""
        raise NotImplementedError

    def fill(self, shares: Sequence[Drafted]) -> None:
        """Put guesses into the places of a step's sequences, before it runs; places may be taken away."""

    def note_computed(self, sequence: EngineSequence, row: int, start: int) -> None:
        """A step has computed a sequence's positions from `start` on, in its rows from `row` on."""

    def followed(self) -> float:
        """What `fill` will do with the prompts of the step before, as if so many tokens of a prompt were computed."""
        return 0.0

    def note(self, sequence: EngineSequence, drafts: int, tokens: int) -> None:
        """So many drafts of a sequence were computed, and so many tokens sampled."""
        accepted = max(0, tokens - 1)
        self.proposed += drafts
        self.accepted += accepted
        self.lengths.note_drafts(sequence, min(drafts, tokens), accepted)

    @property
    def acceptance(self) -> float:
        """The share of drafts that came true."""
        return self.accepted / self.proposed if self.proposed else 0.0


class PromptLookup(Drafter):
    """Guesses for free: what followed the latest earlier occurrence of the text's last tokens."""

    def reserve(self, sequence: EngineSequence, room: int) -> list[int]:
        """As Drafter: the guesses themselves."""
        found = self.draft(sequence.tokens, room)
        return found[: self.lengths.limit(sequence, len(found))] if found else found

    def draft(self, tokens: list[int], room: int) -> list[int]:
        """What followed the latest earlier occurrence of the text's last tokens, up to `room`; longest match first.

        Where the text repeats itself the guess goes on repeating it.
        """
        most = min(self.most, room)
        if most < 1:
            return []
        text = np.asarray(tokens)
        for size in range(LONGEST_NGRAM, SHORTEST_NGRAM - 1, -1):
            end = last_occurrence(text, size)
            if end is not None:
                period = len(text) - end
                return [int(text[end + i % period]) for i in range(most)]
        return []


def last_occurrence(text: np.ndarray, size: int) -> int | None:
    """Where the latest earlier occurrence of the last `size` tokens ends; None if there is none."""
    starts = len(text) - size
    if starts < 1:
        return None
    same = np.ones(starts, bool)
    for i in range(size):
        same &= text[i : i + starts] == text[starts + i]
    found = np.flatnonzero(same)
    return int(found[-1]) + size if len(found) else None
