"""`perplexity`: how well a model predicts a text."""

import json
import os
import sys
from functools import partial
from pathlib import Path

from mpillama.cli.display import in_number, steps_progress
from mpillama.cli.options import PerplexityOptions
from mpillama.cli.running import loaded, running
from mpillama.cli.values import read_standard_input
from mpillama.engine.executor import Executor
from mpillama.engine.perplexity import Score, text_perplexity, windows
from mpillama.errors import UserError
from mpillama.job.start import World
from mpillama.loading.load import LoadedModel
from mpillama.loading.session import Session


def perplexity(options: PerplexityOptions, world: World) -> int:
    with running(options, world) as job:
        world.comm.on_root_only(lambda: refuse_unreadable(options.file))
        with loaded(job, partial(_open_executor, options)) as session:
            if session.is_root:
                _perplexity(session, options)
    return job.status


def _open_executor(options: PerplexityOptions, model: LoadedModel) -> Executor:
    """Room for as many windows as fill a step."""
    context = _window(options, model.context)
    slots = max(1, options.prefill_chunk // context)
    tokens = min(options.prefill_chunk, slots * context)
    return Executor(model.model, context, options.kv_type, tokens, slots)


def _window(options: PerplexityOptions, longest: int) -> int:
    """Tokens of a window: as asked, or the whole context if that is shorter."""
    return min(options.context, longest)


def _perplexity(session: Session, options: PerplexityOptions) -> None:
    comm, tokenizer = session.world.comm, session.tokenizer
    with comm.idle():
        text = read_text(options.file)
    encode = lambda: tokenizer.encode(text, add_bos=False, parse_special=False)  # noqa: E731
    ids = comm.busy(encode, "tokenizing the text")
    context = session.executor.max_seq_len
    stride = min(options.stride or context, context)
    count = sum(1 for _ in windows(len(ids), context, stride))
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
    with steps_progress("windows", count, options.json) as on_window:
        score = text_perplexity(session.engine, ids, bos, context, stride, on_window)
    _report(options, score, context, stride, count)


def refuse_unreadable(path: str) -> None:
    """UserError if there is no such text to read; it is not opened, since a pipe can be read once."""
    if path == "-":
        return
    file = Path(path)
    if not file.exists():
        raise UserError(f"--file {path}: no such file or directory: give a text file.")
    if file.is_dir() or not os.access(file, os.R_OK):
        raise UserError(f"--file {path}: {'is a folder' if file.is_dir() else 'permission denied'}: give a text file.")


def read_text(path: str) -> str:
    """A whole file, or standard input for -; UserError if it cannot be read or is no text."""
    if path == "-":
        return read_standard_input()
    try:
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"--file {path}: {(error.strerror or str(error)).lower()}: give a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path}: is not UTF-8 text ({error}).") from error


def _report(options: PerplexityOptions, score: Score, context: int, stride: int, count: int) -> None:
    facts = {
        "perplexity": score.perplexity,
        "standard_error": score.standard_error,
        "nll": score.mean,
        "tokens": score.tokens,
        "windows": count,
        "context": context,
        "stride": stride,
    }
    if options.json:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        sys.stdout.write(
            f"perplexity {score.perplexity:.4f} +/- {score.standard_error:.4f} "
            f"({score.mean:.5f} nats per token, {in_number(score.tokens, 'token')} of "
            f"{in_number(count, 'window')} of {context})\n"
        )
