"""Generating the continuation of a sequence (rank 0)."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpillama.engine.session import Session
from mpillama.errors import UserError
from mpillama.text.sampler import Sampler
from mpillama.text.stop import StopStrings
from mpillama.text.tokenizer import Tokenizer


@dataclass
class Generation:
    """What was generated so far; complete when the iterator of `text_pieces` ends.

    finish_reason is "stop" (an end-of-text token or a stop string) or "length" (max_tokens or the context's end).
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    logits: list[np.ndarray] | None = None
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def record(self, logits: np.ndarray) -> None:
        """Add the logits that a token is about to be sampled from to the digest, and keep them if asked."""
        self.digest.update(np.ascontiguousarray(logits, "<f4").tobytes())
        if self.logits is not None:
            self.logits.append(logits.copy())


def text_pieces(
    session: Session,
    tokenizer: Tokenizer,
    sampler: Sampler,
    stops: Sequence[str],
    max_tokens: int,
    generation: Generation,
    new_prompt_ids: Sequence[int],
) -> Iterator[str]:
    """Run the prompt's new tokens, then sample token after token; yields text that is safe to print.

    The sequence in the session must hold the prompt's other tokens already. `generation` is filled on the way.
    """
    prompt_length = session.length + len(new_prompt_ids)
    if prompt_length == session.max_seq_len:
        raise UserError(
            f"the prompt has {prompt_length} tokens and fills the context: shorten it or raise --max-seq-len."
        )
    stream, stop = tokenizer.stream(), StopStrings(stops)
    logits = session.extend(list(new_prompt_ids))
    while True:
        generation.record(logits)
        token = sampler.sample(logits)
        generation.token_ids.append(token)
        if token in tokenizer.eos_token_ids:
            generation.finish_reason = "stop"
            break
        piece, stopped = stop.push(stream.push(token))
        generation.text += piece
        yield piece
        if stopped:
            generation.finish_reason = "stop"
            return
        if len(generation.token_ids) >= max_tokens or session.length + 1 >= session.max_seq_len:
            break
        logits = session.extend([token])
    rest, stopped = stop.push(stream.finish())
    rest += "" if stopped else stop.finish()
    generation.finish_reason = "stop" if stopped else generation.finish_reason
    generation.text += rest
    yield rest
