"""A request, and its sequence on the way through the engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from mpillama.engine.answer import Answer
from mpillama.engine.block_pool import BlockPool, block_digest, prefix_digests, salt_digest
from mpillama.engine.executor import Segment, SegmentStates
from mpillama.engine.recurrent_state import RecurrentState
from mpillama.errors import UserError
from mpillama.models.attention import BLOCK_POSITIONS
from mpillama.models.cache import blocks_for
from mpillama.models.candidates import WHOLE, Wanted
from mpillama.text.sampler import Sampler, wanted_of
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import check_token_ids

Pooling = Literal["mean", "last"]
"""What becomes the embedding of a text: the mean of all positions' last hidden states, or the last position's."""


class Constraint(Protocol):
    """What an answer must look like; it follows the answer's tokens."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""

    @property
    def refused(self) -> bool:
        """Whether it was given up, by its own fault."""

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """A copy of float32 [vocab_size] with what may not come next at -inf."""

    def accept(self, token: int) -> None:
        """A token was sampled."""


@dataclass(frozen=True)
class Request:
    """What is asked of the engine: a prompt, and how to sample (`n` and `logprobs` are left to the caller).

    `on_logits(logits, token)` is told of the float32 [vocab_size] logits that each token was chosen from. `key` is the
    caller's own. With `reuse_prefix` False the prompt is computed anew, whatever the cache holds of it. With `pooling`
    the prompt's embedding is wanted, and no answer. With `keep_special` the answer's text shows control tokens. The
    places of tokens among `marking` are told. `on_prompt_logits(logits, token)` is told of each token of the prompt
    behind position `prompt_logits_from`, once, in order. Cache blocks are shared with requests of the same `cache_salt`
    only. An answer that `continues` the prompt is the rest of one text; else it is a text of its own. Without
    `speculate` no tokens of it are drafted.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    key: Any = None
    on_logits: Callable[[np.ndarray, int], None] | None = None
    reuse_prefix: bool = True
    constraint: Constraint | None = None
    pooling: Pooling | None = None
    keep_special: bool = False
    marking: frozenset[int] = frozenset()
    on_prompt_logits: Callable[[np.ndarray, int], None] | None = None
    prompt_logits_from: int = 0
    cache_salt: str = ""
    continues: bool = False
    speculate: bool = True


@dataclass
class DraftProgress:
    """What a draft model has of a sequence while it runs.

    It has computed the first `computed` tokens, and behind them `guesses`; `sent_blocks` are in its block table.
    """

    computed: int = 0
    sent_blocks: int = 0
    guesses: list[int] = field(default_factory=list)


@dataclass
class Drafting:
    """How a sequence's drafts go: the `rate` at which they come true, once some were checked.

    For `skipped` steps there were none, since they lost. The text may be `unreadable` for the draft model.
    """

    rate: float | None = None
    skipped: int = 0
    unreadable: bool = False
    progress: DraftProgress | None = None


@dataclass
class Fetch:
    """How far the blocks of a text come from files: those before `next` did, those before `end` shall."""

    next: int
    end: int
    done: bool = False


@dataclass(eq=False)
class EngineSequence:
    """A request's tokens, what the cache holds of them, and its answer.

    `computed` positions have keys and values in `blocks`; `cached_tokens` of the prompt were found in the cache at its
    first admission. `slot` is its row of the block tables while it runs, `state` what it has besides if the model has
    recurrent layers. `pooled` float64 [hidden_size] is the sum of
    hidden states so far, and in the end the embedding, of length 1. `told` positions of the prompt had their logits
    passed on. Whole rows of logits have `vocab_size` numbers; 0 samples from whole rows alone. While it waits, `fetch`
    says what comes from files for it.
    """

    request: Request
    number: int
    answer: Answer
    tokens: list[int]
    sampler: Sampler | None = None
    slot: int | None = None
    state: RecurrentState | None = None
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    cached_tokens: int | None = None
    error: str | None = None
    sent_blocks: int = 0
    published: int = 0
    last_digest: bytes = b""
    preemptions: int = 0
    pooled: np.ndarray | None = None
    told: int = 0
    vocab_size: int = 0
    drafting: Drafting = field(default_factory=Drafting)
    fetch: Fetch | None = None
    _digests: tuple[int, list[bytes]] = (-1, [])

    def __post_init__(self) -> None:
        self._salt = salt_digest(self.request.cache_salt)
        self.last_digest = self._salt
        self.told = self.request.prompt_logits_from

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.computed

    @property
    def finished(self) -> bool:
        return self.answer.finish_reason is not None

    @property
    def constraint_finished(self) -> bool:
        """Whether the constraint lets nothing more come."""
        return self.request.constraint is not None and self.request.constraint.finished

    def make_sampler(self, vocab_size: int) -> Sampler:
        """The sequence's sampler, made when first needed: it is as large as the vocabulary."""
        if self.sampler is None:
            self.sampler = Sampler(self.request.sampling, vocab_size, self.request.prompt_ids)
        return self.sampler

    def blocks_needed(self, tokens: int) -> int:
        """New blocks for so many more tokens."""
        return max(0, blocks_for(self.computed + tokens) - len(self.blocks))

    def prefix_digests(self) -> list[bytes]:
        """The digests of the full blocks before the last token, which must be computed to be continued.

        Where the prompt's logits are wanted, only of blocks whose logits were passed on before a preemption.
        """
        if not self.request.reuse_prefix or self.request.pooling == "mean":
            return []
        if self._digests[0] != len(self.tokens):
            self._digests = len(self.tokens), prefix_digests(self.tokens[:-1], self._salt)
        return self._digests[1] if self.untold == 0 else self._digests[1][: self.told // BLOCK_POSITIONS]

    @property
    def last_reusable(self) -> int:
        """The last border of blocks from which the prompt can be answered again: its last token must be computed."""
        return (len(self.request.prompt_ids) - 1) // BLOCK_POSITIONS * BLOCK_POSITIONS

    @property
    def untold(self) -> int:
        """Positions of the prompt whose logits are still to be passed on."""
        return 0 if self.request.on_prompt_logits is None else len(self.request.prompt_ids) - 1 - self.told

    def untold_among(self, count: int) -> int:
        """How many of the next `count` pending positions are."""
        return max(0, min(self.computed + count, self.told + self.untold) - max(self.computed, self.told))

    def plan_states(self, count: int, drafts: int) -> SegmentStates | None:
        """The state slots of the next `count` pending tokens and drafts, if the model has recurrent layers."""
        return None if self.state is None else self.state.plan(self.computed, count, drafts, self._digest_at)

    def _digest_at(self, position: int) -> bytes:
        """The digest of the text before a border of blocks that is not published yet."""
        digest = self.last_digest
        for start in range(self.published * BLOCK_POSITIONS, position, BLOCK_POSITIONS):
            digest = block_digest(digest, self.tokens[start : start + BLOCK_POSITIONS])
        return digest

    def segment(self, count: int, drafts: list[int], states: SegmentStates | None = None) -> Segment:
        """The next `count` pending tokens and then drafts, with the logits that are wanted of them."""
        assert self.slot is not None
        ids = self.tokens[self.computed : self.computed + count] + drafts
        sampled = 1 + len(drafts) if count == self.pending and not self.request.pooling else 0
        new = self.blocks[self.sent_blocks :]
        logits = self.untold_among(count) + sampled
        wanted = WHOLE if logits > sampled else self._wanted
        segment = Segment(self.slot, self.computed, ids, logits, self.sent_blocks, new, states, wanted)
        self.sent_blocks = len(self.blocks)
        return segment

    @property
    def _wanted(self) -> Wanted:
        """What of a row of logits it is sampled from: all of it, if somebody else looks at it, too."""
        request = self.request
        looks = request.on_logits is not None or request.constraint is not None
        return WHOLE if looks else wanted_of(request.sampling, self.vocab_size)

    def publish(self, pool: BlockPool) -> None:
        """Let others find the blocks that became full, and the snapshots of the state at their ends."""
        while (self.published + 1) * BLOCK_POSITIONS <= self.computed:
            start = self.published * BLOCK_POSITIONS
            self.last_digest = block_digest(self.last_digest, self.tokens[start : start + BLOCK_POSITIONS])
            pool.publish(self.blocks[self.published], self.last_digest)
            self.published += 1
            if self.state is not None:
                self.state.publish(self.published * BLOCK_POSITIONS, self.last_digest)
        if self.state is not None:
            self.state.settle(self.computed)

    def leave(self, pool: BlockPool) -> None:
        """Give slot, state and blocks back; the tokens stay."""
        self.leave_state()
        pool.release(self.blocks)
        self.blocks, self.slot = [], None
        self.computed = self.sent_blocks = self.published = 0
        self.last_digest = self._salt
        self.drafting.progress, self.drafting.unreadable = None, False
        self.fetch = None

    def leave_state(self) -> None:
        """Give the state slots back, if there are any."""
        if self.state is not None:
            self.state.leave()
            self.state = None


def check_prompt(ids: Sequence[int], longest: int, vocab_size: int, room: int = 1) -> None:
    """UserError for a prompt that cannot run in a context of `longest` positions with `room` for an answer."""
    if not ids:
        raise UserError("the prompt is empty: give at least one token.")
    if len(ids) + room > longest:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but the context holds {longest}: shorten it or raise --max-seq-len."
        )
    check_token_ids(ids, vocab_size)
