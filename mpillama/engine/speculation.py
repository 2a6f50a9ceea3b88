"""Guesses at the next tokens, for free: what followed the same tokens earlier in the text.

Prompt-lookup decoding (Saxena 2023): summaries and edits repeat long pieces of their prompt. A wrong guess costs a
little of a step; the answer is the same, since every guess is checked against the token that is sampled.
"""

from dataclasses import dataclass

import numpy as np

LONGEST_NGRAM = 4
SHORTEST_NGRAM = 2


@dataclass
class Drafter:
    """Drafts up to `most` tokens; counts how many were proposed and came true."""

    most: int
    proposed: int = 0
    accepted: int = 0

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
                found = [int(text[end + i % period]) for i in range(most)]
                self.proposed += len(found)
                return found
        return []

    @property
    def acceptance(self) -> float:
        """The share of drafts that came true."""
        return self.accepted / self.proposed if self.proposed else 0.0


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
