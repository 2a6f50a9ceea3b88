"""`LLM`: a model in a program of one's own, on all ranks of an MPI communicator or in a single process."""

import atexit
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, cast

import numpy as np

from mpillama.comm.launcher import check_start
from mpillama.comm.watchdog import PeerFailedError
from mpillama.engine.answer import TokenLogprob, noted, recorder
from mpillama.engine.engine import Engine
from mpillama.engine.perplexity import NOTHING, Losses, losses_of
from mpillama.engine.sequence import EngineSequence, Pooling, Request
from mpillama.errors import UserError
from mpillama.formats.checkpoint_model import refuse_headless
from mpillama.job.start import Intracomm, World, join
from mpillama.loading.load import open_shared_executor
from mpillama.loading.session import Session, choose_target, open_session
from mpillama.loading.settings import EngineSettings, check_numbers
from mpillama.text.sampler import derived_seed
from mpillama.text.sampling_params import SamplingParams, new_seed
from mpillama.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""A text, or its token ids."""
Messages = Sequence[Mapping[str, Any]]
"""A conversation: messages with `role` and `content`, as in OpenAI's API."""
DEFAULT_PARAMS = SamplingParams()


@dataclass(frozen=True)
class Completion:
    """An answer. `finish_reason` is "stop" (an end-of-text token or a stop string) or "length".

    `logprobs` (None unless asked for) has an entry for each of `token_ids`: the log-probability by the model itself,
    before temperature, penalties, bias and filters. `seed` repeats the answer.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    seed: int
    logprobs: list[TokenLogprob] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of the whole answer; None without `logprobs`."""
        return None if self.logprobs is None else sum(found.logprob for found in self.logprobs)


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its `n` answers; what is said of an answer directly is said of the first.

    `prompt_logprobs` (None unless asked for) has an entry for each token of the prompt but the first.
    `num_cached_tokens` of the prompt were known from earlier requests and not computed again.
    """

    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.outputs[0].logprobs

    @property
    def cumulative_logprob(self) -> float | None:
        return self.outputs[0].cumulative_logprob


@dataclass(frozen=True, eq=False)
class LLM(EngineSettings):
    """A model that all ranks of a communicator hold together; rank 0 asks, the others compute along.

    Every rank creates the object, which loads the model. Without a launcher there is one rank, and `with` may be left
    out. Else rank 0 must leave its `with` block (or call `close`); the others wait for that at the end of theirs:

        with LLM("model.gguf") as llm:  # comm=MPI.COMM_WORLD
            if llm.is_root:
                print(llm.generate("Hello", SamplingParams(max_tokens=64))[0].text)

    `model` is a path in any format that `--model` takes, `comm` any intracommunicator: MPI.COMM_WORLD, a part of it, or
    MPI.COMM_SELF for a model of this process alone. The other settings are the command line's, with its defaults;
    `max_seq_len` and `kv_type` are vLLM's max_model_len and kv_cache_dtype. Room for the caches of `sequences` requests
    at a time is reserved, and used once it is needed: give `cache_tokens` where several models share a host.

    Errors: UserError, a sentence for a person, on every rank if the model cannot be loaded, and on rank 0 for what
    cannot be asked. Whatever is raised on rank 0 reaches its caller, and no rank waits for ever: the others leave
    `with` when rank 0 does. Only if it struck in the midst of a step of several ranks (KeyboardInterrupt, say) the
    object can but be closed, and the others leave with a RuntimeError. A program that ends without closing its models
    closes them at its exit. What is raised on another rank or while loading,
    and a rank that hangs for `timeout` seconds in a step, end all processes by MPI_Abort, with a message on standard
    error, since the others could not go on.

    Nothing else of the process is changed: no signal handler, no excepthook, nothing printed but those last words;
    warnings go to `logging`. MPI is neither started nor finished here: mpi4py does both, and any thread level will do.
    Only the main thread may use the object. The others wait for rank 0 as long as it is busy with something else.
    """

    needs_head: ClassVar[bool] = False

    model: str | Path | None = field(default=None, kw_only=False)  # type: ignore[assignment]
    comm: Intracomm | None = field(default=None, kw_only=False)
    is_root: bool = field(default=False, init=False)
    """Whether this is the rank that asks."""
    _session: Session | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_start(self.threads, self.timeout)
        for each in fields(self):
            choices = each.metadata.get("choices")
            if choices and getattr(self, each.name) not in choices:
                raise UserError(f"{each.name} is {getattr(self, each.name)!r}: choose one of {', '.join(choices)}.")
        check_numbers(self)
        world = join(self.comm, self.threads, self.timeout)
        object.__setattr__(self, "is_root", world.comm.is_root)  # settings do not change, so this class is frozen
        with _aborting(world):
            try:
                self._hold(open_session(self, world, choose_target(world), partial(open_shared_executor, self)))
            except UserError:  # on all ranks
                world.free()
                raise
        _OPEN.add(self)

    def _hold(self, session: Session | None) -> None:
        object.__setattr__(self, "_session", session)

    # -- the ranks -----------------------------------------------------------------------------------------------------

    @property
    def _open(self) -> Session:
        if self._session is None:
            raise RuntimeError("this LLM is closed")
        return self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None and error is not None and not self.is_root:
            with _aborting(self._session.world, all_errors=True):
                raise error
        self.close()

    def close(self) -> None:
        """Give memory and threads back; on other ranks than 0, compute along until rank 0 calls this."""
        session = self._session
        if session is None:
            return
        _OPEN.discard(self)
        self._hold(None)
        try:
            self._end(session) if session.is_root else self._follow(session)
            if not session.executor.abandoned:
                if session.loaded.model.pipeline:
                    session.loaded.model.pipeline.free()
                if session.executor.draft:
                    session.executor.draft.comm.free_sums()
                session.world.free()
        finally:
            session.target.team.close()

    def _end(self, session: Session) -> None:
        """Let the other ranks go; if something is raised on the way, too."""
        if session.executor.abandoned:
            return
        if session.engine.in_step:
            _abandon(session)
            return
        try:
            session.engine.save_cache()
            session.executor.end(0)
        except BaseException:
            _abandon(session)
            raise

    def _follow(self, session: Session) -> None:
        try:
            with _aborting(session.world, PeerFailedError):
                session.executor.follow(patient=True)
        except PeerFailedError as error:
            session.executor.abandon()
            raise RuntimeError(f"{error} failed in the midst of a step") from None

    # -- rank 0 --------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """What runs the requests, for what this class has no method for; rank 0 only."""
        session = self._open
        if not session.is_root:
            raise RuntimeError("rank 0 alone asks: write `if llm.is_root:` before it")
        if session.executor.abandoned:
            raise RuntimeError("an earlier step was interrupted: close this LLM and load it again")
        return session.engine

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; rank 0 only."""
        return self.engine.tokenizer

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self._open.executor.max_seq_len

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] = DEFAULT_PARAMS,
    ) -> list[RequestOutput]:
        """Continue prompts, all of them at once; the outputs have their order.

        `sampling_params` are for all prompts, or a list has those of each. No answer depends on the others' company.
        """
        each = [prompts] if _is_one(prompts) else prompts
        ids = [self._prompt_ids(cast(Prompt, prompt)) for prompt in each]
        params = [sampling_params] * len(ids) if isinstance(sampling_params, SamplingParams) else sampling_params
        if len(params) != len(ids):
            raise ValueError(f"{len(ids)} prompts have {len(params)} sampling_params")
        return self._outputs([(one, p) for one, p in zip(ids, params, strict=True)], continues=True)

    def chat(
        self, messages: Messages, sampling_params: SamplingParams = DEFAULT_PARAMS, **template_variables: Any
    ) -> RequestOutput:
        """The next message of a conversation, by the model's chat template; UserError if it has none.

        `template_variables` are the template's own, such as `tools` or `enable_thinking`.
        """
        ids = self._chat_ids(messages, template_variables)
        return self._outputs([(ids, sampling_params)], continues=False)[0]

    def stream(self, prompt: Prompt | Messages, sampling_params: SamplingParams = DEFAULT_PARAMS) -> Iterator[str]:
        """The text of an answer as it comes; messages are a conversation, as for `chat`.

        Several streams may take turns. One that is left early (`break`) is cancelled.
        """
        if sampling_params.n != 1:
            raise UserError(f"n is {sampling_params.n}: a stream has one answer.")
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        ids = self._chat_ids(cast(Messages, prompt), {}) if is_chat else self._prompt_ids(cast(Prompt, prompt))
        (sequence,) = self._submit([self._request(ids, sampling_params, 0, not is_chat)])
        return self._pieces(sequence)

    def _pieces(self, sequence: EngineSequence) -> Iterator[str]:
        updates = self.engine.run(sequence)
        while True:
            with self._stepping():
                update = next(updates, None)
            if update is None:
                return self._check(sequence)
            if update.text:
                yield update.text

    def embed(self, texts: Prompt | Sequence[Prompt], pooling: Pooling = "mean") -> np.ndarray:
        """Embeddings of length 1, float64 [texts, hidden_size]: the mean of all positions' last hidden states, or the
        last position's.
        """
        each = [texts] if _is_one(texts) else texts
        ids = [self._prompt_ids(cast(Prompt, text)) for text in each]
        sequences = self._run([Request(one, NOTHING, pooling=pooling) for one in ids])
        vectors = [sequence.pooled for sequence in sequences]
        return np.array(vectors, np.float64).reshape(len(ids), self._open.loaded.file.config.hidden_size)

    def score(self, text: Prompt) -> np.ndarray:
        """The log-probability of each token but the first, given those before it: float64 [tokens - 1], in nats.

        A text begins with BOS if the model wants one, so that all of its own tokens have one.
        """
        self._check_head()
        (sequence,) = self._run([Request(self._prompt_ids(text), NOTHING, on_prompt_logits=Losses())])
        return -losses_of(sequence)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return self.get_tokenizer().encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]

    def _chat_ids(self, messages: Messages, variables: Mapping[str, Any]) -> list[int]:
        rendered = self._open.chat_template.render_marked([dict(message) for message in messages], **variables)
        return self.get_tokenizer().encode_marked(rendered)

    def _check_head(self) -> None:
        file = self._open.loaded.file
        refuse_headless(file.path, file.config.lm_head)

    def _outputs(self, prompts: list[tuple[list[int], SamplingParams]], continues: bool) -> list[RequestOutput]:
        self._check_head()
        requests = [self._request(ids, params, i, continues) for ids, params in prompts for i in range(params.n)]
        outputs, rest = [], iter(self._run(requests))
        for ids, params in prompts:
            first, *others = [next(rest) for _ in range(params.n)]
            completions = [_completion(sequence) for sequence in (first, *others)]
            of_prompt = noted(first.request.on_prompt_logits)
            outputs.append(RequestOutput(ids, completions, of_prompt, first.cached_tokens or 0))
        return outputs

    def _request(self, ids: list[int], params: SamplingParams, number: int, continues: bool) -> Request:
        """The `number`-th answer of a prompt has a seed of its own; the first one tells of the prompt."""
        seed = new_seed() if params.seed is None else params.seed
        if number:
            params, seed = replace(params, prompt_logprobs=None), derived_seed(seed, str(number))
        return Request(
            ids, replace(params, seed=seed), on_logits=recorder(params.logprobs),
            on_prompt_logits=recorder(params.prompt_logprobs), continues=continues,
        )  # fmt: skip

    def _submit(self, requests: Sequence[Request]) -> list[EngineSequence]:
        """Queue all requests, or none if one is refused."""
        engine = self.engine
        for request in requests:
            engine.check(request)
        return [engine.submit(request) for request in requests]

    def _run(self, requests: Sequence[Request]) -> list[EngineSequence]:
        """Run requests until all have ended; UserError if one failed."""
        sequences = self._submit(requests)
        engine, left = self.engine, list(sequences)
        try:
            while left:
                if left[-1].finished:
                    left.pop()
                else:
                    with self._stepping():
                        engine.step()
            with self._stepping():
                engine.settle()
        finally:
            for sequence in left:
                if not self._open.executor.abandoned:
                    engine.cancel(sequence)
        for sequence in sequences:
            self._check(sequence)
        return sequences

    def _check(self, sequence: EngineSequence) -> None:
        if sequence.error is not None:
            raise self._open.failed(sequence.error)

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """A step, which all ranks take together: if it fails here, the others must not wait for its rest."""
        session = self._open
        try:
            yield
        except BaseException:
            if session.world.comm.size == 1:
                session.forget_requests()
            else:
                _abandon(session)
            raise


_OPEN: "weakref.WeakSet[LLM]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Where a script ended without closing its models, no rank must wait for one that is gone."""
    for llm in list(_OPEN):
        llm.close()


def _completion(sequence: EngineSequence) -> Completion:
    """The answer of a sequence that has ended."""
    answer, request = sequence.answer, sequence.request
    assert answer.finish_reason is not None
    assert request.sampling.seed is not None
    found = noted(request.on_logits)
    return Completion(answer.text, answer.token_ids, answer.finish_reason, request.sampling.seed, found)


def _abandon(session: Session) -> None:
    """Tell the other ranks that a step will not be finished."""
    session.world.comm.watch.tell_gone()
    session.executor.abandon()


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is a text or a list of token ids."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))


@contextmanager
def _aborting(world: World, *harmless: type[BaseException], all_errors: bool = False) -> Iterator[None]:
    """End all processes if something is raised that the other ranks do not know of: they would wait for ever."""
    aborter = world.comm.watch.aborter
    try:
        yield
    except BaseException as error:
        known = isinstance(error, (UserError, *harmless)) and not all_errors
        if known or world.comm.size == 1 or aborter is None:
            raise
        aborter.on_exception(type(error), error, error.__traceback__)
