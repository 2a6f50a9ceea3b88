"""A model that the ranks of a world hold together: how commands and `LLM` load one, and what they ask."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast

from mpillama.engine.engine import Engine
from mpillama.engine.executor import Executor
from mpillama.errors import UserError
from mpillama.job.start import World
from mpillama.kernels.target import Target, prepare, requested_isa
from mpillama.loading.disk_cache import open_cache_folder
from mpillama.loading.draft import Draft, open_draft, refuse_unfit
from mpillama.loading.draft_ranks import place_draft
from mpillama.loading.load import LoadedModel, Progress, load_model
from mpillama.loading.settings import ModelSettings
from mpillama.loading.texts import make_chat_template, make_tokenizer
from mpillama.text.chat_template import ChatTemplate
from mpillama.text.tokenizer import Tokenizer

OpenExecutor = Callable[[LoadedModel], Executor]


@dataclass
class Session:
    """A loaded model. Rank 0 gives requests to `engine`, and ends; the others follow until then."""

    world: World
    target: Target
    loaded: LoadedModel
    executor: Executor
    engine: Engine
    """On rank 0 only."""
    hosts: list[str]
    """Of all ranks that share the model."""
    draft: Draft | None = None
    """The draft model, if there is one."""

    @property
    def is_root(self) -> bool:
        """Whether this is the rank that asks."""
        return self.world.comm.is_root

    @property
    def tokenizer(self) -> Tokenizer:
        """On rank 0 only."""
        return self.engine.tokenizer

    @property
    def path(self) -> str:
        return self.loaded.file.path

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's own template; UserError if it has none."""
        return make_chat_template(self.loaded.file, self.tokenizer)

    def failed(self, error: object) -> UserError:
        """The sentence for an answer that could not be computed."""
        return UserError(f"{self.path}: {error}")

    def forget_requests(self) -> None:
        """Begin anew with an engine without requests: a step was interrupted, so their state is unknown."""
        for sequence in [*self.engine.scheduler.running, *self.engine.scheduler.waiting]:
            sequence.error, sequence.answer.finish_reason = "it was interrupted.", "error"
        drafts, pace = self.engine.drafter.most if self.engine.drafter else 0, self.engine.pace
        self.engine = Engine(self.executor, self.tokenizer, drafts, pace.bound if pace else None)


def open_session(
    settings: ModelSettings, world: World, target: Target, open_: OpenExecutor,
    progress: Progress = lambda total: nullcontext(lambda state: None),
) -> Session:  # fmt: skip
    """Load a model on all ranks of the world; UserError on all of them if any cannot.

    `open_` makes the executor; `progress` shows how far the weights are read.
    """
    comm = world.comm
    draft = open_draft(settings, world)
    check = partial(refuse_unfit, draft=draft.file) if draft else None
    loaded = load_model(settings, world, target, progress, draft.needs if draft else None, check=check)
    executor = comm.together(lambda: open_(loaded))
    drafts, delay = getattr(settings, "draft_tokens", 0), getattr(settings, "max_token_delay", None)
    if draft:
        placed = place_draft(draft, world, target, executor, drafts, progress)
        draft, executor.draft = placed.draft, placed.executor
    build = lambda: comm.busy(lambda: make_tokenizer(loaded.file), "building the tokenizer")  # noqa: E731
    tokenizer = comm.on_root_only(build)
    open_cache_folder(settings, loaded, executor)  # last, since its thread keeps it
    engine = Engine(executor, tokenizer, drafts, delay) if tokenizer else None
    return Session(world, target, loaded, executor, cast(Engine, engine), sorted(set(comm.gather(world.host))), draft)


def choose_target(world: World) -> Target:
    """This rank's kernels and threads; UserError on all ranks if one cannot have what is asked for."""
    return world.comm.together(lambda: prepare(requested_isa(), world.threads, world.comm.yields))
