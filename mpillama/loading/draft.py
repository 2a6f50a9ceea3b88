"""A draft model beside the model that it drafts for: all ranks divide it, or rank 0 has it alone."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import ClassVar, cast

from mpillama.engine.executor import Executor
from mpillama.engine.mtp import MtpExecutor
from mpillama.errors import UserError
from mpillama.formats.checkpoint_model import refuse_headless
from mpillama.job.start import World
from mpillama.kernels.target import Target
from mpillama.loading.load import load_model
from mpillama.loading.memory import MemoryModel
from mpillama.loading.model_file import ModelFile, model_path, open_model, open_mtp
from mpillama.loading.preflight import Needs, rank_needs
from mpillama.loading.progress import LoadState
from mpillama.loading.settings import ModelSettings, SpeculationSettings, refuse_staged_mtp
from mpillama.loading.texts import make_tokenizer
from mpillama.models.cache import STATES_OF_DRAFTS
from mpillama.models.mtp import MtpDecoder
from mpillama.models.partition import Division

Progress = Callable[[int], AbstractContextManager[Callable[[LoadState], None]]]
PADDING = re.compile(r"\[PAD\d+\]")
"""What llama.cpp's converter calls rows of a table that stand for no token."""


@dataclass(frozen=True, kw_only=True)
class DraftSettings(ModelSettings):
    """How a draft model is loaded: as the model, but as it is stored, and divided evenly."""

    warns: ClassVar[bool] = False

    sequences: int = 1

    @property
    def state_slots(self) -> int:
        return STATES_OF_DRAFTS * self.sequences


@dataclass(frozen=True)
class Draft:
    """A draft model that is opened; `needs` is what it takes on this rank.

    Rank 0 has it `alone`, or all divide it; which of both may be open until a trial (loading/draft_ranks.py).
    """

    file: ModelFile
    settings: DraftSettings
    alone: bool
    chosen_by_trial: bool
    needs: Needs


def open_draft(settings: ModelSettings, world: World) -> Draft | None:
    """Read the draft model's table; None if there is none. UserError on all ranks if it cannot be used."""
    file = open_draft_file(settings, world)
    if file is None:
        return None
    draft = draft_settings(settings)
    given = cast(SpeculationSettings, settings)
    needs = needs_of_draft(file, settings, world, world.comm.size)
    return Draft(file, draft, given.drafts_on_first, given.draft_ranks == "auto", needs)


def open_draft_file(settings: ModelSettings, world: World) -> ModelFile | None:
    """The table of --draft-model, if there is one; UserError on all ranks for one that cannot guess tokens."""
    if isinstance(settings, SpeculationSettings):
        _ = settings.drafts_on_first
    path, own = getattr(settings, "draft_model", None), getattr(settings, "mtp", False)
    if path is None and not own:
        return None
    if path is not None and own:
        raise UserError("--draft-model and --mtp exclude each other: give one of them.")
    if getattr(settings, "draft_tokens", 0) == 0:
        raise UserError(
            f"{'--mtp' if own else '--draft-model'} guesses no token with --speculate 0: give a larger number, or "
            "leave it out."
        )

    def opened() -> ModelFile:
        return open_mtp(model_path(settings.model), settings.weights) if path is None else open_model(path)

    file = world.comm.on_root(lambda: world.comm.busy(opened, "reading the draft model's table"))
    refuse_staged_mtp(file.path, bool(file.config.mtp), settings.pipeline)
    refuse_headless(file.path, file.config.lm_head)
    return file


def draft_settings(settings: ModelSettings) -> DraftSettings:
    """The settings of the draft model, for as many sequences."""
    same = {each.name: getattr(settings, each.name) for each in fields(ModelSettings)}
    same |= {"weights": "as-stored", "tokenizer": None, "layers": None, "pipeline": 1, "shares": None, "sync": "exact"}
    same["context_parallel"] = False
    same |= {"model": getattr(settings, "draft_model", None), "max_seq_len": None}
    return DraftSettings(**same, sequences=getattr(settings, "sequences", 1))


def needs_of_draft(file: ModelFile, settings: ModelSettings, world: World, ranks: int) -> Needs:
    """What a draft model takes on this rank if so many ranks share the model that it drafts for."""
    rank = world.comm.rank % ranks
    alone = getattr(settings, "draft_ranks", "all") == "first"
    if alone and rank:
        return Needs()
    draft = draft_settings(settings)
    longest = settings.max_seq_len or file.config.longest_context
    draft = replace(draft, max_seq_len=min(longest, file.config.longest_context))
    return rank_needs(file, world, draft, settings.prefill_chunk, Division(1 if alone else ranks), rank)


def refuse_unfit(model: ModelFile, draft: ModelFile) -> None:
    """UserError if a token of one model is another one of the other, or if a layer that drafts has no use for the
    model's hidden states.
    """
    sizes = model.config.hidden_size, draft.config.hidden_size
    if draft.config.mtp and sizes[0] != sizes[1]:
        raise UserError(
            f"{model.path}: has hidden size {sizes[0]}, but the layer that drafts tokens in {draft.path} has "
            f"{sizes[1]}: take the layer of the same checkpoint."
        )
    ours, theirs = (_tokens(file) for file in (model, draft))
    pairs = enumerate(zip(ours, theirs, strict=False))
    other = next((i for i, (own, its) in pairs if None not in (own, its) and own != its), None)
    if other is not None:
        raise UserError(
            f"{draft.path}: has another vocabulary than {model.path}: token {other} is {theirs[other]!r} instead "
            f"of {ours[other]!r}: take a draft model with the same tokens."
        )


def _tokens(file: ModelFile) -> list[str | None]:
    """The names of a model's tokens up to the last one that is no padding; None for an id without one."""
    tokenizer = make_tokenizer(file)
    names = [tokenizer.token(i) for i in range(max(tokenizer.vocab_size, file.config.vocab_size))]
    while names and (names[-1] is None or PADDING.fullmatch(names[-1])):
        names.pop()
    return names


def draft_bytes_of_ranks(draft: Draft, executor: Executor, ranks: int) -> list[int]:
    """What a draft model takes on each rank beside the main model of `executor`, its whole cache included."""
    file, settings = draft.file, replace(draft.settings, sequences=executor.slots)
    division = Division(1 if draft.alone else ranks)
    states = settings.state_slots if file.config.has_state else 0
    model = MemoryModel(file.config, file.specs, division, settings.kv_type, executor.max_tokens, states=states)
    parts = file.config.partition(division)
    found = [
        memory.weights + memory.states + memory.buffers + executor.blocks * model.cache_block_bytes(part)
        for memory, part in zip(model.of_ranks(0), parts, strict=True)
    ]
    return found + [0] * (ranks - len(found))


def load_draft(draft: Draft, world: World, target: Target, main: Executor, progress: Progress) -> Executor | None:
    """Load a draft model for the sequences of the main executor; None on ranks that do not hold it."""
    context = min(main.max_seq_len, draft.file.config.longest_context)
    settings = replace(draft.settings, max_seq_len=context, sequences=main.slots)

    def load(own: World) -> Executor:
        loaded = load_model(settings, own, target, progress, opened=draft.file)
        slots, states = main.slots, settings.state_slots if loaded.model.config.has_state else 0
        tokens = main.max_tokens + main.slots  # beyond the main model's step, the last guess of each sequence
        if isinstance(loaded.model, MtpDecoder):
            loaded.model.main = main.model
            return MtpExecutor(loaded.model, context, settings.kv_type, tokens, slots, main.blocks)
        return Executor(loaded.model, context, settings.kv_type, tokens, slots, main.blocks, states)

    if not draft.alone:
        return load(replace(world, comm=world.comm.twin()))
    own = world.comm.of_this_rank() if world.comm.is_root else None
    try:
        return world.comm.together(lambda: load(replace(world, comm=own, neighbours=own)) if own else None)
    except UserError:
        if own:
            own.free_sums()
        raise
