"""`generate`: continue a text."""

import json
import sys
from dataclasses import asdict

import numpy as np

from mpillama.comm.start import World
from mpillama.engine.answer import Answer
from mpillama.engine.generate import Generation, text_pieces
from mpillama.engine.memory import MemoryModel, RankUsage, memory_of_ranks
from mpillama.engine.speculation import Drafter
from mpillama.engine.trial import Extrapolation, FirstLayers, extrapolate
from mpillama.errors import UserError
from mpillama.options import GenerateOptions, recorded
from mpillama.text.sampler import Sampler
from mpillama.tools.display import in_units
from mpillama.tools.output_file import output_file, refuse_unwritable
from mpillama.tools.running import (
    Run,
    after_prompt,
    check_speculation,
    closing_line,
    communication_share,
    loaded,
    running,
)
from mpillama.tools.standard_input import read_standard_input


def generate(options: GenerateOptions, world: World) -> int:
    """Run the command; returns the exit status."""
    world.comm.on_root_only(lambda: check(options))
    with running(options, world) as job, loaded(job) as run:
        if run.is_root:
            _generate(run, options)
    return job.status


def check(options: GenerateOptions) -> None:
    """UserError for what is wrong with the options."""
    if options.chat and options.raw:
        raise UserError("--chat and --raw exclude each other: give one of them.")
    check_speculation(options)
    _given_token_ids(options)
    if not options.prompt and options.prompt_token_ids is None:
        raise UserError("the prompt is empty: give a text with --prompt, or - and a text on standard input.")
    refuse_unwritable("--logits-out", options.logits_out)


def _generate(run: Run, options: GenerateOptions) -> None:
    prompt_ids = _prompt_ids(run, options)
    sampler = Sampler(options.sampling, run.loaded.file.config.vocab_size, prompt_ids)
    answer = Answer(run.tokenizer, options.sampling, after=() if options.chat else prompt_ids)
    generation = Generation(prompt_ids, answer, logits=[] if options.logits_out else None)
    drafter = Drafter(options.speculate)
    pieces = text_pieces(run.session, sampler, generation, prompt_ids, drafter)
    text = "" if options.quiet or options.chat else run.tokenizer.decode(prompt_ids)
    for piece in after_prompt(run, pieces):
        if not options.json:
            run.write(text + piece)
        text = ""
    _finish(run, options, generation, sampler.seed, drafter)


def _prompt_ids(run: Run, options: GenerateOptions) -> list[int]:
    """The prompt's token ids: as given, or of the text, in the chat template if asked."""
    given = _given_token_ids(options)
    if given is not None:
        return given
    with run.world.comm.idle():
        text = read_standard_input() if options.prompt == "-" else options.prompt
    if not text:
        raise UserError("the prompt is empty: give a text with --prompt, or - and a text on standard input.")
    if options.chat:
        rendered = run.chat_template.render_marked([{"role": "user", "content": text}])
        return run.tokenizer.encode_marked(rendered)
    return run.tokenizer.encode(text)


def _given_token_ids(options: GenerateOptions) -> list[int] | None:
    if options.prompt_token_ids is None:
        return None
    try:
        return [int(part) for part in options.prompt_token_ids.split(",")]
    except ValueError as error:
        raise UserError(
            f"--prompt-token-ids {options.prompt_token_ids!r} is not a list of numbers like 1,2,3."
        ) from error


def _finish(run: Run, options: GenerateOptions, generation: Generation, seed: int, drafter: Drafter) -> None:
    """Print what is said after the text, and write the logits if asked."""
    if options.logits_out:
        with output_file("--logits-out", options.logits_out) as file:
            np.save(file, np.array(generation.logits, np.float32))
    memory = _memory(run, options)
    if options.json:
        run.write(json.dumps(_result(run, options, generation, seed, memory, drafter)) + "\n")
        return
    run.write("\n")
    if not options.quiet:
        guesses = f" | drafts {100 * drafter.acceptance:.0f} % true" if options.speculate else ""
        sys.stderr.write(closing_line(run, memory) + f"{guesses} | seed {seed}\n")
        if trial := _trial(run, options, memory):
            sys.stderr.write(
                f"mpillama: trial of {trial.layers} of {trial.whole_layers} layers: the whole model needs "
                f"{in_units(trial.memory_bytes_per_rank)} per rank at the full context, loads in "
                f"{trial.load_seconds:.1f} s, decodes {trial.decode_tokens_per_second:.2f} tok/s "
                "(the text of a trial means nothing)\n"
            )


def _memory(run: Run, options: GenerateOptions) -> list[RankUsage]:
    executor, file = run.executor, run.loaded.file
    chunk = executor.model.workspace.capacity
    model = MemoryModel(file.config, file.specs, executor.comm.size, options.kv_type, chunk)
    return memory_of_ranks(model, executor.blocks, run.session.length, executor.memory_per_rank())


def _trial(run: Run, options: GenerateOptions, memory: list[RankUsage]) -> Extrapolation | None:
    """What a trial with --layers says of the whole model."""
    file = run.loaded.file
    if not isinstance(file, FirstLayers):
        return None
    processes = [m.process for m in memory]
    return extrapolate(file, run.session, run.loaded.seconds, processes, options.kv_type)


def _result(
    run: Run, options: GenerateOptions, generation: Generation, seed: int, memory: list[RankUsage],
    drafter: Drafter,
) -> dict[str, object]:  # fmt: skip
    trial = _trial(run, options, memory)
    return {
        "prompt_token_ids": generation.prompt_token_ids,
        "token_ids": generation.answer.token_ids,
        "text": generation.answer.text,
        "finish_reason": generation.answer.finish_reason,
        "logits_sha256": generation.digest.hexdigest(),
        "prefill_tokens_per_second": run.session.prefill.tokens_per_second,
        "decode_tokens_per_second": run.session.decode.tokens_per_second,
        "drafts_proposed": drafter.proposed,
        "drafts_accepted": drafter.accepted,
        "communication_share": communication_share(run),
        "ranks": run.world.comm.size,
        "threads": run.target.threads,
        "rss_bytes_per_rank": [m.process for m in memory],
        "memory_bytes_per_rank": [asdict(m) for m in memory],
        "trial": asdict(trial) if trial else None,
        "options": {
            **recorded(options),
            "model": run.loaded.file.path,
            "max_seq_len": run.session.max_seq_len,
            "threads": run.target.threads,
            "seed": seed,
            "isa": run.target.isa.name,
        },
    }
