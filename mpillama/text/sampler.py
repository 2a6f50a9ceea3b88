"""The next token from the logits of the last position."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from mpillama.errors import UserError
from mpillama.models.candidates import WHOLE, Candidates, Wanted, descending, largest, weight_of_rest
from mpillama.text.sampling_params import SamplingParams, new_seed
from mpillama.text.tokenizer import check_token_ids

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

HEAD = 1024  # most likely tokens that usually decide, without an exact look at the rest of the vocabulary
# Largest relative error of a sum of float32 exponentials: rounding an exponent of up to 88 costs 4e-6.
TAIL_ERROR = 2e-5
FEWEST_OTHERS = 4  # a row has so many times the candidates, or all of it is looked at


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
        self._remembers = params.penalises
        self._spare: np.random.Generator | None = None

    def ahead(self) -> "Sampler":
        """A sampler that will choose as this one will, and leaves it as it is; until the next one is asked for."""
        other = copy(self)
        if self._params.temperature:
            if self._spare is None:  # a state is set in 2 µs, a generator copied in 60
                self._spare = np.random.Generator(np.random.PCG64(self.seed))
            self._spare.bit_generator.state = self._rng.bit_generator.state
            other._rng = self._spare
        if self._remembers:
            other._seen, other._counts = self._seen.copy(), self._counts.copy()
        return other

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Token id chosen from `logits` [vocab_size]; NonFiniteLogits if there is none to choose."""
        if logits.shape != self._seen.shape:
            raise ValueError(f"logits have shape {logits.shape}, the vocabulary {self._seen.shape}")
        check_finite(logits)
        scores = self._penalized(logits.astype(np.float64))
        if not np.isfinite(scores.max()):
            raise NonFiniteLogits("Bias and penalties leave no finite numbers to choose from: make them smaller.")
        greedy = self._params.temperature == 0
        return self._note(int(scores.argmax()) if greedy else self._draw(self._scaled(scores), self._rng.random()))

    def sample_among(self, candidates: Candidates, whole: Callable[[], npt.NDArray[np.float32]]) -> int:
        """The token that `sample` chooses from the whole row, fetched only where the candidates leave doubt."""
        check_finite(candidates.values)
        if self._params.temperature == 0:
            return self._note(int(candidates.ids[candidates.values.argmax()]))
        scores = self._scaled(candidates.values.astype(np.float64))
        uniform = self._rng.random()
        head = largest(scores, min(self._params.top_k or HEAD, scores.size))
        rest = np.ones(scores.size, bool)
        rest[head] = False
        complete = self._params.top_k > 0
        others = candidates.tail(float(candidates.values.max()), self._params.temperature)
        tail = 0.0 if complete else others + float(np.exp(scores[rest]).sum())
        pick = self._decide(scores[head], tail, complete, uniform)
        if pick is not None:
            return self._note(int(candidates.ids[head[pick]]))
        return self._note(self._draw(self._scaled(whole().astype(np.float64)), uniform))

    def _note(self, token: int) -> int:
        if self._remembers:
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
            with np.errstate(over="ignore"):  # what is infinite is refused then
                changed = np.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty)
            scores[self._seen] = changed
        if params.presence_penalty or params.frequency_penalty:
            used = np.flatnonzero(self._counts)
            scores[used] -= params.presence_penalty + params.frequency_penalty * self._counts[used]
        return scores

    def _scaled(self, scores: Floats) -> Floats:
        """The exponents of weights of which the largest is 1."""
        with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
            scaled: Floats = (scores - scores.max()) / self._params.temperature
        return scaled

    def _draw(self, scores: Floats, uniform: float) -> int:
        """Token id drawn from the softmax of `scores` [vocab_size], whose maximum is 0."""
        top_k = self._params.top_k if self._params.top_k < scores.size else 0
        head = largest(scores, min(top_k or HEAD, scores.size))
        complete = top_k > 0 or head.size == scores.size
        tail = 0.0 if complete else weight_of_rest(scores, head)
        pick = self._decide(scores[head], tail, complete, uniform)
        return self._draw_exactly(scores, head, uniform) if pick is None else int(head[pick])

    def _decide(self, scores: Floats, tail: float, complete: bool, uniform: float) -> int | None:
        """Index drawn from likely-first `scores`, None if that needs the exact weight of the rest."""
        cumulative = np.cumsum(np.exp(scores))
        # The tail is known roughly. If both ends of what it may be give the same token, the exact tail would as well.
        totals = (cumulative[-1] + tail * (1 - TAIL_ERROR), cumulative[-1] + tail * (1 + TAIL_ERROR))
        low, high = (self._pick(cumulative, scores, total, uniform, complete) for total in totals)
        return low if low == high else None

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
            order = descending(scores, np.flatnonzero((weights >= needless) & (scores >= self._lowest)))
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


def wanted_of(params: SamplingParams, vocab_size: int) -> Wanted:
    """What a row's likeliest tokens must be to sample from them alone; all of it where scores are changed by token."""
    changes = params.logit_bias or params.penalises
    count = 1 if params.temperature == 0 else params.top_k or HEAD
    return WHOLE if changes or FEWEST_OTHERS * count > vocab_size else Wanted(count, params.temperature)


def check_bias(bias: Mapping[int, float], vocab_size: int) -> None:
    """UserError for a token id outside the vocabulary."""
    for token in bias:
        if not 0 <= token < vocab_size:
            raise UserError(f"logit_bias names token {token}, but the ids are 0 to {vocab_size - 1}; correct the id.")


def derived_seed(seed: int, text: str) -> int:
    """A seed of its own for each text, the same in every run; below 2^53, exact in any JSON reader."""
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") >> 11
