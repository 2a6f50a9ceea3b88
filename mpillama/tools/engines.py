"""What `batch` and `serve` share: the executor of many sequences, and requests with a command's options as defaults."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillama.errors import UserError
from mpillama.options import EngineOptions
from mpillama.tools.running import Run, check_speculation, sampling_options

if TYPE_CHECKING:
    from mpillama.engine.executor import Executor
    from mpillama.engine.loading import LoadedModel


def opener(options: EngineOptions) -> "Callable[[LoadedModel], Executor]":
    """What makes the executor of many sequences."""

    def open_(loaded: "LoadedModel") -> "Executor":
        from mpillama.engine.loading import open_shared_executor

        return open_shared_executor(options, loaded, options.sequences, options.speculate, options.cache_tokens)

    return open_


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
    from mpillama.engine.answer import Limits

    defaults = Defaults(sampling_options(options), Limits(options.max_tokens, options.stop))
    vocab_size = run.loaded.file.config.vocab_size
    return Prompter(run.tokenizer, run.cached_chat_template, vocab_size, defaults)
