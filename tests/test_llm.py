"""`LLM` as a user's program uses it: on any ranks, beside others, and when something goes wrong."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpillama
from mpillama import LLM, SamplingParams, UserError
from mpillama.comm.communicator import Communicator
from mpillama.loading import session
from mpillama.text.sampler import derived_seed
from tests import golden_models
from tests.conftest import ModelFile
from tests.system.mpi.launch import DEMO_MODEL, END_SECONDS, PROGRAM, ROOT, TIMEOUT, Result, run, started

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

PROMPTS = ["a llama", "Once upon a time there"]
PARAMS = {"max_tokens": 20, "seed": 5, "temperature": 1.2, "logit_bias": {1: -1000.0}}
OPTIONS = ("--max-tokens", "20", "--seed", "5", "--temperature", "1.2", "--logit-bias", "1=-1000", "--json")
WINDOW = 48

HEAD = f"""\
import hashlib, json, sys
from mpi4py import MPI
from mpillama import LLM, SamplingParams, UserError
world, model, demo = MPI.COMM_WORLD, sys.argv[1], {str(DEMO_MODEL)!r}
params = SamplingParams(**{PARAMS!r})
def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
"""
EVERYTHING = f"""
from mpillama.engine.sequence import Request
prompts = {PROMPTS!r}
class Digest:
    def __init__(self):
        self.sha = hashlib.sha256()
    def __call__(self, logits, token):
        self.sha.update(logits.astype("<f4").tobytes())
with LLM(model, comm=world, threads=1, speculate=2) as llm:
    if llm.is_root:
        outputs = llm.generate(prompts, params)
        digest = Digest()
        ids = llm.get_tokenizer().encode(prompts[0])
        for _ in llm.engine.run(llm.engine.submit(Request(ids, params, on_logits=digest))):
            pass
        tokens = [int(part) for part in sys.argv[2].split(",")]
        say(json.dumps({{
            "token_ids": [output.token_ids for output in outputs],
            "text": [output.text for output in outputs],
            "streamed": ["".join(llm.stream(prompt, params)) for prompt in prompts],
            "chat": llm.chat([{{"role": "user", "content": prompts[0]}}], params).token_ids,
            "digest": digest.sha.hexdigest(),
            "score": [float(x).hex() for x in llm.score(tokens)],
            "embeddings": [[float(x).hex() for x in row] for row in llm.embed(prompts)],
        }}))
"""


def program(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "program.py"
    path.write_text(HEAD + source)
    return path


def run_program(ranks: int | None, tmp_path: Path, source: str, *arguments: str | Path) -> Result:
    return run(ranks, program(tmp_path, source), *arguments, env={"PYTHONPATH": str(ROOT)})


def command(*arguments: str | Path) -> dict[str, Any]:
    result = run(None, *PROGRAM, *arguments)
    assert result.status == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def toy(model_file: ModelFile) -> Path:
    return model_file("toy", "q8_0")


@pytest.fixture(scope="module")
def answers(toy: Path) -> list[dict[str, Any]]:
    """What the command says to the prompts, and to the first of them as a message."""
    ways = [("--prompt", PROMPTS[0]), ("--prompt", PROMPTS[1]), ("--prompt", PROMPTS[0], "--chat")]
    return [command("--model", toy, *OPTIONS, *way) for way in ways]


@pytest.fixture(scope="module")
def perplexity(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int], float]:
    """A window's tokens, and their mean loss as `perplexity` says it."""
    with LLM(toy, comm=Communicator.alone().mpi, threads=1) as llm:
        tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("A llama of the third rank counted its tokens. " * 20, add_bos=False)[:WINDOW]
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(tokenizer.decode(ids))
    assert tokenizer.encode(text.read_text(), add_bos=False) == ids
    assert tokenizer.adds_bos
    found = command("perplexity", "--model", toy, "--file", text, "--context", str(WINDOW), "--json")
    assert found["windows"] == 1
    return [tokenizer.bos_token_id, *ids[1:]], found["nll"]


@pytest.mark.parametrize("ranks", [None, 1, 2, 3])
def test_everything_is_what_the_commands_say(
    ranks: int | None, toy: Path, answers: list[dict[str, Any]], perplexity: tuple[list[int], float], tmp_path: Path
) -> None:
    window, loss = perplexity
    result = run_program(ranks, tmp_path, EVERYTHING, toy, ",".join(map(str, window)))
    assert (result.status, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["token_ids"] == [answer["token_ids"] for answer in answers[:2]]
    assert found["text"] == found["streamed"] == [answer["text"] for answer in answers[:2]]
    assert found["digest"] == answers[0]["logits_sha256"]
    assert found["chat"] == answers[2]["token_ids"]
    scores = np.array([float.fromhex(x) for x in found["score"]])
    assert len(scores) == WINDOW - 1
    assert -scores[WINDOW // 2 :].mean() == pytest.approx(loss, rel=1e-14)
    with LLM(toy, comm=Communicator.alone().mpi, threads=2) as llm:
        assert found["embeddings"] == [[float(x).hex() for x in row] for row in llm.embed(PROMPTS)]


def test_two_parts_of_the_world_hold_different_models(toy: Path, answers: list[dict[str, Any]], tmp_path: Path) -> None:
    source = """
part = world.Split(world.rank < 2, -world.rank)
with LLM(model if world.rank < 2 else demo, comm=part, threads=1) as llm:
    assert llm.is_root == (world.rank in (1, 2))
    if llm.is_root:
        say(world.rank, json.dumps(llm.generate("a llama", params)[0].token_ids))
"""
    result = run_program(3, tmp_path, source, toy)
    assert (result.status, result.stderr) == (0, "")
    found = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    theirs = command("--model", DEMO_MODEL, *OPTIONS, "--prompt", PROMPTS[0])
    assert {rank: json.loads(ids) for rank, ids in found.items()} == {
        "1": answers[0]["token_ids"],
        "2": theirs["token_ids"],
    }


def test_each_rank_has_a_model_of_its_own(toy: Path, answers: list[dict[str, Any]], tmp_path: Path) -> None:
    source = """
llm = LLM(model, comm=MPI.COMM_SELF)
text = llm.generate("a llama", params)[0].text
found = world.gather((llm.is_root, text))
llm.close()
if world.rank == 0:
    say(json.dumps(found))
"""
    result = run_program(2, tmp_path, source, toy)
    assert (result.status, result.stderr) == (0, "")
    assert json.loads(result.stdout) == [[True, answers[0]["text"]]] * 2


@pytest.mark.parametrize("ranks", [None, 2])
def test_models_one_after_another_leave_the_program_as_it_was(
    ranks: int | None, toy: Path, answers: list[dict[str, Any]], tmp_path: Path
) -> None:
    source = """
import faulthandler, signal, threading
state = lambda: (
    [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.excepthook, threading.excepthook,
    faulthandler.is_enabled(), signal.set_wakeup_fd(-1), threading.active_count(),
)
before = state()
for path in (model, demo, model):
    with LLM(path, threads=2) as llm:
        if llm.is_root:
            text = llm.generate("a llama", params)[0].text
    assert state() == before, state()
assert MPI.Is_initialized() and not MPI.Is_finalized()
total = world.allreduce(1)
if world.rank == 0:
    say(json.dumps([total, text]))
"""
    result = run_program(ranks, tmp_path, source, toy)
    assert (result.status, result.stderr) == (0, "")
    assert json.loads(result.stdout) == [ranks or 1, answers[0]["text"]]


@pytest.mark.parametrize("ranks", [None, 3])
def test_a_wrong_path_is_told_on_every_rank(ranks: int | None, toy: Path, tmp_path: Path) -> None:
    source = """
try:
    LLM("nowhere.h5")
except UserError as error:
    found = world.gather(str(error))
with LLM(model, threads=1) as llm:
    if llm.is_root:
        llm.generate("a", SamplingParams(max_tokens=1))
        say(json.dumps(found))
"""
    result = run_program(ranks, tmp_path, source, toy)
    assert (result.status, result.stderr) == (0, "")
    (sentence,) = set(json.loads(result.stdout))
    assert "nowhere.h5" in sentence


@pytest.mark.parametrize("kind", ["ValueError", "UserError", "SystemExit"])
@pytest.mark.parametrize("ranks", [None, 3])
def test_what_is_raised_in_the_block_reaches_the_caller(
    ranks: int | None, kind: str, toy: Path, tmp_path: Path
) -> None:
    """And the other ranks go on behind their block."""
    source = f"""
error = None
try:
    with LLM(model, threads=1) as llm:
        if llm.is_root:
            next(llm.stream("a llama", params))
            raise {kind}("mine")
except {kind} as caught:
    error = str(caught)
found = world.gather(error)
if world.rank == 0:
    say(json.dumps(found))
"""
    result = run_program(ranks, tmp_path, source, toy)
    assert (result.status, result.stderr) == (0, "")
    assert json.loads(result.stdout) == ["mine", *[None] * ((ranks or 1) - 1)]


DEATHS = {
    "ValueError: mine": "raise ValueError('mine')",
    "leaving": "sys.exit('leaving')",
    "KeyboardInterrupt": "os.kill(os.getpid(), signal.SIGINT)",
    "SystemExit(3)": "sys.exit(3)",
}


@pytest.mark.parametrize(
    ("said", "place"),
    [*((said, "in its block") for said in DEATHS), ("KeyboardInterrupt", "in a step"), ("leaving", "without a block")],
)
def test_a_root_that_dies_leaves_no_rank_waiting(said: str, place: str, toy: Path, tmp_path: Path) -> None:
    """And the others say nothing, unless a step of all ranks was interrupted."""
    source = f"""
import os, signal
def die(*rows):
    {DEATHS[said]}
def lead(llm):
    if llm.is_root:
        next(llm.stream("a llama", params))
        if sys.argv[2] != "in a step":
            die()
        llm.engine.executor.model.logits = die
        for _ in llm.engine.run(llm.engine.submit(Request(5 * [7], params))):
            pass
from mpillama.engine.sequence import Request
llm = LLM(model, threads=1)
if sys.argv[2] == "without a block":
    lead(llm)
else:
    with llm:
        lead(llm)
"""
    result = run_program(3, tmp_path, source, toy, place)
    assert result.status != 0
    if "SystemExit" not in said:
        assert result.stderr.count(said) == 1
    assert ("RuntimeError" in result.stderr) == (place == "in a step")


def test_a_step_that_fails_on_rank_0_lets_the_others_go(toy: Path, tmp_path: Path) -> None:
    source = """
error = None
try:
    with LLM(model, threads=1) as llm:
        if llm.is_root:
            step = llm.engine.executor.model.logits
            def interrupt(*rows):
                raise KeyboardInterrupt
            llm.engine.executor.model.logits = interrupt
            try:
                llm.generate("a llama", params)
            except KeyboardInterrupt:
                say("interrupted")
            llm.generate("a llama", params)
except RuntimeError as caught:
    error = str(caught)
say(world.rank, error)
"""
    result = run_program(3, tmp_path, source, toy)
    assert (result.status, result.stderr) == (0, "")
    lines = sorted(result.stdout.splitlines())
    assert lines[0].startswith("0 an earlier step was interrupted")
    assert [line[:1] for line in lines] == ["0", "1", "2", "i"]
    assert all("failed in the midst of a step" in line for line in lines[1:3])


def test_what_is_given_up_keeps_no_thread(toy: Path, tmp_path: Path) -> None:
    """Neither the one that brings sums of other hosts, which never come, nor the one that writes the cache."""
    source = """
import gc, threading, weakref
llm = LLM(model, threads=1, cache_dir=sys.argv[2])
cache = weakref.ref(llm._session.executor.cache)
threads = {thread.name for thread in threading.enumerate()}
def interrupt(*arguments):
    threads.update(thread.name for thread in threading.enumerate())
    raise KeyboardInterrupt
if llm.is_root:
    llm._session.loaded.model.comm.finish_all_reduce = interrupt
try:
    with llm:
        if llm.is_root:
            llm.generate([list(range(5, 25))], params)
except (KeyboardInterrupt, RuntimeError):
    pass
left = [thread for thread in threading.enumerate() if thread.name in ("cache writer", "sums between hosts")]
for thread in left:
    thread.join(10)
left = [thread.name for thread in left if thread.is_alive()]
del llm
gc.collect()
say(world.rank, "cache writer" in threads, "sums between hosts" in threads or world.rank > 0, left, cache())
"""
    overlapping = {"PYTHONPATH": str(ROOT), "MPILLAMA_RANKS_PER_HOST": "1", "MPILLAMA_OVERLAP": "always"}
    result = run(2, program(tmp_path, source), toy, tmp_path / "cache", env=overlapping)
    assert (result.status, result.stderr) == (0, "")
    assert sorted(result.stdout.splitlines()) == [f"{rank} True True [] None" for rank in range(2)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_cache_that_cannot_be_saved_lets_all_ranks_go(ranks: int, toy: Path, tmp_path: Path) -> None:
    source = """
import threading
def fail(waits=True):
    raise OSError("no such disk")
llm, error = LLM(model, threads=1, cache_dir=sys.argv[2]), ""
if llm.is_root:
    llm.engine.save_cache = fail
try:
    with llm:
        if llm.is_root:
            llm.generate("a llama", params)
except (OSError, RuntimeError) as caught:
    error = type(caught).__name__
left = [thread for thread in threading.enumerate() if thread.name == "cache writer"]
for thread in left:
    thread.join(10)
say(world.rank, error, any(thread.is_alive() for thread in left))
"""
    result = run_program(ranks, tmp_path, source, toy, tmp_path / "cache")
    assert (result.status, result.stderr) == (0, "")
    assert sorted(result.stdout.splitlines()) == ["0 OSError False", "1 RuntimeError False"][:ranks]


def test_a_model_that_cannot_be_opened_leaves_no_thread(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object) -> None:
        raise UserError("no tokenizer")

    monkeypatch.setattr(session, "make_tokenizer", refuse)
    with pytest.raises(UserError, match="no tokenizer"):
        LLM(toy, comm=Communicator.alone().mpi, cache_dir=str(tmp_path / "cache"))
    assert "cache writer" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("place", ["in its block", "in a step"])
def test_an_error_on_another_rank_ends_the_job(place: str, toy: Path, tmp_path: Path) -> None:
    source = """
with LLM(model, threads=1) as llm:
    if llm.is_root:
        while True:
            llm.generate("a llama", params)
    if world.rank == 2:
        say("now")
        if sys.argv[2] == "in its block":
            raise ValueError("mine")
        def fail(*arguments):
            raise ValueError("mine")
        llm._session.loaded.model.advance = fail
"""
    with started(3, program(tmp_path, source), toy, place, env={"PYTHONPATH": str(ROOT)}) as launch:
        assert launch.read(3) == b"now"
        assert launch.gone_within(END_SECONDS + 2)
        assert "rank 2 of 3" in launch.stderr()
        assert "ValueError: mine" in launch.stderr()
        assert launch.process.returncode != 0


def test_rank_0_may_be_busy_for_longer_than_the_time_limit(toy: Path, tmp_path: Path) -> None:
    source = """
import time
with LLM(model, threads=1, timeout=1) as llm:
    if llm.is_root:
        pieces = llm.stream("a llama", params)
        next(pieces)
        time.sleep(8)
        say(len(list(pieces)) > 0)
"""
    result = run_program(2, tmp_path, source, toy)
    assert (result.status, result.stdout, result.stderr) == (0, "True\n", "")


# -- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(toy: Path) -> Iterator[LLM]:
    with LLM(toy, comm=Communicator.alone().mpi, threads=2, max_seq_len=200, sequences=4) as loaded:
        yield loaded
        assert loaded.engine.idle
        assert loaded.engine.pool.used == 0


def test_prompts_may_be_texts_or_tokens_and_have_params_of_their_own(llm: LLM) -> None:
    params = SamplingParams(**PARAMS)
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    (one,) = llm.generate(PROMPTS[0], params)
    (same,) = llm.generate(ids, params)
    short, again = llm.generate([ids, PROMPTS[0]], [SamplingParams(max_tokens=2, temperature=0), params])
    assert one.token_ids == same.token_ids == again.token_ids
    assert one.prompt_token_ids == same.prompt_token_ids == ids
    assert (len(short.token_ids), short.finish_reason) == (2, "length")
    assert llm.generate([]) == []
    with pytest.raises(ValueError, match="2 prompts have 1"):
        llm.generate(PROMPTS, [params])


def test_several_answers_have_seeds_of_their_own(llm: LLM) -> None:
    (found,) = llm.generate(PROMPTS[0], SamplingParams(**PARAMS, n=3))
    assert [one.seed for one in found.outputs] == [5, derived_seed(5, "1"), derived_seed(5, "2")]
    for one in found.outputs:
        (alone,) = llm.generate(PROMPTS[0], SamplingParams(**{**PARAMS, "seed": one.seed}))
        assert (alone.text, alone.token_ids) == (one.text, one.token_ids)
    assert len({one.text for one in found.outputs}) == 3


def test_log_probabilities_are_those_of_a_score(llm: LLM) -> None:
    (found,) = llm.generate(PROMPTS[0], SamplingParams(**PARAMS, logprobs=2, prompt_logprobs=0))
    assert found.logprobs is not None
    assert found.prompt_logprobs is not None
    noted = [*found.prompt_logprobs, *found.logprobs]
    ids = [*found.prompt_token_ids, *found.token_ids]
    assert [one.token for one in noted] == ids[1:]
    np.testing.assert_allclose(llm.score(ids), [one.logprob for one in noted], rtol=1e-12)
    assert found.cumulative_logprob == pytest.approx(sum(one.logprob for one in found.logprobs))
    assert {len(one.top) for one in found.logprobs} == {2}
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))[0].cumulative_logprob is None


def test_a_stop_string_ends_an_answer(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], SamplingParams(**PARAMS))
    stop = whole.text[6:8]
    (cut,) = llm.generate(PROMPTS[0], SamplingParams(**PARAMS, stop=stop))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_streams_take_turns_and_end_when_they_are_left(llm: LLM) -> None:
    params = SamplingParams(**PARAMS)
    wanted = [output.text for output in llm.generate(PROMPTS, params)]
    streams = [llm.stream(prompt, params) for prompt in PROMPTS]
    texts = ["", ""]
    for _ in range(30):
        texts = [text + next(stream, "") for text, stream in zip(texts, streams, strict=True)]
        assert llm.generate(PROMPTS[0], params)[0].text == wanted[0]
    assert texts == wanted
    for _ in llm.stream(PROMPTS[0], params):
        break
    assert llm.engine.idle


def test_messages_are_streamed_as_a_chat(llm: LLM) -> None:
    messages, params = [{"role": "user", "content": "hello"}], SamplingParams(**PARAMS)
    assert "".join(llm.stream(messages, params)) == llm.chat(messages, params).text
    assert llm.chat(messages, params).num_cached_tokens == 0  # not yet a block


def test_a_conversation_is_not_computed_again(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello " * 30}]
    first = llm.chat(messages, SamplingParams(max_tokens=10))
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and?"}]
    assert llm.chat(messages, SamplingParams(max_tokens=1)).num_cached_tokens >= 64


def test_embeddings_have_length_1(llm: LLM) -> None:
    vectors, last = llm.embed([*PROMPTS, "a llama"]), llm.embed(PROMPTS, "last")
    assert vectors.shape == (3, 96)
    assert vectors.dtype == np.float64
    np.testing.assert_allclose((vectors**2).sum(axis=1), 1)
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[:2], last)
    assert np.array_equal(llm.embed(PROMPTS[0])[0], vectors[0])


def test_what_cannot_be_asked_is_refused_and_nothing_runs(llm: LLM) -> None:
    for prompts, params, sentence in [
        ([PROMPTS[0], [5] * 300], SamplingParams(), "the context holds 200"),
        ([[9999]], SamplingParams(), "9999"),
        (["a"], SamplingParams(logit_bias={9999: 1.0}), "logit_bias"),
        ([[]], SamplingParams(), "empty"),
    ]:
        with pytest.raises(UserError, match=sentence):
            llm.generate(prompts, params)
        assert llm.engine.idle
    with pytest.raises(UserError, match="stream has one answer"):
        llm.stream("a", SamplingParams(n=2))
    with pytest.raises(UserError, match="temperature"):
        SamplingParams(temperature=-1)


def test_an_interrupted_step_of_one_rank_is_forgotten(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(**PARAMS)
    before = llm.generate(PROMPTS, params)
    running = llm.stream(PROMPTS[1], params)
    next(running)

    def interrupt(*rows: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.executor.model, "logits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[0], params)
    with pytest.raises(UserError, match="interrupted"):
        list(running)
    assert [one.text for one in llm.generate(PROMPTS, params)] == [one.text for one in before]


def test_logits_that_are_no_numbers_are_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = llm.engine.executor
    nothing = np.full((1, executor.model.config.vocab_size), np.nan, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(executor.model, "logits", lambda rows: nothing)
        with pytest.raises(UserError, match=r"toy-q8_0\.h5: .*NaN"):
            llm.generate(PROMPTS[0])
    assert llm.engine.idle


def test_a_model_of_embeddings_only_embeds(tmp_path: Path) -> None:
    with LLM(golden_models.headless(tmp_path / "bare"), comm=Communicator.alone().mpi) as bare:
        assert bare.embed([[5, 6, 7]]).shape[0] == 1
        for ask in (bare.generate, bare.score):
            with pytest.raises(UserError, match="lm_head"):
                ask([5, 6, 7])


def test_a_closed_model_says_so(toy: Path) -> None:
    closed = LLM(toy, comm=Communicator.alone().mpi, max_seq_len=64)
    assert closed.context_length == 64
    closed.close()
    closed.close()
    assert closed.is_root
    with pytest.raises(RuntimeError, match="closed"):
        closed.generate("a")


def test_settings_out_of_range_are_refused(toy: Path) -> None:
    for settings, sentence in [({"sequences": 0}, "sequences"), ({"threads": 0}, "threads"), ({"kv_type": "f8"}, "f8")]:
        with pytest.raises(UserError, match=sentence):
            LLM(toy, **settings)  # type: ignore[arg-type]


def test_the_package_is_typed_and_light() -> None:
    """MPI comes with LLM, not before."""
    assert (Path(mpillama.__file__).parent / "py.typed").exists()
    script = "import sys, mpillama; print('mpi4py' in sys.modules, 'numpy' in sys.modules); mpillama.LLM"
    result = run(None, "-c", script, env={"PYTHONPATH": str(ROOT)})
    assert (result.status, result.stdout, result.stderr) == (0, "False False\n", "")
    with pytest.raises(AttributeError, match="LMM"):
        mpillama.LMM  # noqa: B018
