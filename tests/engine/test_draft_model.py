"""Draft models: whatever they guess, answers have the bits that they have without them."""

from dataclasses import replace

import numpy as np
import pytest

from mpillama.engine.engine import Engine
from mpillama.engine.executor import Executor
from mpillama.engine.pace import LEAST_TOKENS, Pace
from mpillama.engine.sequence import Request
from mpillama.engine.speculation import DraftLengths
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer
from tests import running
from tests import tiny_models as models
from tests.conftest import THREADS, ModelFile
from tests.engine.test_engine import LONGEST, alone, random_request

SLOTS, MAX_TOKENS = 4, 48


class Always(DraftLengths):
    """As many drafts as there may be, whatever they cost."""

    def begin(self, sequences):
        self.sequences = sequences

    def best(self, sequence, most):
        return most

    def limit(self, sequence, most):
        return most


@pytest.fixture(scope="module")
def toy(model_file: ModelFile):
    return running.load(model_file("toy", "q8_0"), THREADS)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of another family with the same vocabulary, which guesses badly."""
    path = tmp_path_factory.mktemp("other") / "other.h5"
    models.write_random(path, models.LATENT_TOY, "q8_0")
    return running.load(path, THREADS)


@pytest.fixture(scope="module")
def delta(model_file: ModelFile):
    return running.load(model_file("delta", "q8_0"), THREADS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(models.toy_tokenizer(), bos_token_id=models.BOS, eos_token_ids=(models.EOS,), add_bos=True)


def drafting_engine(model, draft, tokenizer, blocks=8, most=3, longest=LONGEST, pace=None, max_tokens=MAX_TOKENS):
    executor = Executor(model, LONGEST, "f16", max_tokens, SLOTS, blocks)
    executor.draft = Executor(draft, longest, "f16", max_tokens + SLOTS, SLOTS, blocks, 2 * SLOTS)
    engine = Engine(executor, tokenizer, most)
    if engine.drafter is not None:
        engine.drafter.lengths = pace or Always()
    return engine


@pytest.mark.parametrize(
    ("main", "draft", "seed"),
    [("toy", "toy", 1), ("toy", "other", 2), ("toy", "delta", 3), ("delta", "delta", 4), ("delta", "toy", 5)],
)
def test_answers_do_not_depend_on_a_draft_model(main, draft, seed, tokenizer, request):
    """Random arrivals, cancels, sequences pushed out, prefixes found in the cache; attention and recurrent states."""
    model, rng = request.getfixturevalue(main), np.random.default_rng(seed)
    engine = drafting_engine(model, request.getfixturevalue(draft), tokenizer, blocks=8 if main == "toy" else 6)
    waiting, alive, done = [random_request(rng, i) for i in range(16)], [], []
    while waiting or not engine.idle:
        if waiting and rng.random() < 0.3:
            alive.append(engine.submit(replace(waiting.pop(), speculate=bool(rng.random() < 0.9))))
        if alive and rng.random() < 0.01:
            engine.cancel(alive.pop(int(rng.integers(len(alive)))))
        for update in engine.step():
            if update.sequence.finished:
                alive.remove(update.sequence)
                done.append(update.sequence)
    assert len(done) > 10
    assert engine.scheduler.preemptions > 0
    assert engine.drafter.accepted > 0
    if main == draft:
        assert engine.drafter.acceptance > 0.9  # but for sequences' ends and the last bits of other steps
    for sequence in done:
        answer, digest = alone(model, tokenizer, sequence.request)
        assert sequence.answer.token_ids == answer.token_ids
        assert sequence.request.on_logits.digest.hexdigest() == digest


def ask(engine, prompt, **sampling):
    request = Request(prompt, SamplingParams(ignore_eos=True, **{"seed": 4, **sampling}))
    sequence = engine.submit(request)
    for _ in engine.run(sequence):
        pass
    return sequence


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_is_the_perfect_draft_of_itself(toy, tokenizer, temperature):
    """Sampled answers too: guesses are drawn with the random numbers that come."""
    engine = drafting_engine(toy, toy, tokenizer)
    ask(engine, [5, 6, 7, 8], max_tokens=41, temperature=temperature)
    assert engine.drafter.acceptance == 1
    assert engine.counts.steps == 11  # the prompt's with three drafts, and ten of four tokens


def test_a_draft_model_finds_the_prefixes_that_the_cache_knows(toy, tokenizer, monkeypatch):
    engine, prompt = drafting_engine(toy, toy, tokenizer), list(np.arange(140) % 50 + 5)
    ask(engine, prompt, max_tokens=5)
    read = []
    forward = engine.executor.draft.forward_in_pieces
    monkeypatch.setattr(
        engine.executor.draft,
        "forward_in_pieces",
        lambda segments: read.extend((s.start, len(s.token_ids)) for s in segments) or forward(segments),
    )
    ask(engine, prompt, max_tokens=5)
    assert read[0] == (128, 12)
    assert engine.drafter.acceptance == 1


def test_a_draft_model_with_a_shorter_context_drafts_up_to_there(toy, tokenizer):
    whole = ask(drafting_engine(toy, toy, tokenizer), [5] * 60, max_tokens=60).answer.token_ids
    engine = drafting_engine(toy, toy, tokenizer, longest=80)
    assert ask(engine, [5] * 60, max_tokens=60).answer.token_ids == whole
    assert 15 <= engine.drafter.accepted <= 20
    assert ask(engine, [5] * 100, max_tokens=9).answer.finish_reason == "length"


@pytest.mark.parametrize("length", [127, 129, 250])
def test_blocks_beyond_a_draft_models_context_stay_with_the_model(toy, tokenizer, length):
    """A step of a long prompt brings several blocks, for which the draft model's table has no place."""
    prompt, largest = [5] * length, 256
    whole = ask(drafting_engine(toy, toy, tokenizer, most=0, max_tokens=largest), prompt, max_tokens=6)
    engine = drafting_engine(toy, toy, tokenizer, longest=64, max_tokens=largest)
    beside = ask(engine, [6] * 60, max_tokens=9)
    assert ask(engine, prompt, max_tokens=6).answer.token_ids == whole.answer.token_ids
    assert engine.drafter.accepted > 0
    assert ask(engine, [6] * 60, max_tokens=9).answer.token_ids == beside.answer.token_ids
    engine = drafting_engine(toy, toy, tokenizer, longest=128, max_tokens=largest)
    assert ask(engine, prompt, max_tokens=6).answer.token_ids == whole.answer.token_ids


@pytest.mark.parametrize("draft", ["toy", "delta"])
def test_a_draft_model_reads_what_it_lacks_in_pieces_while_answers_wait(draft, toy, tokenizer, request, monkeypatch):
    """It has read nothing of a prompt that the model finds in its cache, where another request did without drafts."""
    model, prompt = request.getfixturevalue(draft), list(np.arange(200) % 50 + 5)
    engine = drafting_engine(toy, model, tokenizer, blocks=16, max_tokens=256)
    engine.pace = engine.scheduler.pace = Pace(0.0)
    before = Request(prompt, SamplingParams(seed=4, max_tokens=9, ignore_eos=True), speculate=False)
    first = engine.submit(before)
    for _ in engine.run(first):
        pass
    sampling = SamplingParams(seed=1, max_tokens=60, ignore_eos=True)
    waiting, steps = engine.submit(Request([5, 6, 7], sampling)), []
    engine.step()
    forward = engine.executor.draft.forward_in_pieces
    monkeypatch.setattr(
        engine.executor.draft,
        "forward_in_pieces",
        lambda segments: steps.append([(s.slot, len(s.token_ids)) for s in segments]) or forward(segments),
    )
    again = engine.submit(replace(before, speculate=True, sampling=replace(first.request.sampling, max_tokens=60)))
    while not again.finished:
        if waiting.finished:
            waiting = engine.submit(Request([5, 6, 7], sampling))
        engine.step()
    drafts = engine.drafter.most
    assert max(sum(count for _, count in step) for step in steps) <= LEAST_TOKENS + 2 * (drafts + 1)
    assert again.answer.token_ids[:9] == first.answer.token_ids
    assert any(len(step) > 1 for step in steps[-4:]), "it has caught up with both, and guesses"


def test_a_request_may_do_without_drafts(toy, tokenizer):
    engine = drafting_engine(toy, toy, tokenizer)
    sequence = engine.submit(Request([5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True), speculate=False))
    for _ in engine.run(sequence):
        pass
    assert engine.drafter.proposed == 0
    assert len(sequence.answer.token_ids) == 9


def test_a_draft_model_whose_numbers_are_none_is_left_aside(toy, tokenizer, monkeypatch, caplog):
    whole = ask(drafting_engine(toy, toy, tokenizer), [5, 6], max_tokens=9).answer.token_ids
    engine = drafting_engine(toy, toy, tokenizer)
    nothing = np.full((1, models.TOY_VOCABULARY), np.nan, np.float32)
    monkeypatch.setattr(engine.executor.draft, "forward_in_pieces", lambda segments: iter([list(nothing)]))
    assert ask(engine, [5, 6], max_tokens=9).answer.token_ids == whole
    assert engine.drafter.proposed == 0
    assert [record.message for record in caplog.records if "left aside" in record.message]


def test_a_request_that_leaves_nothing_to_choose_from_costs_others_no_drafts(toy, tokenizer, caplog):
    """Its penalty makes infinite numbers of any logits, those of the draft model first."""
    engine = drafting_engine(toy, toy, tokenizer, max_tokens=128)
    wrong = ask(engine, list(range(5, 100)), max_tokens=9, repetition_penalty=1e-320)
    assert "Bias and penalties" in wrong.error
    assert engine.drafter.proposed == 0
    assert ask(engine, [5, 6, 7], max_tokens=9).error is None
    assert engine.drafter.accepted > 0
    assert not [record for record in caplog.records if "left aside" in record.message]
