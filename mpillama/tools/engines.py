"""What `batch` and `serve` share: the executor of many sequences, and requests with a command's options as defaults."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillama.comm.start import World
from mpillama.engine.monitor import Monitor
from mpillama.errors import UserError
from mpillama.kernels.target import Target
from mpillama.options import EngineOptions
from mpillama.tools.running import Run, check_speculation, run_in_world, sampling_options

if TYPE_CHECKING:
    from mpillama.comm.groups import Post
    from mpillama.engine.executor import Executor
    from mpillama.engine.loading import LoadedModel


def opener(options: EngineOptions) -> "Callable[[LoadedModel], Executor]":
    """What makes the executor of many sequences."""

    def open_(loaded: "LoadedModel") -> "Executor":
        from mpillama.engine.loading import open_shared_executor

        return open_shared_executor(options, loaded, options.sequences, options.speculate, options.cache_tokens)

    return open_


def run_in_groups(
    options: EngineOptions, quiet: bool, world: World, size: int, target: Target, monitor: Monitor,
    prepare: Callable[["Post", World], None], root: Callable[[Run], int], lead: Callable[[Run, "Post"], int],
) -> int:  # fmt: skip
    """Load the model in several groups of `size` ranks; returns the exit status.

    Rank 0 does `prepare` before and `root` after, the first ranks of the other groups `lead`.
    """
    from mpillama.comm.groups import Post, split_world
    from mpillama.comm.retirement import in_group

    group = split_world(world, size)
    post, open_ = Post(world.comm), opener(options)
    if world.comm.is_root:
        prepare(post, group)
        return run_in_world(options, quiet, root, open_, group, target, monitor)
    work = lambda: run_in_world(options, True, lambda run: lead(run, post), open_, group, target, monitor)  # noqa: E731
    return in_group(post, group.comm.watch, work)


def check_engine_options(options: EngineOptions) -> None:
    """UserError for numbers out of range."""
    if options.sequences < 1:
        raise UserError(f"--sequences is {options.sequences}: give at least 1.")
    check_speculation(options)
    if options.cache_tokens is not None and options.cache_tokens < 1:
        raise UserError(f"--cache-tokens is {options.cache_tokens}: give at least 1.")


def model_name(run: Run) -> str:
    """The model's name in answers."""
    return Path(run.loaded.file.path).name


def prompter(run: Run, options: Any) -> Any:
    """What turns bodies into requests, with the command's sampling options as defaults."""
    from mpillama.api.prompts import Defaults, Prompter

    defaults = Defaults(sampling_options(options))
    vocab_size = run.loaded.file.config.vocab_size
    return Prompter(run.tokenizer, run.cached_chat_template, vocab_size, defaults)
