"""Drafts by a model's own layer: what it predicts, whatever the engine does in between; answers are those without."""

import numpy as np
import pytest

from mpillama.engine.engine import Engine
from mpillama.engine.executor import Executor
from mpillama.engine.mtp import MtpExecutor
from mpillama.engine.sequence import Request
from mpillama.loading.model_file import open_model, open_mtp
from mpillama.loading.texts import make_tokenizer
from mpillama.models.cache import single_sequence_step
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer
from tests import mtp_models, running
from tests import tiny_models as models
from tests.conftest import THREADS
from tests.engine.test_draft_model import Always
from tests.system.mpi.launch import DEMO_MODEL

LONGEST, MAX_TOKENS, SLOTS, BLOCKS = 256, 24, 3, 5
DEMO_LAYER = DEMO_MODEL.with_name("demo-mtp.h5")


@pytest.fixture(scope="module", params=["glm4_moe", "qwen3_5_moe"])
def loaded(request, tmp_path_factory):
    """A model and its layer, which share nothing but the file."""
    folder = str(mtp_models.write_folder(tmp_path_factory.mktemp(request.param) / "model", request.param))
    model = running.load_file(open_model(folder, "f32"), THREADS)
    layer = running.load_file(open_mtp(folder, "f32"), THREADS)
    layer.main = model
    return model, layer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(models.toy_tokenizer(), bos_token_id=models.BOS, eos_token_ids=(models.EOS,), add_bos=True)


def new_engine(loaded, tokenizer, drafts, blocks=BLOCKS, longest=LONGEST):
    model, layer = loaded
    states = 3 * SLOTS * (1 + drafts) if model.config.has_state else 0
    executor = Executor(model, LONGEST, "f32", MAX_TOKENS, SLOTS, blocks, states)
    executor.draft = MtpExecutor(layer, longest, "f32", MAX_TOKENS + SLOTS, SLOTS, blocks) if drafts else None
    engine = Engine(executor, tokenizer, drafts)
    if drafts:
        engine.drafter.lengths = Always()
    return engine


def predicted(loaded, text: list[int], drafts: int) -> list[int]:
    """What the layer says of a text from its first token on, each guess from its own hidden state."""
    model, layer = loaded
    blocks = 4
    cache, own = running.new_cache(model, blocks, "f32"), running.new_cache(layer, blocks, "f32")
    table, last = np.arange(blocks), len(text) - 1
    ids = np.array(text)
    model.forward(single_sequence_step(ids[:-1], 0, table, 0), cache)
    layer.take(np.arange(last))
    found = [int(layer.forward(single_sequence_step(ids[1:], 0, table, 1), own)[0].argmax())]
    row = last - 1
    while len(found) < drafts:
        layer.take(np.array([-1 - row]))
        step = single_sequence_step(np.array(found[-1:]), last + len(found) - 1, table, 1)
        found.append(int(layer.forward(step, own)[0].argmax()))
        row = 0
    return found


def run(engine, requests, notes=None):
    """All requests at once, one more in every other step."""
    waiting, sequences = list(requests), []
    while waiting or not engine.idle:
        if waiting and (engine.counts.steps % 2 == 0 or engine.idle):
            sequences.append(engine.submit(waiting.pop(0)))
        if notes is not None:
            noted(engine, notes)
        engine.step()
    return [sequence.answer.token_ids for sequence in sequences]


def noted(engine, notes):
    """Remember the drafts of each text."""
    fill = type(engine.drafter).fill

    def filled(shares):
        fill(engine.drafter, shares)
        notes.update({tuple(s.sequence.tokens): list(s.drafts) for s in shares if s.drafts})

    engine.drafter.fill = filled


def requests_of(temperature):
    rng = np.random.default_rng(2)
    shared = rng.integers(5, 200, 70).tolist()
    return [
        Request(
            [*shared[: (0, 30, 70)[i % 3]], *rng.integers(5, 200, 3 + 7 * i).tolist()],
            SamplingParams(temperature=temperature, seed=i, max_tokens=50 + i, ignore_eos=True),
        )
        for i in range(7)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_without_drafts(loaded, tokenizer, temperature):
    """Chunks, prefixes from the cache, sequences pushed out; recurrent states in the model of Qwen."""
    plain = run(new_engine(loaded, tokenizer, 0), requests_of(temperature))
    engine = new_engine(loaded, tokenizer, 3)
    assert run(engine, requests_of(temperature)) == plain
    assert engine.scheduler.preemptions > 0
    assert engine.counts.cached_tokens > 0
    assert engine.drafter.proposed > 0


def test_drafts_are_what_the_layer_predicts(loaded, tokenizer):
    """Of texts without a shared beginning, whose last key in a block may be of another text."""
    notes: dict[tuple[int, ...], list[int]] = {}
    rng = np.random.default_rng(5)
    asked = [
        Request(rng.integers(5, 200, 9 + 20 * i).tolist(), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        for i in range(4)
    ]
    run(new_engine(loaded, tokenizer, 2, blocks=16), asked, notes)
    assert len(notes) > 15
    for text, drafts in notes.items():
        assert drafts == predicted(loaded, list(text), len(drafts)), text


def test_a_layer_with_a_shorter_context_drafts_up_to_there(loaded, tokenizer):
    """A layer of another file may have one; beyond it the layer's table has no blocks."""
    asked = [
        Request(list(range(5, 5 + length)), SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        for length in (50, 150)
    ]
    plain = run(new_engine(loaded, tokenizer, 0, blocks=16), asked)
    engine = new_engine(loaded, tokenizer, 3, blocks=16, longest=64)
    most, forward = [], engine.executor.draft.forward_in_pieces
    engine.executor.draft.forward_in_pieces = lambda segments: (
        most.extend(s.start + len(s.token_ids) for s in segments) or forward(segments)
    )
    assert run(engine, asked) == plain
    assert engine.drafter.proposed > 0
    assert max(most) <= 64


def test_a_step_that_reads_on_for_the_layer_has_less_room_for_prompts(loaded, tokenizer):
    """After a piece of a prompt the layer goes through it, at the beginning of the next step."""
    engine = new_engine(loaded, tokenizer, 2, blocks=16)
    engine.submit(Request(list(range(5, 105)), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)))
    found = []
    while not engine.idle:
        engine.step()
        found.append(engine.scheduler.followed)
    layer, model = (each.executor.model.weights.bytes_per_step() for each in (engine.drafter, engine))
    pieces = [0, *[MAX_TOKENS] * 4, 100 - 4 * MAX_TOKENS]
    assert found[: len(pieces)] == [piece * layer / model if piece > 3 else 0 for piece in pieces]
    assert not any(found[len(pieces) :])


@pytest.mark.parametrize("drafts", [1, 2])
def test_the_demos_layer_guesses_its_stories(drafts):
    """data/demo-mtp.h5: of the next tokens most are right, of those behind them many; nothing else changes."""
    model, layer = (running.load_file(open_model(str(path)), THREADS) for path in (DEMO_MODEL, DEMO_LAYER))
    layer.main = model
    words = make_tokenizer(open_model(str(DEMO_MODEL)))
    asked = [
        Request(words.encode(f"Once upon a time, there was a {hero}"), SamplingParams(temperature=0, max_tokens=90))
        for hero in ("llama", "small owl", "robot")
    ]
    plain = run(new_engine((model, layer), words, 0, blocks=16), asked)
    engine = new_engine((model, layer), words, drafts, blocks=16)
    assert run(engine, asked) == plain
    assert engine.drafter.acceptance >= (0.6 if drafts == 1 else 0.5)
    assert engine.counts.sampled_tokens > (1.6 if drafts == 1 else 2) * (engine.drafter.proposed / drafts)
