"""How many tokens are drafted: as measured costs and acceptance say."""

import pytest

from mpillama.engine.answer import Answer
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.engine.speculation import PLAIN_INTERVAL, PROBE_INTERVAL, DraftLengths, best_length, tokens_of_step
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer
from tests import tiny_models as models

MOST = 4


def new_sequence() -> EngineSequence:
    tokenizer = Tokenizer(models.toy_tokenizer(), bos_token_id=models.BOS, eos_token_ids=(), add_bos=True)
    request = Request([5], SamplingParams())
    return EngineSequence(request, 0, Answer(tokenizer, request.sampling), [5])


def simulate(pace: DraftLengths, rate_of_four: int, cost: float, steps: int) -> list[int]:
    """The drafts of each step where so many of four come true, and a draft adds such a share of a step."""
    sequence, found = new_sequence(), []
    for _ in range(steps):
        pace.begin(1)
        drafts = pace.limit(sequence, MOST)
        found.append(drafts)
        accepted = min(drafts, rate_of_four)
        pace.note_drafts(sequence, min(drafts, accepted + 1), accepted)
        pace.note_step(1 + cost * drafts, drafts, 1)
    return found


@pytest.mark.parametrize(
    ("rate", "cost", "best"), [(1.0, 0.2, 4), (0.0, 0.1, 0), (0.5, 0.0, 4), (0.5, 0.3, 1), (0.9, 2.0, 0), (0.8, 0.1, 4)]
)
def test_the_best_number_of_drafts(rate: float, cost: float, best: int) -> None:
    assert best_length(rate, cost, MOST) == best
    each = [tokens_of_step(rate, n) / (1 + n * cost) for n in range(MOST + 1)]
    assert max(each) == each[best]


def test_cheap_drafts_that_come_true_go_on() -> None:
    found = simulate(DraftLengths(), 4, 0.1, 300)
    assert found.count(0) <= 1 + 300 // PLAIN_INTERVAL  # steps that show what drafts cost
    assert set(found) == {0, MOST}


@pytest.mark.parametrize(("true", "cost"), [(0, 0.1), (4, 1.5)])
def test_drafts_that_lose_cease_but_for_a_trial_now_and_again(true: int, cost: float) -> None:
    found = simulate(DraftLengths(), true, cost, 600)
    later = found[60:]
    assert 0 < sum(map(bool, later)) <= 1 + len(later) // PROBE_INTERVAL


def test_drafts_come_back_when_a_text_becomes_predictable() -> None:
    pace, sequence = DraftLengths(), new_sequence()
    for step in range(400):
        pace.begin(1)
        drafts = pace.limit(sequence, MOST)
        accepted = drafts if step >= 200 else 0
        pace.note_drafts(sequence, drafts if accepted else min(1, drafts), accepted)
        pace.note_step(1 + 0.1 * drafts, drafts, 1)
        if step == 199:
            assert sequence.drafting.rate < 0.2
    assert sequence.drafting.rate > 0.9
