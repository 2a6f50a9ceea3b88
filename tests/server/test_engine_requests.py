"""Outputs of the server's requests: as an engine makes them, and again after another replica has failed."""

import pytest

from mpillama.engine.answer import Mark
from mpillama.engine.engine import Engine
from mpillama.engine.executor import Executor
from mpillama.replicas.runner import EngineRunner
from mpillama.server.engine_requests import Output, ServerAdapter, ServerRequest
from mpillama.text.constraint import Grammars, json_object_grammar
from mpillama.text.sampling_params import SamplingParams
from mpillama.text.tokenizer import Tokenizer
from tests import running
from tests import tiny_models as models
from tests.conftest import THREADS, ModelFile


@pytest.fixture(scope="module")
def runner(model_file: ModelFile) -> EngineRunner[ServerRequest, Output]:
    model = running.load(model_file("toy", "q8_0"), THREADS)
    tokenizer = Tokenizer(models.toy_tokenizer(), bos_token_id=models.BOS, eos_token_ids=(models.EOS,), add_bos=True)
    engine = Engine(Executor(model, 256, "f16", 48, 2, 8), tokenizer)
    return EngineRunner(engine, ServerAdapter(Grammars(tokenizer, models.TOY_VOCABULARY)))


def request(key: int, **fields) -> ServerRequest:
    params = SamplingParams(seed=key, max_tokens=9, ignore_eos=True, logprobs=2, prompt_logprobs=1, stop=("~~",))
    return ServerRequest([1, 7, 9], params, key=key, **fields)


def outputs(runner: EngineRunner[ServerRequest, Output], *requests: ServerRequest) -> list[Output]:
    """All outputs; the runner may wait for a grammar."""
    for one in requests:
        runner.submit(one)
    found, left = [], {one.key for one in requests}
    while left:
        found += runner.step()
        left -= {output.key for output in found if output.finished}
    return found


def test_outputs_say_where_in_the_answer_they_stand(runner):
    found = outputs(runner, request(1))
    tokens = text = 0
    for output in found:
        assert (output.first_token, output.first_character) == (tokens, text)
        assert len(output.logprobs) == len(output.token_ids)
        tokens, text = tokens + len(output.token_ids), text + len(output.text)
    assert (tokens, found[-1].finish_reason) == (9, "length")
    assert [len(output.prompt_logprobs) for output in found] == [2] + [0] * (len(found) - 1)


def test_a_request_that_begins_again_has_the_same_outputs(runner):
    assert outputs(runner, request(2, reuse_prefix=False)) == outputs(runner, request(2, reuse_prefix=False))


def test_of_outputs_that_come_again_only_the_rest_is_new(runner):
    found = outputs(runner, request(3))
    for before in range(len(found)):
        tokens = sum(len(output.token_ids) for output in found[:before])
        text = sum(len(output.text) for output in found[:before])
        again = [output.after(tokens, text) for output in found]
        assert [t for o in again for t in o.token_ids] == [t for o in found[before:] for t in o.token_ids]
        assert "".join(o.text for o in again) == "".join(o.text for o in found[before:])
        assert sum(len(o.logprobs) for o in again) == sum(len(o.logprobs) for o in found[before:])
        assert again[before:] == found[before:]


def test_within_an_output_the_marks_and_logprobs_are_cut_too():
    first, second = Mark(0, 7, 0, 0), Mark(2, 8, 4, 4)
    output = Output(1, [7, 3, 8], "a bc", marks=[first, second])
    assert output.after(0, 0) is output
    rest = output.after(2, 2)
    assert (list(rest.token_ids), rest.text, list(rest.marks)) == ([8], "bc", [second])
    later = Output(1, [8], "bc", marks=[second], first_token=2, first_character=2)
    assert later.after(2, 2) is later


def test_a_grammar_holds_and_a_wrong_one_is_refused(runner):
    found = outputs(runner, request(5, grammar=json_object_grammar()), request(6, grammar="start: %json {"))
    wrong = [output for output in found if output.key == 6]
    assert [(output.finish_reason, output.refused) for output in wrong] == [("error", True)]
    answer = "".join(output.text for output in found if output.key == 5)
    assert answer.lstrip().startswith("{")


def test_a_prompt_that_is_too_long_is_refused(runner):
    (output,) = outputs(runner, ServerRequest([5] * 300, SamplingParams(seed=1), key=7))
    assert (output.finish_reason, output.refused, "context" in output.error) == ("error", True, True)
