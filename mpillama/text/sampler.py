"""The next token from the logits of the last position."""

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from mpillama.errors import UserError
from mpillama.text.sampling_params import SamplingParams, new_seed
from mpillama.text.tokenizer import check_token_ids

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

HEAD = 1024  # most likely tokens that usually decide, without an exact look at the rest of the vocabulary
# Largest relative error of a sum of float32 exponentials: rounding an exponent of up to 88 costs 4e-6.
TAIL_ERROR = 2e-5


class NonFiniteLogits(Exception):  # noqa: N818 - names the condition, as the message does
    """The model returned logits from which no token can be chosen."""


class Sampler:
    """Chooses the tokens of one sequence and remembers them for the penalties.

    The choice depends on the logits and the seed only: all float64, and one random number per token, with which a draw
    walks the kept tokens by falling logit, equals by rising id (with no filter on: by id after the first HEAD). The
    last bit of np.exp may differ between processors, which all but never moves a choice.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt_ids: Sequence[int]) -> None:
        self.seed = new_seed() if params.seed is None else params.seed
        self._params = params
        self._lowest = math.log(params.min_p) if params.min_p else -math.inf  # of scores whose maximum is 0
        self._rng = np.random.Generator(np.random.PCG64(self.seed))
        check_bias(params.logit_bias, vocab_size)
        self._bias = params.logit_bias
        check_token_ids(prompt_ids, vocab_size)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[list(prompt_ids)] = True
        self._counts = np.zeros(vocab_size, np.int64)

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Token id chosen from `logits` [vocab_size]; NonFiniteLogits if there is none to choose."""
        if logits.shape != self._seen.shape:
            raise ValueError(f"logits have shape {logits.shape}, the vocabulary {self._seen.shape}")
        check_finite(logits)
        scores = self._penalized(logits.astype(np.float64))
        if not np.isfinite(scores.max()):
            raise NonFiniteLogits("Bias and penalties leave no finite numbers to choose from: make them smaller.")
        greedy = self._params.temperature == 0
        token = int(scores.argmax()) if greedy else self._draw(scores)
        self._seen[token] = True
        self._counts[token] += 1
        return token

    def _penalized(self, scores: Floats) -> Floats:
        """Add the bias and the penalties to `scores` [vocab_size], in place."""
        params = self._params
        for token, bias in self._bias.items():
            scores[token] += bias
        if params.repetition_penalty != 1:
            seen = scores[self._seen]
            scores[self._seen] = np.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            used = np.flatnonzero(self._counts)
            scores[used] -= params.presence_penalty + params.frequency_penalty * self._counts[used]
        return scores

    def _draw(self, scores: Floats) -> int:
        """Token id drawn from the softmax of `scores` [vocab_size]."""
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
            scores = (scores - scores.max()) / self._params.temperature
        uniform = self._rng.random()
        top_k = self._params.top_k if self._params.top_k < scores.size else 0
        head = largest(scores, min(top_k or HEAD, scores.size))
        cumulative = np.cumsum(np.exp(scores[head]))
        complete = top_k > 0 or head.size == scores.size
        tail = 0.0 if complete else _tail(scores, head)
        # The tail is known roughly. If both ends of what it may be give the same token, the exact tail would as well.
        totals = (cumulative[-1] + tail * (1 - TAIL_ERROR), cumulative[-1] + tail * (1 + TAIL_ERROR))
        low, high = (self._pick(cumulative, scores[head], total, uniform, complete) for total in totals)
        return self._draw_exactly(scores, head, uniform) if low is None or low != high else int(head[low])

    def _draw_exactly(self, scores: Floats, head: Ids, uniform: float) -> int:
        """As `_draw`, with the weight of every token; several times slower for large vocabularies."""
        params = self._params
        weights = np.exp(scores)
        if params.top_p == 1 and params.min_p == 0:
            rest = np.ones(scores.size, bool)
            rest[head] = False
            order = np.concatenate([head, np.flatnonzero(rest)])
            total = 0.0  # only top_p asks for it
        else:
            total = np.cumsum(weights)[-1]  # not sum(), whose order depends on the processor
            # All tokens below this weight together are less than 1 - top_p: none is kept, so none need be sorted.
            needless = 0.999 * (1 - params.top_p) * total / scores.size
            order = _descending(scores, np.flatnonzero((weights >= needless) & (scores >= self._lowest)))
        pick = self._pick(np.cumsum(weights[order]), scores[order], total, uniform, complete=True)
        assert pick is not None  # nothing lies beyond a complete order
        return int(order[pick])

    def _pick(self, cumulative: Floats, scores: Floats, total: float, uniform: float, complete: bool) -> int | None:
        """Index drawn from likely-first `cumulative` weights, None if it lies beyond them."""
        params, size = self._params, len(scores)
        kept = size if complete else size + 1
        if params.top_p < 1:
            kept = min(kept, int(np.searchsorted(cumulative, params.top_p * total)) + 1)
        above = int(np.count_nonzero(scores >= self._lowest))
        kept = min(kept, above) if above < size else kept
        if kept > size and (params.top_p < 1 or params.min_p):
            return None
        mass = total if kept > size else cumulative[kept - 1]
        # The largest random number is 1 - 2**-53: the product rounds to less than the mass, so no token of weight 0
        # behind the last one can be chosen.
        index = int(np.searchsorted(cumulative, uniform * mass, side="right"))
        return index if index < size else None


def check_finite(logits: npt.NDArray[np.float32]) -> None:
    """NonFiniteLogits if nothing can be made of `logits` [vocab_size]."""
    if not np.isfinite(logits.max()):
        raise NonFiniteLogits(
            "The model returned NaN or infinite logits: its file is damaged, or its numbers overflowed."
        )


def largest(scores: Floats | npt.NDArray[np.float32], count: int) -> Ids:
    """Ids of the `count` largest `scores`, largest first, the lower id first among equals."""
    # `count` columns have their maximum at or above `bound`, so at least `count` scores do: only those are sorted.
    rows = max(1, scores.size // (4 * count))
    columns = scores.size // rows
    maxima = scores[: rows * columns].reshape(rows, columns).max(axis=0)
    bound = np.partition(maxima, columns - count)[columns - count]
    return _descending(scores, np.flatnonzero(scores >= bound))[:count]


def _descending(scores: Floats | npt.NDArray[np.float32], ids: Ids) -> Ids:
    """Ascending `ids` reordered by descending score, the lower id first among equals."""
    return ids[np.argsort(-scores[ids], kind="stable")]


def _tail(scores: Floats, head: Ids) -> float:
    """Sum of exp(`scores`) outside `head`, to a relative TAIL_ERROR.

    In float32, which is twice as fast as float64 with AVX-512 and 5 to 8 times without.
    """
    rest = scores.astype(np.float32)
    rest[head] = -np.inf
    return float(np.exp(rest).sum(dtype=np.float64))


def check_bias(bias: Mapping[int, float], vocab_size: int) -> None:
    """UserError for a token id outside the vocabulary."""
    for token in bias:
        if not 0 <= token < vocab_size:
            raise UserError(f"logit_bias names token {token}, but the ids are 0 to {vocab_size - 1}; correct the id.")


def derived_seed(seed: int, text: str) -> int:
    """A seed of its own for each text, the same in every run; below 2^53, exact in any JSON reader."""
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") >> 11
