"""A draft model beside the model that it drafts for: all ranks divide it, or rank 0 has it alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import ClassVar, cast

from mpillama.engine.draft_model import STATES_PER_SEQUENCE
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
from mpillama.loading.settings import ModelSettings, SpeculationSettings
from mpillama.loading.texts import make_tokenizer
from mpillama.models.mtp import MtpDecoder
from mpillama.models.partition import Division

Progress = Callable[[int], AbstractContextManager[Callable[[LoadState], None]]]


@dataclass(frozen=True, kw_only=True)
class DraftSettings(ModelSettings):
    """How a draft model is loaded: as the model, but as it is stored, and divided evenly."""

    warns: ClassVar[bool] = False

    sequences: int = 1

    @property
    def state_slots(self) -> int:
        return STATES_PER_SEQUENCE * self.sequences


@dataclass(frozen=True)
class Draft:
    """A draft model that is opened; `needs` is what it takes on this rank."""

    file: ModelFile
    settings: DraftSettings
    alone: bool
    needs: Needs


def open_draft(settings: ModelSettings, world: World) -> Draft | None:
    """Read the draft model's table; None if there is none. UserError on all ranks if it cannot be used."""
    file = open_draft_file(settings, world)
    if file is None:
        return None
    draft = draft_settings(settings)
    alone = cast(SpeculationSettings, settings).draft_ranks == "first"
    return Draft(file, draft, alone, needs_of_draft(file, settings, world, world.comm.size))


def open_draft_file(settings: ModelSettings, world: World) -> ModelFile | None:
    """The table of --draft-model, if there is one; UserError on all ranks for one that cannot guess tokens."""
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
    if file.config.mtp and settings.pipeline > 1:
        raise UserError(f"{file.path}: a layer that drafts tokens needs --pipeline 1: take that, or a draft model.")
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


def refuse_other_vocabulary(model: ModelFile, draft: ModelFile) -> None:
    """UserError if a token of one model is another one in the other's vocabulary."""
    ours, theirs = make_tokenizer(model), make_tokenizer(draft)
    size = max(ours.vocab_size, theirs.vocab_size)
    other = next((i for i in range(size) if ours.token(i) != theirs.token(i)), None)
    if other is not None:
        raise UserError(
            f"{draft.path}: has another vocabulary than {model.path}: token {other} is {theirs.token(other)!r} instead "
            f"of {ours.token(other)!r}: take a draft model with the same tokens."
        )


def draft_bytes_of_ranks(draft: Draft, executor: Executor, ranks: int) -> list[int]:
    """What a draft model takes on each rank beside the main model of `executor`, its whole cache included."""
    file, settings = draft.file, draft.settings
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
    settings = replace(draft.settings, max_seq_len=context)

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
    own = world.comm.of_this_rank()
    return world.comm.together(lambda: load(replace(world, comm=own, neighbours=own)) if world.comm.is_root else None)
