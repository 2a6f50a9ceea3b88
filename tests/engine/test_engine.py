"""The engine with a model: each answer has the bits that it has alone, whatever comes, goes or is pushed out."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from mpillama.errors import UserError
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer
from tests import running
from tests import tiny_models as models
from tests.conftest import THREADS, ModelFile
from tests.engine.one_sequence import OneSequence

LONGEST = 256


@pytest.fixture(scope="module")
def model(model_file: ModelFile):
    return running.load(model_file("toy", "q8_0"), THREADS)


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "latents.h5"
    models.write_random(path, models.LATENT_TOY, "q8_0")
    return running.load(path, THREADS)


@pytest.fixture(scope="module")
def delta_model(model_file: ModelFile):
    return running.load(model_file("delta", "q8_0"), THREADS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(models.toy_tokenizer(), bos_token_id=models.BOS, eos_token_ids=(models.EOS,), add_bos=True)


def new_engine(
    model, tokenizer, slots=4, blocks=8, max_tokens=48, speculate=0, longest=LONGEST, states=0, open_folder=None
):
    from mpillama.engine.engine import Engine
    from mpillama.engine.executor import Executor

    executor = Executor(model, longest, "f16", max_tokens, slots, blocks, states)
    executor.folder = open_folder(executor) if open_folder else None
    return Engine(executor, tokenizer, speculate)


class Recorder:
    """The digest of the logits that each token was chosen from."""

    def __init__(self):
        self.digest = hashlib.sha256()

    def __call__(self, logits, token):
        self.digest.update(logits.tobytes() + token.to_bytes(4, "little"))


def make_request(seed: int, prompt: list[int], max_tokens: int, stops=()):
    from mpillama.engine.sequence import Request

    temperature = (0.0, 0.7, 1.3)[seed % 3]
    params = SamplingParams(
        temperature=temperature, top_p=1.0, seed=seed, repetition_penalty=1.0 + 0.1 * (seed % 2),
        max_tokens=max_tokens, stop=stops, ignore_eos=True,
    )  # fmt: skip
    return Request(prompt, params, seed, Recorder())


def random_request(rng: np.random.Generator, seed: int):
    """Prompts share beginnings and hold repetitions, so that cache and drafts have something to find."""
    shared = np.random.default_rng(int(rng.integers(3))).integers(5, models.TOY_VOCABULARY, 130).tolist()
    own = rng.integers(5, 12, int(rng.integers(1, 60))).tolist()
    prompt = shared[: int(rng.integers(0, 131))] + own
    return make_request(seed, prompt, int(rng.integers(1, 60)))


def alone(model, tokenizer, request):
    """The answer of a request without company."""
    from mpillama.engine.answer import Answer
    from mpillama.engine.executor import Executor
    from mpillama.text.sampler import Sampler

    session, recorder = OneSequence(Executor(model, LONGEST, "f16", 100)), Recorder()
    sampler = Sampler(request.sampling, models.TOY_VOCABULARY, request.prompt_ids)
    answer, new = Answer(tokenizer, request.sampling), request.prompt_ids
    while answer.finish_reason is None:
        logits = session.extend(new)
        token = sampler.sample(logits)
        recorder(logits, token)
        answer.push(token, LONGEST - session.length - 1)
        new = [token]
    return answer, recorder.digest.hexdigest()


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_answers_do_not_depend_on_company(model, tokenizer, seed, speculate):
    """Random arrivals, cancels, a pool so small that sequences are pushed out, prefixes found in the cache."""
    check_company(model, tokenizer, seed, speculate)


def test_answers_over_a_cache_of_latents_do_not_depend_on_company(latent_model, tokenizer):
    check_company(latent_model, tokenizer, 1, speculate=4)


def test_answers_over_blocks_that_are_chosen_do_not_depend_on_company(tmp_path, tokenizer):
    """Steps hold drafts, tokens that choose, and such that see so little that they need not."""
    models.write_random(tmp_path / "blocks.h5", models.BLOCK_SPARSE_TOY, "q8_0")
    check_company(running.load(tmp_path / "blocks.h5", THREADS), tokenizer, 1, speculate=4)


@pytest.mark.parametrize(("seed", "speculate", "states"), [(2, 0, 12), (6, 4, 0), (4, 4, 28)])
def test_answers_over_recurrent_states_do_not_depend_on_company(delta_model, tokenizer, seed, speculate, states):
    """With a single slot for snapshots, in which drafts hardly find a place, and with enough for all."""
    engine = check_company(delta_model, tokenizer, seed, speculate, blocks=6, states=states)
    assert engine.pool.states.available == engine.executor.states == (states or 5)


def check_company(model, tokenizer, seed, speculate, blocks=8, states=0, open_folder=None):
    rng = np.random.default_rng(seed)
    engine = new_engine(model, tokenizer, blocks=blocks, speculate=speculate, states=states, open_folder=open_folder)
    requests = [random_request(rng, i) for i in range(30)]
    waiting, alive, done, cancelled = list(requests), [], [], 0
    while waiting or not engine.idle:
        if waiting and rng.random() < 0.3:
            alive.append(engine.submit(waiting.pop()))
        if alive and rng.random() < 0.01:
            engine.cancel(alive.pop(int(rng.integers(len(alive)))))
            cancelled += 1
        for update in engine.step():
            if update.sequence.finished:
                alive.remove(update.sequence)
                done.append(update.sequence)
    assert cancelled + len(done) == len(requests)
    assert len(done) > 20
    assert engine.scheduler.preemptions > 0
    assert engine.counts.cached_tokens > 0
    assert engine.pool.available == blocks
    assert not speculate or engine.drafter.accepted > 0
    for sequence in done:
        answer, digest = alone(model, tokenizer, sequence.request)
        assert sequence.answer.token_ids == answer.token_ids
        assert (sequence.answer.text, sequence.answer.finish_reason) == (answer.text, answer.finish_reason)
        assert sequence.request.on_logits.digest.hexdigest() == digest
    return engine


class PromptRecorder:
    """The logits that each token of a prompt would have been chosen from, in bits."""

    def __init__(self):
        self.rows, self.tokens = [], []

    def __call__(self, logits, token):
        self.rows.append(logits.tobytes())
        self.tokens.append(token)


def run_to_the_end(engine):
    while not engine.idle:
        engine.step()


@pytest.mark.parametrize(("max_tokens", "piece"), [(48, 1000), (48, 5), (7, 1), (200, 64)])
def test_logits_of_prompts_do_not_depend_on_chunks_and_company(model, tokenizer, max_tokens, piece):
    """All of them, once and in order, also of beginnings that the cache knows."""
    rng = np.random.default_rng(max_tokens)
    engine = new_engine(model, tokenizer, slots=4, blocks=5, max_tokens=max_tokens, speculate=3)
    engine.executor.piece = piece
    requests = [random_request(rng, i) for i in range(10)]
    asked = [replace(r, on_prompt_logits=PromptRecorder()) for r in requests if r.key % 2]
    asked = [replace(r, sampling=replace(r.sampling, max_tokens=0)) if r.key % 3 == 0 else r for r in asked]
    others = [r for r in requests if not r.key % 2]
    for request, other in zip(asked, others, strict=True):
        engine.submit(request)
        engine.submit(other)
        for _ in range(int(rng.integers(4))):
            engine.step()
    run_to_the_end(engine)
    assert engine.pool.available == 5
    for request in asked:
        logits = running.all_logits(model, [np.array(request.prompt_ids)], "f16")
        found = request.on_prompt_logits
        assert found.tokens == request.prompt_ids[1:]
        assert found.rows == [row.tobytes() for row in logits[:-1]]
    for request in others:
        assert request.on_logits.digest.hexdigest() == alone(model, tokenizer, request)[1]


def test_a_prompt_that_was_pushed_out_goes_on_where_it_was(model, tokenizer):
    """What was passed on of it is neither computed nor told again."""
    engine, recorder = new_engine(model, tokenizer, slots=2, blocks=4, max_tokens=16), PromptRecorder()
    old = engine.submit(make_request(0, [5 + i for i in range(55)], 60))
    engine.step()
    prompt = [7 + i % 100 for i in range(185)]
    young = engine.submit(replace(make_request(1, prompt, 3), on_prompt_logits=recorder))
    while not young.preemptions:
        engine.step()
    before = young.told
    assert 64 <= before < 184
    run_to_the_end(engine)
    assert engine.counts.computed_tokens == 55 + 59 + before + (185 - before // 64 * 64) + 2
    assert len(old.answer.token_ids) == 60
    logits = running.all_logits(model, [np.array(prompt)], "f16")
    assert recorder.rows == [row.tobytes() for row in logits[:-1]]


def test_logits_of_a_prompt_are_computed_though_the_cache_knows_it(model, tokenizer):
    engine, prompt = new_engine(model, tokenizer), [5 + i % 200 for i in range(200)]
    for _ in range(2):
        recorder = PromptRecorder()
        sequence = engine.submit(replace(make_request(0, prompt, 2), on_prompt_logits=recorder))
        run_to_the_end(engine)
        assert (len(recorder.rows), sequence.cached_tokens) == (199, 0)
    again = engine.submit(make_request(0, prompt, 2))
    run_to_the_end(engine)
    assert again.cached_tokens == 192


@pytest.mark.parametrize("length", [1, 2, LONGEST])
def test_a_prompt_alone_may_fill_the_context(model, tokenizer, length):
    """Nothing is sampled for 0 tokens."""
    engine = new_engine(model, tokenizer, slots=1, blocks=LONGEST // 64)
    recorder = PromptRecorder()
    sequence = engine.submit(replace(make_request(0, [5] * length, 0), on_prompt_logits=recorder))
    run_to_the_end(engine)
    assert (sequence.answer.token_ids, sequence.answer.text, sequence.answer.finish_reason) == ([], "", "length")
    assert len(recorder.rows) == length - 1
    assert sequence.tokens == [5] * length


def test_logits_that_are_no_numbers_end_their_sequence_only(model, tokenizer, monkeypatch):
    """Whatever else is in the step goes on, with its own bits."""
    engine = new_engine(model, tokenizer, slots=2)
    run = engine.executor.run

    def damaged():
        for piece in run():
            if engine.counts.steps == 0:
                piece[0][:] = np.nan
            yield piece

    monkeypatch.setattr(engine.executor, "run", damaged)
    bad = engine.submit(replace(make_request(0, [7] * 60, 5), on_prompt_logits=PromptRecorder()))
    good = engine.submit(make_request(1, [9, 8], 5))
    run_to_the_end(engine)
    assert (bad.answer.finish_reason, bad.answer.token_ids) == ("error", [])
    assert "NaN" in bad.error
    assert good.request.on_logits.digest.hexdigest() == alone(model, tokenizer, good.request)[1]
    assert engine.pool.available == 8


def test_text_comes_in_pieces_that_add_up(model, tokenizer):
    engine, texts = new_engine(model, tokenizer), {}
    for i in range(6):
        engine.submit(make_request(i, [5 + i, 9, 20], 30, stops=["e"]))
    sequences = {}
    while not engine.idle:
        for update in engine.step():
            sequences[update.sequence.request.key] = update.sequence
            texts[update.sequence.request.key] = texts.get(update.sequence.request.key, "") + update.text
    assert texts == {key: s.answer.text for key, s in sequences.items()}
    assert {s.answer.finish_reason for s in sequences.values()} <= {"stop", "length"}
    assert all("e" not in text for text in texts.values())


def test_a_prefix_longer_than_a_message_is_found(model, tokenizer):
    """More known blocks than a step's message holds are sent before it."""
    engine = new_engine(model, tokenizer, slots=1, blocks=40, max_tokens=16, longest=2560)
    prompt = [5 + i % 200 for i in range(2400)]
    first = engine.submit(make_request(0, prompt, 3))
    while not engine.idle:
        engine.step()
    second = engine.submit(make_request(0, prompt, 3))
    while not engine.idle:
        engine.step()
    assert second.cached_tokens == 2368
    assert len(second.blocks) == 0
    assert engine.executor.plan.max_blocks < 37
    assert first.request.on_logits.digest.hexdigest() == second.request.on_logits.digest.hexdigest()


def test_the_answer_ends_with_the_context(model, tokenizer):
    engine = new_engine(model, tokenizer)
    sequence = engine.submit(make_request(3, [5] * (LONGEST - 4), 100))
    while not engine.idle:
        engine.step()
    assert sequence.answer.finish_reason == "length"
    assert len(sequence.tokens) == LONGEST


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [([], 1, "empty"), ([5] * LONGEST, 1, "context"), ([models.TOY_VOCABULARY], 1, "outside"), ([5], -1, "max_tokens")],
)
def test_what_can_never_run_is_refused(model, tokenizer, prompt, max_tokens, words):
    engine = new_engine(model, tokenizer)
    with pytest.raises(UserError, match=words):
        engine.submit(make_request(0, prompt, max_tokens))
    assert engine.idle


def test_ten_thousand_requests_leave_nothing_behind(model, tokenizer):
    import gc

    engine = new_engine(model, tokenizer, slots=16, blocks=16, max_tokens=256)
    counts = []
    for i in range(10_000):
        engine.submit(make_request(0, [5 + i % 200, 6], 1))
        if i % 16 == 15:
            while not engine.idle:
                engine.step()
        if i in (1999, 9999):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] < counts[0] + 200
    assert engine.counts.finished == 10_000
    assert engine.pool.available == 16


class Only:
    """A constraint: these tokens, in this order."""

    def __init__(self, tokens):
        self.left = list(tokens)

    @property
    def finished(self):
        return not self.left

    def masked(self, logits):
        masked = np.full_like(logits, -np.inf)
        masked[self.left[0]] = logits[self.left[0]]
        return masked

    def accept(self, token):
        assert token == self.left.pop(0)


@pytest.mark.parametrize("speculate", [0, 4])
def test_a_constraint_decides_and_ends_the_answer(model, tokenizer, speculate):
    from dataclasses import replace

    wanted = [7, 9, 7, 9, 7, 9, 11]
    engine = new_engine(model, tokenizer, speculate=speculate)
    request = replace(make_request(1, [7, 9, 7, 9, 7], 50), constraint=Only(wanted))
    sequence = engine.submit(request)
    while not engine.idle:
        engine.step()
    assert sequence.answer.token_ids == wanted
    assert sequence.answer.finish_reason == "stop"
    assert sequence.answer.text == tokenizer.decode(wanted)


def embed(engine, prompts, pooling):
    from mpillama.engine.sequence import Request

    params = SamplingParams(seed=1, max_tokens=1)
    sequences = [engine.submit(Request(ids, params, pooling=pooling)) for ids in prompts]
    while not engine.idle:
        engine.step()
    return [sequence.pooled for sequence in sequences]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_do_not_depend_on_chunks_company_or_preemption(model, tokenizer, pooling):
    """And they are the reference's hidden states, pooled."""
    from tests.reference import ReferenceLlama

    rng = np.random.default_rng(3)
    shared = rng.integers(5, models.TOY_VOCABULARY, 70).tolist()
    prompts = [shared + rng.integers(5, models.TOY_VOCABULARY, n).tolist() for n in (100, 30, 77, 1)]
    single = [embed(new_engine(model, tokenizer), [ids], pooling)[0] for ids in prompts]
    crowded = new_engine(model, tokenizer, blocks=4, max_tokens=23)
    crowded.submit(make_request(0, [5, 6] * 30, 150))
    for a, b in zip(single, embed(crowded, prompts, pooling), strict=True):
        np.testing.assert_array_equal(a, b)
    states = ReferenceLlama(models.TOY, models.random_tensors(models.TOY)).hidden_states(np.array(prompts[1]))
    pooled = states.mean(axis=0) if pooling == "mean" else states[-1]
    assert np.dot(pooled / np.linalg.norm(pooled), single[1]) > 0.999  # q8_0 weights against float64
    assert crowded.scheduler.preemptions


def test_drafts_stay_within_the_context(model, tokenizer):
    """However many are guessed, the answer ends where the context does, with the bits of a run without guesses."""
    prompt, texts = [5, 6, 7] * 12, []
    bias = {token: 100.0 if token in (5, 6, 7) else 0.0 for token in (5, 6, 7)}
    for speculate in (0, 7):
        engine = new_engine(model, tokenizer, slots=2, blocks=8, max_tokens=48, speculate=speculate, longest=64)
        request = make_request(0, prompt, 1)
        request = replace(request, sampling=replace(request.sampling, max_tokens=None, logit_bias=bias))
        sequence = engine.submit(request)
        run_to_the_end(engine)
        assert (len(sequence.tokens), sequence.answer.finish_reason) == (64, "length")
        texts.append((sequence.tokens, request.on_logits.digest.hexdigest()))
    assert texts[0] == texts[1]
    assert engine.drafter.accepted > 0


def test_sequences_that_are_run_take_turns_and_are_cancelled_when_left(model, tokenizer):
    engine = new_engine(model, tokenizer, max_tokens=16)
    requests = [make_request(i, [9 + i] * 20, 12) for i in range(3)]
    first, second, third = (engine.run(engine.submit(request)) for request in requests)
    found = [[], []]
    for _ in range(40):
        for tokens, updates in zip(found, (first, second), strict=True):
            if (update := next(updates, None)) is not None:
                tokens += update.token_ids
    next(third)
    third.close()
    assert engine.idle
    assert engine.pool.used == 0
    for tokens, request in zip(found, requests, strict=False):
        assert tokens == alone(model, tokenizer, request)[0].token_ids


def test_tokens_of_prefill_and_decode_are_counted_apart(model, tokenizer):
    engine = new_engine(model, tokenizer, max_tokens=16, speculate=3)
    sequence = engine.submit(make_request(0, [5, 6] * 17, 20))
    run_to_the_end(engine)
    assert len(sequence.answer.token_ids) == 20
    assert engine.counts.prefill.tokens == 34
    assert 19 <= engine.counts.decode.tokens <= 20  # the last one's step may keep a token more than it computes
    assert engine.counts.model_seconds == engine.counts.prefill.seconds + engine.counts.decode.seconds > 0


def test_a_bias_outside_the_vocabulary_is_refused_at_once(model, tokenizer):
    request = make_request(0, [5], 3)
    with pytest.raises(UserError, match="logit_bias names token 9999"):
        new_engine(model, tokenizer).submit(
            replace(request, sampling=replace(request.sampling, logit_bias={9999: 1.0}))
        )


@pytest.mark.parametrize(
    ("slots", "max_tokens", "context", "stride"), [(1, 48, 64, 64), (3, 200, 50, 20), (2, 30, 64, 9)]
)
def test_perplexity_does_not_depend_on_how_windows_are_computed(model, tokenizer, slots, max_tokens, context, stride):
    """Each counted token's loss is that of a window which is computed by itself."""
    from mpillama.engine.perplexity import Score, losses, text_perplexity, windows

    rng = np.random.default_rng(context)
    ids = rng.integers(5, models.TOY_VOCABULARY, 200).tolist()
    told = []
    engine = new_engine(model, tokenizer, slots=slots, max_tokens=max_tokens, longest=context)
    found = text_perplexity(engine, ids, models.BOS, context, stride, lambda: told.append(1))
    expected = Score()
    for start, first in windows(len(ids), context, stride):
        window = np.array([models.BOS, *ids[start + 1 : start + context]])
        logits = running.all_logits(model, [window], "f16")
        expected.add(losses(logits[first:-1], window[first + 1 :]))
    assert (found.tokens, found.nll, found.squares) == (expected.tokens, expected.nll, expected.squares)
    assert len(told) == len(list(windows(len(ids), context, stride)))
