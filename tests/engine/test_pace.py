"""How much of a prompt a step takes beside answers: by what steps took, and never another answer."""

from dataclasses import replace

import numpy as np
import pytest

from mpillama.engine.pace import LEAST_TOKENS, Pace, StepLoad, fitted
from mpillama.text.tokenizer import Tokenizer
from tests import running
from tests import tiny_models as models
from tests.conftest import THREADS, ModelFile
from tests.engine.test_engine import alone, make_request, new_engine

COSTS = (0.02, 0.001, 0.002, 1e-6)


def took(load: StepLoad, slowness: float = 1.0) -> float:
    return slowness * sum(c * f for c, f in zip(COSTS, load.features, strict=True))


def taught(bound: float, slowness: float = 1.0) -> Pace:
    """What has seen a prompt alone, answers alone, and both."""
    pace = Pace(bound)
    for start in range(0, 2048, 256):
        load = StepLoad().with_prompt(256, start)
        pace.note(load, took(load, slowness))
    for answers in range(1, 20):
        for load in (StepLoad(answers, 0, 700 * answers), StepLoad(answers, 0, 90 * answers).with_prompt(40, 400)):
            pace.note(load, took(load, slowness))
    return pace


def test_costs_are_found() -> None:
    pace = taught(0.1)
    for load in (StepLoad(5, 0, 4000), StepLoad(8, 100, 50_000), StepLoad(0, 256, 256 * 3000)):
        assert pace.seconds(load) == pytest.approx(took(load), rel=0.03)


def test_no_cost_is_negative() -> None:
    steps = [(StepLoad(1, tokens, 10 * tokens), 1.0 / (1 + tokens)) for tokens in range(20)]
    assert min(fitted(steps)) == 0.0


@pytest.mark.parametrize("bound", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("start", [0, 5000, 50_000])
def test_as_much_as_fits_and_no_more(bound: float, start: int) -> None:
    pace, load = taught(bound), StepLoad(4, 0, 8000)
    tokens = pace.prompt_tokens(load, start, 4096)
    assert tokens % LEAST_TOKENS == 0
    if tokens > LEAST_TOKENS:
        assert took(load.with_prompt(tokens, start)) <= 1.03 * bound
    assert took(load.with_prompt(tokens + 2 * LEAST_TOKENS, start)) > 0.97 * bound


def test_prompts_get_on_whatever_the_bound_and_have_all_room_where_nobody_waits() -> None:
    pace = taught(0.001)
    assert pace.prompt_tokens(StepLoad(4, 0, 8000), 0, 256) == LEAST_TOKENS
    assert pace.prompt_tokens(StepLoad(4, 0, 8000), 0, 5) == 5
    assert pace.prompt_tokens(StepLoad(4, 16, 8000), 0, 256) == 0, "the oldest prompt has gone on"
    assert pace.prompt_tokens(StepLoad(0, 0, 0), 0, 256) == 256
    assert Pace(1.0).prompt_tokens(StepLoad(1, 0, 9), 0, 256) == LEAST_TOKENS, "nothing is known yet"


def test_a_machine_that_slows_down_gets_less() -> None:
    pace, load = taught(0.3), StepLoad(4, 0, 8000)
    before = pace.prompt_tokens(load, 0, 4096)
    slow = load.with_prompt(before, 0)
    pace.note(slow, took(slow, 2.0))
    assert pace.late == 1
    at_once = pace.prompt_tokens(load, 0, 4096)
    assert took(load.with_prompt(at_once, 0), 2.0) < 0.35
    for _ in range(60):
        step = load.with_prompt(pace.prompt_tokens(load, 0, 4096), 0)
        for each in (step, load):
            pace.note(each, took(each, 2.0))
    assert pace.late == 1
    assert took(load.with_prompt(pace.prompt_tokens(load, 0, 4096), 0), 2.0) > 0.2, "caution wears off"


@pytest.mark.parametrize("bound", [0.0, 0.004, 10.0])
def test_answers_do_not_depend_on_the_bound(bound: float, model_file: ModelFile) -> None:
    from mpillama.engine.engine import Engine

    model = running.load(model_file("toy", "q8_0"), THREADS)
    tokenizer = Tokenizer(models.toy_tokenizer(), bos_token_id=models.BOS, eos_token_ids=(models.EOS,), add_bos=True)
    engine = Engine(new_engine(model, tokenizer, blocks=16).executor, tokenizer, 2, bound)
    rng = np.random.default_rng(2)
    requests = [
        make_request(i, rng.integers(5, models.TOY_VOCABULARY, int(n)).tolist(), 30)
        for i, n in enumerate(rng.integers(1, 200, 12))
    ]
    for request in requests:
        engine.submit(request)
        engine.step()
        assert engine.scheduler.running[0].request.key <= request.key
    chunks = []
    while not engine.idle:
        before = engine.counts.computed_tokens
        engine.step()
        chunks.append(engine.counts.computed_tokens - before)
    for request in requests:
        assert request.on_logits.digest.hexdigest() == alone(model, tokenizer, request)[1]
    if not bound:
        assert engine.pace.late > 0
        assert max(chunks) <= LEAST_TOKENS + 3 * 4, "as little of prompts as can be"


def test_what_a_layer_reads_on_leaves_less_room() -> None:
    pace, load = taught(0.2), StepLoad(4, 0, 8000)
    free = pace.prompt_tokens(load, 0, 4096)
    left = pace.prompt_tokens(replace(load, followed=free / 2), 0, 4096)
    assert left == pytest.approx(free / 2, abs=LEAST_TOKENS)
    assert pace.prompt_tokens(replace(load, followed=10 * free), 0, 4096) == LEAST_TOKENS
