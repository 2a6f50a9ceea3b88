"""`generate`: continue a text."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace

import numpy as np

from mpillama.cli.display import in_units
from mpillama.cli.options import GenerateOptions, recorded
from mpillama.cli.running import (
    closing_line,
    communication_share,
    loaded,
    pieces_of,
    running,
    write,
)
from mpillama.cli.values import output_file, read_standard_input, refuse_unwritable
from mpillama.engine.sequence import EngineSequence, Request
from mpillama.errors import UserError
from mpillama.job.start import World
from mpillama.loading.draft import draft_bytes_of_ranks
from mpillama.loading.memory import MemoryModel, RankUsage, memory_of_ranks
from mpillama.loading.session import Session
from mpillama.loading.truncated import Extrapolation, TruncatedModel, extrapolate
from mpillama.text.sampling_params import new_seed


def generate(options: GenerateOptions, world: World) -> int:
    world.comm.on_root_only(lambda: refuse_unwritable("--logits-out", options.logits_out))
    with running(options, world) as job, loaded(job) as session:
        if session.is_root:
            _generate(session, options)
    return job.status


class SampledLogits:
    """The digest of the logits that each token was sampled from; keeps them if asked."""

    def __init__(self, keep: bool):
        self.digest = hashlib.sha256()
        self.kept: list[np.ndarray] | None = [] if keep else None

    def __call__(self, logits: np.ndarray, token: int) -> None:
        """A token was sampled from float32 [vocab_size]."""
        self.digest.update(np.ascontiguousarray(logits, "<f4").tobytes())
        if self.kept is not None:
            self.kept.append(logits.copy())


@dataclass(frozen=True)
class Generation:
    sequence: EngineSequence
    logits: SampledLogits
    memory: list[RankUsage]

    @property
    def positions(self) -> int:
        """Those that were computed: the last token was sampled only."""
        return len(self.sequence.tokens) - 1


def _generate(session: Session, options: GenerateOptions) -> None:
    prompt_ids, params = _prompt_ids(session, options), options.sampling
    if params.seed is None:
        params = replace(params, seed=new_seed())
    logits = SampledLogits(bool(options.logits_out))
    on_logits = logits if options.json or options.logits_out else None  # else ranks need not tell all of them
    sequence = session.engine.submit(Request(prompt_ids, params, on_logits=on_logits, continues=not options.chat))
    text = "" if options.quiet or options.chat else session.tokenizer.decode(prompt_ids)
    for piece in pieces_of(session, sequence):
        if not options.json:
            write(session.world.comm, text + piece)
        text = ""
    if options.logits_out:
        with output_file("--logits-out", options.logits_out) as file:
            np.save(file, np.array(logits.kept, np.float32))
    memory = _memory(session, options, len(sequence.tokens) - 1)
    _finish(session, options, Generation(sequence, logits, memory))


def _prompt_ids(session: Session, options: GenerateOptions) -> list[int]:
    """The prompt's token ids: as given, or of the text, in the chat template if asked."""
    if options.given_token_ids is not None:
        return options.given_token_ids
    with session.world.comm.idle():
        text = read_standard_input() if options.prompt == "-" else options.prompt
    if not text:
        raise UserError("the prompt is empty: give a text with --prompt, or - and a text on standard input.")
    if options.chat:
        rendered = session.chat_template.render_marked([{"role": "user", "content": text}])
        return session.tokenizer.encode_marked(rendered)
    return session.tokenizer.encode(text)


def _finish(session: Session, options: GenerateOptions, done: Generation) -> None:
    """Print what is said after the text."""
    if options.json:
        write(session.world.comm, json.dumps(_result(session, options, done)) + "\n")
        return
    write(session.world.comm, "\n")
    if not options.quiet:
        drafter, seed = session.engine.drafter, done.sequence.request.sampling.seed
        guesses = f" | drafts {100 * drafter.acceptance:.0f} % true" if drafter else ""
        sys.stderr.write(closing_line(session, done.memory) + f"{guesses} | seed {seed}\n")
        if trial := _trial(session, options, done):
            sys.stderr.write(
                f"mpillama: trial of {trial.layers} of {trial.whole_layers} layers: the whole model needs "
                f"{in_units(trial.memory_bytes_per_rank)} per rank at the full context, loads in "
                f"{trial.load_seconds:.1f} s, decodes {trial.decode_tokens_per_second:.2f} tok/s "
                "(the text of a trial means nothing)\n"
            )


def _memory(session: Session, options: GenerateOptions, positions: int) -> list[RankUsage]:
    executor, file = session.executor, session.loaded.file
    chunk = executor.model.workspace.capacity
    division, states = executor.model.division, executor.states
    model = MemoryModel(file.config, file.specs, division, options.kv_type, chunk, states=states)
    found = memory_of_ranks(model, executor.blocks, positions, executor.memory_per_rank())
    if session.draft is None:
        return found
    of_draft = draft_bytes_of_ranks(session.draft, executor, len(found))
    return [replace(memory, draft=size) for memory, size in zip(found, of_draft, strict=True)]


def _trial(session: Session, options: GenerateOptions, done: Generation) -> Extrapolation | None:
    """What a trial run (--layers) predicts for the whole model."""
    file = session.loaded.file
    if not isinstance(file, TruncatedModel):
        return None
    processes = [m.process for m in done.memory]
    return extrapolate(file, session.engine, done.positions, session.loaded.seconds, processes, options.kv_type)


def _result(session: Session, options: GenerateOptions, done: Generation) -> dict[str, object]:
    trial = _trial(session, options, done)
    answer, counts, drafter = done.sequence.answer, session.engine.counts, session.engine.drafter
    return {
        "prompt_token_ids": done.sequence.request.prompt_ids,
        "token_ids": answer.token_ids,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "logits_sha256": done.logits.digest.hexdigest(),
        "cached_tokens": done.sequence.cached_tokens or 0,
        "prefill_tokens_per_second": counts.prefill.tokens_per_second,
        "decode_tokens_per_second": counts.decode.tokens_per_second,
        "drafts_proposed": drafter.proposed if drafter else 0,
        "drafts_accepted": drafter.accepted if drafter else 0,
        "communication_share": communication_share(session),
        "ranks": session.world.comm.size,
        "threads": session.target.threads,
        "rss_bytes_per_rank": [m.process for m in done.memory],
        "memory_bytes_per_rank": [asdict(m) for m in done.memory],
        "trial": asdict(trial) if trial else None,
        "options": {
            **recorded(options),
            "model": session.path,
            "max_seq_len": session.engine.longest,
            "threads": session.target.threads,
            "seed": done.sequence.request.sampling.seed,
            "isa": session.target.isa.name,
        },
    }
