"""Generating the continuation of a sequence (rank 0)."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpillama.engine.answer import Answer
from mpillama.engine.session import Session
from mpillama.engine.speculation import Drafter
from mpillama.errors import UserError
from mpillama.text.sampler import Sampler


@dataclass
class Generation:
    """An answer being generated; complete when the iterator of `text_pieces` ends."""

    prompt_token_ids: list[int]
    answer: Answer
    logits: list[np.ndarray] | None = None
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt_token_ids + self.answer.token_ids

    def record(self, logits: np.ndarray) -> None:
        """Add the logits that a token is about to be sampled from to the digest, and keep them if asked."""
        self.digest.update(np.ascontiguousarray(logits, "<f4").tobytes())
        if self.logits is not None:
            self.logits.append(logits.copy())


def text_pieces(
    session: Session, sampler: Sampler, generation: Generation, new_prompt_ids: Sequence[int], drafter: Drafter
) -> Iterator[str]:
    """Run the prompt's new tokens, then sample token after token; yields text that is safe to print.

    The sequence in the session must hold the prompt's other tokens already. `generation` is filled on the way. Several
    tokens come from one step where the drafter guesses right.
    """
    prompt_length, answer = session.length + len(new_prompt_ids), generation.answer
    if prompt_length == session.max_seq_len:
        raise UserError(
            f"the prompt has {prompt_length} tokens and fills the context: shorten it or raise --max-seq-len."
        )
    new, drafts = list(new_prompt_ids), list[int]()
    while True:
        for i, logits in enumerate(session.extend_and_guess(new, drafts)):
            generation.record(logits)
            token = sampler.sample(logits)
            yield answer.push(token, session.max_seq_len - session.length - 1)
            if answer.finish_reason:
                return
            if i >= len(drafts) or drafts[i] != token:
                break
            session.keep_draft()
            drafter.accepted += 1
        new, room = [token], session.max_seq_len - session.length - 1
        drafts = drafter.draft(generation.tokens, min(room, answer.params.room_for(len(answer.token_ids), room) - 1))
